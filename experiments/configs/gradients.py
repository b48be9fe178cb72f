"""What `experiments gradients` compares: adjoint systems, their solvers, and gradient modes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import metabroyden as mb

FULL = mb.Broyden(memory=60)
GRID = [mb.Anderson(memory, 1.0, ridge) for memory in (5, 8) for ridge in (1e-8, 1e-2)]
"""Of which one is tuned for the adjoint."""
_EXACT = mb.Implicit(solver=mb.Broyden(memory=100), rtol=1e-9, max_nfe=300)
EXACT: dict[str, Any] = {"solver": mb.Broyden(200), "backward": _EXACT, "rtol": 1e-9, "max_nfe": 400, "warn": False}
"""Options of the DEQ whose gradient, in float64, is the exact one."""
LOOSE: dict[str, Any] = {"rtol": 1e-4, "max_nfe": 80, "warn": False}
"""Those of the DEQs whose adjoint systems are solved, but for the solvers."""
TIGHT: dict[str, Any] = {"solver": mb.Broyden(100), "max_nfe": 100, "warn": False}
"""Those of the DEQs whose modes are compared."""


def adjoints(model: Any, split: Any, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(x, z*, v) of the first samples: injections, equilibria to 1e-4, and the cross-entropy's gradient there."""
    with torch.no_grad():
        x = model.inject(split.images[:count])
        z: Any = mb.DEQ(model.cell, solver=FULL, **LOOSE)(x)
    z.requires_grad_()
    loss = nn.functional.cross_entropy(model.classify(z), split.labels[:count], reduction="sum")
    return x, z.detach(), torch.autograd.grad(loss, z)[0]


def adjoint_solvers(tuned: Any, learned: Any, fitted: Any, rtol: float, budget: int) -> dict[str, dict[str, Any]]:
    """Options of a DEQ by the solver of its adjoint system.

    Args:
        tuned: the best of `GRID`.
        learned: a learned adjoint solver.
        fitted: a learned forward solver.
        rtol: tolerance of the adjoint.
        budget: evaluations of the adjoint.
    """

    def options(solver: Any, forward: Any = FULL, **more: Any) -> dict[str, Any]:
        return {"solver": forward, "backward": mb.Implicit(solver=solver, rtol=rtol, max_nfe=budget, **more), **LOOSE}

    return {
        "Picard": options(mb.Picard()),
        "Anderson, tuned": options(tuned),
        "Broyden": options(FULL),
        "Broyden from the forward inverse": options(FULL, precondition=True),
        "Broyden from the learned forward inverse": options(FULL, fitted, precondition=True),
        "adjoint LSTM": options(learned),
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
