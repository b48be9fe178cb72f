"""metabroyden learns the root finder of deep equilibrium models.

>>> import metabroyden as mb
>>> sorted(mb.SOLVERS)
['anderson', 'broyden', 'newton', 'picard']
"""

from metabroyden import integrations
from metabroyden.checkpoint import CheckpointError, load_solver, pretrained, save_solver
from metabroyden.convert import compose, to_deq
from metabroyden.deq import DEQ
from metabroyden.fixed import FixedBudget
from metabroyden.gradients import Implicit, JacobianFree, Phantom, Unroll
from metabroyden.learned import (
    LEARNED,
    LEARNED_SPLITTING,
    AdjointLSTM,
    CoordinatewiseLSTM,
    GroupedLSTM,
    HyperAnderson,
    LearnedStart,
    MetaBroyden,
    MetaLearnerLSTM,
    MetaSplitting,
    NeuralFixedPoint,
    Safeguard,
    Universal,
)
from metabroyden.learned.layout import Layout
from metabroyden.meta import MetaConfig, MetaTrainer, OnlineConfig, OnlineMetaTrainer, TaskSet, fit_adjoint, fit_solver
from metabroyden.nn import (
    EquilibriumCache,
    VariationalDropout,
    fixed_point_correction,
    jacobian_penalty,
    normalise,
    spectral_radius,
)
from metabroyden.shared import Shared
from metabroyden.solution import Solution, SolveError, Status, Trace, relative_residual
from metabroyden.solve import solve
from metabroyden.solvers import (
    SOLVERS,
    SPLITTING,
    Anderson,
    Broyden,
    ForwardBackward,
    Newton,
    PeacemanRachford,
    Picard,
    make_solver,
)
from metabroyden.version import __version__ as __version__

__all__ = [
    "DEQ",
    "LEARNED",
    "LEARNED_SPLITTING",
    "SOLVERS",
    "SPLITTING",
    "AdjointLSTM",
    "Anderson",
    "Broyden",
    "CheckpointError",
    "CoordinatewiseLSTM",
    "EquilibriumCache",
    "FixedBudget",
    "ForwardBackward",
    "GroupedLSTM",
    "HyperAnderson",
    "Implicit",
    "JacobianFree",
    "Layout",
    "LearnedStart",
    "MetaBroyden",
    "MetaConfig",
    "MetaLearnerLSTM",
    "MetaSplitting",
    "MetaTrainer",
    "NeuralFixedPoint",
    "Newton",
    "OnlineConfig",
    "OnlineMetaTrainer",
    "PeacemanRachford",
    "Phantom",
    "Picard",
    "Safeguard",
    "Shared",
    "Solution",
    "SolveError",
    "Status",
    "TaskSet",
    "Trace",
    "Universal",
    "Unroll",
    "VariationalDropout",
    "compose",
    "fit_adjoint",
    "fit_solver",
    "fixed_point_correction",
    "integrations",
    "jacobian_penalty",
    "load_solver",
    "make_solver",
    "normalise",
    "pretrained",
    "relative_residual",
    "save_solver",
    "solve",
    "spectral_radius",
    "to_deq",
]
