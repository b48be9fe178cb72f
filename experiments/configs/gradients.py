"""What `experiments gradients` compares: solvers of the adjoint system, and gradient modes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import metabroyden as mb

FULL = mb.Broyden(memory=60)
GRID = [mb.Anderson(memory, 1.0, ridge) for memory in (5, 8) for ridge in (1e-8, 1e-2)]
"""Of which one is tuned for the adjoint."""
_EXACT = mb.Implicit(solver=mb.Broyden(memory=100), rtol=1e-9, max_nfe=300)
EXACT: dict[str, Any] = {"solver": mb.Broyden(200), "backward": _EXACT, "rtol": 1e-9, "max_nfe": 400, "warn": False}
"""Options of the DEQ whose gradient, in float64, is the exact one."""
TIGHT: dict[str, Any] = {"solver": mb.Broyden(100), "max_nfe": 100, "warn": False}
"""Those of the DEQs whose modes are compared."""


def adjoint_solvers(tuned: Any, learned: Any, fitted: Any) -> dict[str, tuple[Any, Any, bool]]:
    """(Forward solver, adjoint solver, whether it starts from the forward inverse).

    Args:
        tuned: the best of `GRID`.
        learned: a learned adjoint solver.
        fitted: a learned forward solver.
    """
    return {
        "Picard": (FULL, mb.Picard(), False),
        "Anderson, tuned": (FULL, tuned, False),
        "Broyden": (FULL, FULL, False),
        "Broyden from the forward inverse": (FULL, FULL, True),
        "Broyden from the learned forward inverse": (fitted, FULL, True),
        "adjoint LSTM": (FULL, learned, False),
    }


def modes(learned: Any, budget: int) -> dict[str, dict[str, Any]]:
    """The mode of a DEQ and its forward tolerance; learned: an adjoint solver; budget: of the adjoint."""
    implicit = mb.Implicit(solver=FULL, max_nfe=budget)
    found: dict[str, Any] = {f"implicit, {rtol:g}": replace(implicit, rtol=rtol) for rtol in (1e-1, 1e-2, 1e-3)}
    found |= {
        "implicit, adjoint LSTM, 0.01": replace(implicit, solver=learned, rtol=1e-2),
        "phantom, 5 steps, damping 0.5": mb.Phantom(5, 0.5),
        "phantom, 5 steps": mb.Phantom(5, 1.0),
        "Jacobian-free": mb.JacobianFree(),
        "unroll, 30 steps": mb.Unroll(30),
    }
    options = {name: {"backward": mode, "rtol": 1e-5} for name, mode in found.items()}
    for rtol in (1e-3, 1e-2):
        options[f"implicit, 0.001, forward to {rtol:g}"] = {"backward": found["implicit, 0.001"], "rtol": rtol}
    return options
