"""Meta-training: tasks, differentiable unrolls, objectives, outer loops, episodes, `fit_solver` and `fit_adjoint`."""

from metabroyden.meta.across import AcrossTrainer
from metabroyden.meta.adjoint import AdjointMap, fit_adjoint
from metabroyden.meta.config import MetaConfig
from metabroyden.meta.episodes import EpisodeConfig, EpisodeSet, EpisodeTrainer
from metabroyden.meta.fit import fit_solver, make_learned
from metabroyden.meta.keep_up import KeepUp, KeepUpConfig
from metabroyden.meta.objectives import ResidualObjective
from metabroyden.meta.tasks import TaskSet
from metabroyden.meta.trainer import MetaTrainer
from metabroyden.meta.unroll import unroll

__all__ = [
    "AcrossTrainer",
    "AdjointMap",
    "EpisodeConfig",
    "EpisodeSet",
    "EpisodeTrainer",
    "KeepUp",
    "KeepUpConfig",
    "MetaConfig",
    "MetaTrainer",
    "ResidualObjective",
    "TaskSet",
    "fit_adjoint",
    "fit_solver",
    "make_learned",
    "unroll",
]
