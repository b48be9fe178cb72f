"""metabroyden learns the root finder of deep equilibrium models.

Examples:
    >>> import metabroyden as mb
    >>> {"anderson", "broyden", "meta-broyden"} <= set(mb.list_solvers())
    True
"""

from metabroyden import integrations
from metabroyden.checkpoint import CheckpointError, list_pretrained, load_solver, save_pretrained, save_solver
from metabroyden.compare import compare
from metabroyden.comparison.comparison import Comparison
from metabroyden.convert import compose, to_deq
from metabroyden.deprecated import public as _public
from metabroyden.deq import DEQ
from metabroyden.fixed import FixedBudget
from metabroyden.gradients import Implicit, JacobianFree, Phantom, Unroll
from metabroyden.learned import (
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
from metabroyden.meta import (
    CoTrainConfig,
    CoTrainer,
    MetaConfig,
    MetaTrainer,
    TaskSet,
    cotrain,
    fit_adjoint,
    fit_solver,
)
from metabroyden.nn import (
    EquilibriumCache,
    VariationalDropout,
    fixed_point_correction,
    jacobian_penalty,
    normalise,
    spectral_radius,
)
from metabroyden.padded import Graphs, OnGraphs, Padded
from metabroyden.shared import Shared
from metabroyden.solution import Solution, SolveError, Status, Trace, relative_residual
from metabroyden.solve import solve
from metabroyden.solvers import (
    Anderson,
    Broyden,
    ForwardBackward,
    Newton,
    PeacemanRachford,
    Picard,
    get_solver,
    list_solvers,
)
from metabroyden.version import __version__ as __version__

__all__ = [
    "DEQ",
    "AdjointLSTM",
    "Anderson",
    "Broyden",
    "CheckpointError",
    "CoTrainConfig",
    "CoTrainer",
    "Comparison",
    "CoordinatewiseLSTM",
    "EquilibriumCache",
    "FixedBudget",
    "ForwardBackward",
    "Graphs",
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
    "OnGraphs",
    "Padded",
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
    "compare",
    "compose",
    "cotrain",
    "fit_adjoint",
    "fit_solver",
    "fixed_point_correction",
    "get_solver",
    "integrations",
    "jacobian_penalty",
    "list_pretrained",
    "list_solvers",
    "load_solver",
    "normalise",
    "relative_residual",
    "save_pretrained",
    "save_solver",
    "solve",
    "spectral_radius",
    "to_deq",
]


def __getattr__(name: str) -> object:
    """What an old public name stands for, with a warning."""
    return _public(name, globals())
