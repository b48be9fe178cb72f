"""Meta-training: tasks, differentiable unrolls, objectives, outer loops, episodes, `fit_solver` and `fit_adjoint`."""

from metabroyden.meta.adjoint import AdjointMap, fit_adjoint
from metabroyden.meta.config import MetaConfig
from metabroyden.meta.cotrainer import CoTrainConfig, CoTrainer
from metabroyden.meta.episodes import EpisodeConfig, EpisodeSet, EpisodeTrainer
from metabroyden.meta.finetune import CoTraining, cotrain
from metabroyden.meta.fit import fit_solver
from metabroyden.meta.objectives import ResidualObjective
from metabroyden.meta.plan import Plan, make_learned, plan
from metabroyden.meta.tasks import TaskSet
from metabroyden.meta.trainer import MetaTrainer, MultiTaskTrainer, TrainingStep
from metabroyden.meta.unroll import unroll

__all__ = [
    "AdjointMap",
    "CoTrainConfig",
    "CoTrainer",
    "CoTraining",
    "EpisodeConfig",
    "EpisodeSet",
    "EpisodeTrainer",
    "MetaConfig",
    "MetaTrainer",
    "MultiTaskTrainer",
    "Plan",
    "ResidualObjective",
    "TaskSet",
    "TrainingStep",
    "cotrain",
    "fit_adjoint",
    "fit_solver",
    "make_learned",
    "plan",
    "unroll",
]
