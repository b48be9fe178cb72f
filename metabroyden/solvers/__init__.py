"""Classical solvers, one algorithm a file, and the protocol that learned ones satisfy too."""

from metabroyden.solvers.anderson import Anderson
from metabroyden.solvers.base import Solver, Step
from metabroyden.solvers.broyden import Broyden, InverseJacobian
from metabroyden.solvers.newton import Newton
from metabroyden.solvers.picard import Picard
from metabroyden.solvers.registry import SOLVERS, make_solver

__all__ = ["SOLVERS", "Anderson", "Broyden", "InverseJacobian", "Newton", "Picard", "Solver", "Step", "make_solver"]
