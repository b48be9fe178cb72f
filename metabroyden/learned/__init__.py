"""Learned solvers and their parts, one a file. `LEARNED` and `ADJOINT` know them by name."""

from metabroyden.learned.adjoint import AdjointConfig, AdjointLSTM
from metabroyden.learned.base import ADJOINT, LEARNED, LearnedConfig, LearnedSolver
from metabroyden.learned.coordinatewise import CoordinatewiseConfig, CoordinatewiseLSTM
from metabroyden.learned.grouped import GroupedConfig, GroupedLSTM
from metabroyden.learned.hyper_anderson import HyperAnderson, HyperAndersonConfig
from metabroyden.learned.meta_broyden import MetaBroyden, MetaBroydenConfig
from metabroyden.learned.meta_learner import MetaLearnerLSTM
from metabroyden.learned.neural_fixed_point import NeuralFixedPoint, NeuralFixedPointConfig
from metabroyden.learned.safeguard import Safeguard
from metabroyden.learned.started import Started, StartedConfig
from metabroyden.learned.universal import Universal, UniversalConfig

__all__ = [
    "ADJOINT",
    "LEARNED",
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
    "MetaBroyden",
    "MetaBroydenConfig",
    "MetaLearnerLSTM",
    "NeuralFixedPoint",
    "NeuralFixedPointConfig",
    "Safeguard",
    "Started",
    "StartedConfig",
    "Universal",
    "UniversalConfig",
]
