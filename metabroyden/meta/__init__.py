"""Meta-training: tasks, differentiable unrolls, objectives, outer loops, episodes, `fit_solver` and `fit_adjoint`."""

from metabroyden.meta.adjoint import AdjointMap, fit_adjoint
from metabroyden.meta.config import MetaConfig
from metabroyden.meta.episodes import EpisodeConfig, EpisodeSet, EpisodeTrainer
from metabroyden.meta.fit import fit_solver
from metabroyden.meta.objectives import ResidualObjective
from metabroyden.meta.online import OnlineConfig, OnlineMetaTrainer
from metabroyden.meta.plan import Plan, make_learned, plan
from metabroyden.meta.tasks import TaskSet
from metabroyden.meta.trainer import MetaTrainer, MultiTaskTrainer, TrainingStep
from metabroyden.meta.unroll import unroll

__all__ = [
    "AdjointMap",
    "EpisodeConfig",
    "EpisodeSet",
    "EpisodeTrainer",
    "MetaConfig",
    "MetaTrainer",
    "MultiTaskTrainer",
    "OnlineConfig",
    "OnlineMetaTrainer",
    "Plan",
    "ResidualObjective",
    "TaskSet",
    "TrainingStep",
    "fit_adjoint",
    "fit_solver",
    "make_learned",
    "plan",
    "unroll",
]
