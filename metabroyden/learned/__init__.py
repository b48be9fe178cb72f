"""Learned solvers and their parts, one a file; `get_solver` knows them by name."""

from metabroyden.learned.adjoint import AdjointConfig, AdjointLSTM
from metabroyden.learned.base import LearnedConfig, LearnedSolver
from metabroyden.learned.coordinatewise import CoordinatewiseConfig, CoordinatewiseLSTM
from metabroyden.learned.grouped import GroupedConfig, GroupedLSTM
from metabroyden.learned.hyper_anderson import HyperAnderson, HyperAndersonConfig
from metabroyden.learned.learned_start import LearnedStart, LearnedStartConfig
from metabroyden.learned.meta_broyden import MetaBroyden, MetaBroydenConfig
from metabroyden.learned.meta_learner import MetaLearnerLSTM
from metabroyden.learned.meta_splitting import MetaSplitting, MetaSplittingConfig
from metabroyden.learned.neural_fixed_point import NeuralFixedPoint, NeuralFixedPointConfig
from metabroyden.learned.safeguard import Safeguard
from metabroyden.learned.universal import Universal, UniversalConfig
from metabroyden.solvers.registry import import_all

__all__ = [
    "AdjointConfig",
    "AdjointLSTM",
    "CoordinatewiseConfig",
    "CoordinatewiseLSTM",
    "GroupedConfig",
    "GroupedLSTM",
    "HyperAnderson",
    "HyperAndersonConfig",
    "LearnedConfig",
    "LearnedSolver",
    "LearnedStart",
    "LearnedStartConfig",
    "MetaBroyden",
    "MetaBroydenConfig",
    "MetaLearnerLSTM",
    "MetaSplitting",
    "MetaSplittingConfig",
    "NeuralFixedPoint",
    "NeuralFixedPointConfig",
    "Safeguard",
    "Universal",
    "UniversalConfig",
]

import_all(__name__, __path__)
