"""Gradient modes of a trained DEQ: how biased, how dear; and who solves the adjoint system in the fewest products."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor, nn

from experiments.legacy import gradients_report
from experiments.legacy.provenance import plain, provenance, write_results
from metabroyden import (
    DEQ,
    Anderson,
    Broyden,
    Implicit,
    JacobianFree,
    Phantom,
    Picard,
    Unroll,
    fit_adjoint,
    load_solver,
)
from metabroyden.meta import AdjointMap
from metabroyden.solvers.tuning import tune
from metabroyden.zoo.data.digits import load_digits
from metabroyden.zoo.data.images import ImageSplit
from metabroyden.zoo.models import load_model


@dataclass(frozen=True)
class Gradients:
    """Compare gradient modes and adjoint solvers on the digits DEQs of results/digits/; results/gradients/."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Which of the trained DEQs."""
    steps: int = 300
    """Outer steps of the adjoint solver's meta-training."""
    rtols: tuple[float, ...] = (1e-1, 1e-2, 1e-3)
    """Tolerances of the adjoint."""
    budget: int = 60
    """Products a sample may cost."""
    samples: int = 300
    """Held-out images."""
    repeats: int = 5
    """Interleaved timing repeats."""
    models: Path = Path("results/digits")
    """Where the trained DEQs and their forward solvers are."""
    results: Path = Path("results/gradients")
    """Where rows, the figure and the report go."""
    progress: bool = True
    """Show a progress bar."""


def run(config: Gradients) -> None:
    """The whole job; what it wrote before is replaced at the end."""
    console = Console()
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for seed in config.seeds:
        rows += [{"seed": seed, **row} for row in _one(config, seed)]
    described = {
        "command": "python -m experiments gradients",
        "config": plain(config),
        "seconds": round(time.perf_counter() - began),
        "provenance": provenance(),
    }
    write_results(config.results, rows, described)
    report = gradients_report.write(config.results, rows, described)
    console.print(Markdown(gradients_report.tables(rows)))
    console.print(f"Figure and report: {report} ({described['seconds']} s)")


def _one(config: Gradients, seed: int) -> list[dict[str, Any]]:
    """Rows of one DEQ."""
    folder = config.models / f"seed{seed}"
    model = load_model(folder / "model.safetensors", warn=False)
    data = load_digits()
    x, _, v = _adjoints(model, data.train)
    learned = fit_adjoint(model.cell, x, cotangents=v, steps=config.steps, seed=seed, progress=config.progress)
    grid = [Anderson(memory, 1.0, ridge) for memory in (5, 8) for ridge in (1e-8, 1e-2)]
    tuned = _tuned(model, data.validation, grid, config)
    forward, fitted = Broyden(memory=60), load_solver(folder / "grouped.safetensors")
    solvers: dict[str, tuple[Any, Any, bool]] = {
        "Picard": (forward, Picard(), False),
        "Anderson, tuned": (forward, tuned, False),
        "Broyden": (forward, Broyden(memory=60), False),
        "Broyden from the forward inverse": (forward, Broyden(memory=60), True),
        "Broyden from the learned forward inverse": (fitted, Broyden(memory=60), True),
        "adjoint LSTM": (forward, learned, False),
    }
    test = ImageSplit(*(part[: config.samples] for part in (data.test.images, data.test.labels, data.test.indices)))
    x, _, v = _adjoints(model, test)
    return [*_adjoint_rows(config, model.cell, solvers, x, v), *_mode_rows(config, model.cell, learned, x, v)]


def _adjoints(model: Any, split: ImageSplit) -> tuple[Tensor, Tensor, Tensor]:
    """(x, z*, v): injections, equilibria to 1e-4, and the cross-entropy's gradient there."""
    with torch.no_grad():
        x = model.inject(split.images)
        z = DEQ(model.cell, solver=Broyden(memory=60), rtol=1e-4, max_nfe=80, warn=False)(x)
    assert isinstance(z, Tensor)
    z.requires_grad_()
    loss = nn.functional.cross_entropy(model.classify(z), split.labels, reduction="sum")
    (v,) = torch.autograd.grad(loss, z)
    return x, z.detach(), v


def _tuned(model: Any, split: ImageSplit, grid: list[Any], config: Gradients) -> Any:
    """The Anderson that solves the adjoints of a split in the fewest products."""
    x, z, v = _adjoints(model, split)
    context = {"z": z.flatten(1), "x": x, "v": v.flatten(1)}
    system = AdjointMap(model.cell, tuple(z.shape[1:]))
    (best, _), *_ = tune(grid, system, context["v"], context, tolerances=config.rtols, max_nfe=config.budget)
    return best


def _adjoint_rows(
    config: Gradients, cell: nn.Module, solvers: dict[str, tuple[Any, Any, bool]], x: Tensor, v: Tensor
) -> list[dict[str, Any]]:
    rows = []
    for rtol in config.rtols:
        layers = {
            name: DEQ(
                cell,
                solver=forward,
                backward=Implicit(solver=solver, rtol=rtol, max_nfe=config.budget, precondition=reuse),
                rtol=1e-4,
                max_nfe=80,
                warn=False,
            )
            for name, (forward, solver, reuse) in solvers.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in layers}
        for _ in range(config.repeats + 1):
            for name, layer in layers.items():
                z = layer(x)
                began = time.perf_counter()
                torch.autograd.grad(z, list(cell.parameters()), v)
                seconds[name].append(time.perf_counter() - began)
        for name, layer in layers.items():
            found = layer.last_backward_solution
            assert found is not None
            spent = np.where(found.converged.numpy(), found.nfe.numpy(), config.budget)
            rows.append(
                {
                    "row": "adjoint",
                    "solver": name,
                    "rtol": rtol,
                    "median": float(np.median(spent)),
                    "most": float(np.quantile(spent, 0.9)),
                    "solved": float(found.converged.double().mean()),
                    "seconds": float(f"{np.median(seconds[name][1:]):.4g}"),
                }
            )
    return rows


def _mode_rows(config: Gradients, cell: nn.Module, learned: Any, x: Tensor, v: Tensor) -> list[dict[str, Any]]:
    """Each mode's gradient towards the cell's parameters against the exact one, in float64 to 1e-9, and its time."""
    double = copy.deepcopy(cell).double()
    exact_mode = Implicit(solver=Broyden(memory=100), rtol=1e-9, max_nfe=300)
    exact_layer = DEQ(double, solver=Broyden(memory=200), backward=exact_mode, rtol=1e-9, max_nfe=400, warn=False)
    z = exact_layer(x.double())
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(z, list(double.parameters()), v.double())])
    solution, back = exact_layer.last_solution, exact_layer.last_backward_solution
    assert solution is not None
    assert back is not None
    implicit = Implicit(solver=Broyden(memory=60), max_nfe=config.budget)
    modes: dict[str, Any] = {f"implicit, {rtol:g}": replace(implicit, rtol=rtol) for rtol in (1e-1, 1e-2, 1e-3)}
    modes |= {
        "implicit, adjoint LSTM, 0.01": replace(implicit, solver=learned, rtol=1e-2),
        "phantom, 5 steps, damping 0.5": Phantom(5, 0.5),
        "phantom, 5 steps": Phantom(5, 1.0),
        "Jacobian-free": JacobianFree(),
        "unroll, 30 steps": Unroll(30),
    }
    tight: dict[str, Any] = {"solver": Broyden(memory=100), "max_nfe": 100, "warn": False}
    layers = {name: DEQ(cell, backward=mode, rtol=1e-5, **tight) for name, mode in modes.items()}
    for rtol in (1e-3, 1e-2):
        layers[f"implicit, 0.001, forward to {rtol:g}"] = DEQ(
            cell, backward=modes["implicit, 0.001"], rtol=rtol, **tight
        )
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    gradients: dict[str, Tensor] = {}
    for _ in range(config.repeats + 1):
        for name, layer in layers.items():
            began = time.perf_counter()
            found = torch.autograd.grad(layer(x), list(cell.parameters()), v)
            seconds[name].append(time.perf_counter() - began)
            gradients[name] = torch.cat([g.flatten() for g in found]).double()
    known = float((solution.converged & back.converged).double().mean())
    return [
        {
            "row": "mode",
            "mode": name,
            "cosine": float(nn.functional.cosine_similarity(gradient, exact, dim=0)),
            "error": float((gradient - exact).norm() / exact.norm()),
            "seconds": float(f"{np.median(seconds[name][1:]):.4g}"),
            "exact_known": known,
        }
        for name, gradient in gradients.items()
    ]
