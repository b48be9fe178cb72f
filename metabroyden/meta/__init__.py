"""Meta-training: tasks, differentiable unrolls, objectives, the outer loop, and `fit_solver`."""

from metabroyden.meta.fit import fit_solver
from metabroyden.meta.objectives import ResidualObjective
from metabroyden.meta.tasks import TaskSet
from metabroyden.meta.trainer import MetaConfig, MetaTrainer
from metabroyden.meta.unroll import unroll

__all__ = ["MetaConfig", "MetaTrainer", "ResidualObjective", "TaskSet", "fit_solver", "unroll"]
