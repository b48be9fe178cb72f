"""Classical solvers, one algorithm a file, and the protocol that learned ones satisfy too."""

from metabroyden.solvers.anderson import Anderson
from metabroyden.solvers.base import Solver, Step
from metabroyden.solvers.broyden import Broyden, InverseJacobian
from metabroyden.solvers.newton import Newton
from metabroyden.solvers.picard import Picard
from metabroyden.solvers.registry import SOLVERS, SPLITTING, make_solver
from metabroyden.solvers.splitting import ForwardBackward, PeacemanRachford

__all__ = [
    "SOLVERS",
    "SPLITTING",
    "Anderson",
    "Broyden",
    "ForwardBackward",
    "InverseJacobian",
    "Newton",
    "PeacemanRachford",
    "Picard",
    "Solver",
    "Step",
    "make_solver",
]
