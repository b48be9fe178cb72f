"""Classical solvers, one algorithm a file, and the registry of all solvers."""

from metabroyden.solver import SolverBase, Step
from metabroyden.solvers.anderson import Anderson
from metabroyden.solvers.broyden import Broyden, InverseJacobian
from metabroyden.solvers.newton import Newton
from metabroyden.solvers.picard import Picard
from metabroyden.solvers.registry import get_solver, import_all, list_solvers
from metabroyden.solvers.splitting import ForwardBackward, PeacemanRachford

__all__ = [
    "Anderson",
    "Broyden",
    "ForwardBackward",
    "InverseJacobian",
    "Newton",
    "PeacemanRachford",
    "Picard",
    "SolverBase",
    "Step",
    "get_solver",
    "list_solvers",
]

import_all(__name__, __path__)
