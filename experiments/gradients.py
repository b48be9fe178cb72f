"""Gradient modes of a trained DEQ: how biased, how dear; and who solves the adjoint system in the fewest products."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import metabroyden as mb
from experiments.bench import figures, report
from experiments.bench.clock import laps
from experiments.bench.options import Compared, OnModels, Timed
from experiments.bench.runner import Row, Run
from experiments.bench.tables import chosen, grouped, listed, mean, pivot
from metabroyden import DEQ, Broyden
from metabroyden.meta import AdjointMap
from metabroyden.solvers.tuning import tune
from metabroyden.zoo.data.digits import load_digits
from metabroyden.zoo.models import load_model

FULL = Broyden(memory=60)


@dataclass(frozen=True)
class Gradients(Compared, Timed, OnModels, command="gradients", samples=300, models=Path("results/digits")):
    """Compare gradient modes and adjoint solvers on the digits DEQs of results/digits/; results/gradients/."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Which of the trained DEQs."""
    steps: int = 300
    """Outer steps of the adjoint solver's meta-training."""
    rtols: tuple[float, ...] = (1e-1, 1e-2, 1e-3)
    """Tolerances of the adjoint."""


def run(config: Gradients) -> None:
    """The whole job. Interrupted, it goes on with the next seed."""
    job = Run(config, free=("models",))
    units = [job.unit(f"seed{seed}", lambda: measured(config, seed)) for seed in config.seeds]  # noqa: B023
    job.finish([{"seed": seed, **row} for seed, unit in zip(config.seeds, units, strict=True) for row in unit], write)


def measured(config: Gradients, seed: int) -> Iterator[Row]:
    """Rows of one DEQ."""
    folder, data = config.models / f"seed{seed}", load_digits()
    model = load_model(folder / "model.safetensors", warn=False)
    x, z, v = adjoints(model, data.train)
    learned = mb.fit_adjoint(model.cell, x, cotangents=v, steps=config.steps, seed=seed, progress=config.progress)
    x, z, v = adjoints(model, data.validation)
    system, given = AdjointMap(model.cell, tuple(z.shape[1:])), {"z": z.flatten(1), "x": x, "v": v.flatten(1)}
    grid = [mb.Anderson(memory, 1.0, ridge) for memory in (5, 8) for ridge in (1e-8, 1e-2)]
    (tuned, _), *_ = tune(grid, system, given["v"], given, tolerances=config.rtols, max_nfe=config.budget)
    x, _, v = adjoints(model, data.test, config.samples)
    fitted = mb.load_solver(folder / "grouped.safetensors")
    yield from adjoint_rows(config, model.cell, x, v, {
        "Picard": (FULL, mb.Picard(), False),
        "Anderson, tuned": (FULL, tuned, False),
        "Broyden": (FULL, FULL, False),
        "Broyden from the forward inverse": (FULL, FULL, True),
        "Broyden from the learned forward inverse": (fitted, FULL, True),
        "adjoint LSTM": (FULL, learned, False),
    })  # fmt: skip
    yield from mode_rows(config, model.cell, x, v, learned)


def adjoints(model: Any, split: Any, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(x, z*, v) of the first samples: injections, equilibria to 1e-4, and the cross-entropy's gradient there."""
    with torch.no_grad():
        x = model.inject(split.images[:count])
        z: Any = DEQ(model.cell, solver=FULL, rtol=1e-4, max_nfe=80, warn=False)(x)
    z.requires_grad_()
    loss = nn.functional.cross_entropy(model.classify(z), split.labels[:count], reduction="sum")
    return x, z.detach(), torch.autograd.grad(loss, z)[0]


def adjoint_rows(
    config: Gradients, cell: nn.Module, x: Tensor, v: Tensor, solvers: dict[str, tuple[Any, Any, bool]]
) -> Iterator[Row]:
    """Products and time of each (forward solver, adjoint solver, whether it starts from the forward inverse)."""

    def backward(layer: DEQ) -> float:
        z = layer(x)
        began = time.perf_counter()
        torch.autograd.grad(z, list(cell.parameters()), v)
        return time.perf_counter() - began

    for rtol in config.rtols:
        layers = {}
        for name, (forward, solver, reuse) in solvers.items():
            mode = mb.Implicit(solver=solver, rtol=rtol, max_nfe=config.budget, precondition=reuse)
            layers[name] = DEQ(cell, solver=forward, backward=mode, rtol=1e-4, max_nfe=80, warn=False)
        seconds = laps({name: partial(backward, layer) for name, layer in layers.items()}, config.repeats)
        for name, layer in layers.items():
            found: Any = layer.last_backward_solution
            spent = np.where(found.converged.numpy(), found.nfe.numpy(), config.budget)
            spread = {"median": float(np.median(spent)), "most": float(np.quantile(spent, 0.9))}
            solved = {"solved": float(found.converged.double().mean()), "seconds": float(np.median(seconds[name]))}
            yield {"row": "adjoint", "solver": name, "rtol": rtol, **spread, **solved}


def mode_rows(config: Gradients, cell: nn.Module, x: Tensor, v: Tensor, learned: Any) -> Iterator[Row]:
    """Each mode's gradient towards the cell's parameters against the exact one, in float64 to 1e-9, and its time."""

    def gradient(layer: DEQ, x: Tensor, v: Tensor) -> Tensor:
        assert isinstance(layer.cell, nn.Module)
        found = torch.autograd.grad(layer(x), list(layer.cell.parameters()), v)
        return torch.cat([part.flatten() for part in found]).double()

    exactly = mb.Implicit(solver=Broyden(memory=100), rtol=1e-9, max_nfe=300)
    double = copy.deepcopy(cell).double()
    layer = DEQ(double, solver=Broyden(memory=200), backward=exactly, rtol=1e-9, max_nfe=400, warn=False)
    exact, solutions = gradient(layer, x.double(), v.double()), (layer.last_solution, layer.last_backward_solution)
    known = float(torch.stack([one.converged for one in solutions if one is not None]).all(dim=0).double().mean())
    implicit, loose = mb.Implicit(solver=FULL, max_nfe=config.budget), (1e-3, 1e-2)
    modes: dict[str, Any] = {f"implicit, {rtol:g}": replace(implicit, rtol=rtol) for rtol in (1e-1, 1e-2, 1e-3)}
    modes |= {
        "implicit, adjoint LSTM, 0.01": replace(implicit, solver=learned, rtol=1e-2),
        "phantom, 5 steps, damping 0.5": mb.Phantom(5, 0.5),
        "phantom, 5 steps": mb.Phantom(5, 1.0),
        "Jacobian-free": mb.JacobianFree(),
        "unroll, 30 steps": mb.Unroll(30),
    }
    asked = {name: (mode, 1e-5) for name, mode in modes.items()}
    asked |= {f"implicit, 0.001, forward to {rtol:g}": (modes["implicit, 0.001"], rtol) for rtol in loose}
    tight: Any = {"solver": Broyden(memory=100), "max_nfe": 100, "warn": False}
    layers = {name: DEQ(cell, backward=mode, rtol=rtol, **tight) for name, (mode, rtol) in asked.items()}
    seconds = laps({name: partial(gradient, layer, x, v) for name, layer in layers.items()}, config.repeats)
    for name, layer in layers.items():
        found = gradient(layer, x, v)
        cosine, error = nn.functional.cosine_similarity(found, exact, dim=0), (found - exact).norm() / exact.norm()
        yield {"row": "mode", "mode": name, "cosine": float(cosine), "error": float(error),
               "seconds": float(np.median(seconds[name])), "exact_known": known}  # fmt: skip


@report.of_rows("Gradients through the digits DEQs")
def write(rows: list[Row], described: Row, folder: Path) -> list[report.Section]:
    """report.md and its figure, from rows alone."""
    config, modes = described["config"], chosen(rows, "mode")
    by_mode = {of[0]["mode"]: of for of in grouped(modes, "mode")}

    def spent(found: Sequence[Row]) -> str:
        median, most, solved, seconds = (mean(found, key) for key in ("median", "most", "solved", "seconds"))
        return f"{median:.0f} / {most:.0f} / {solved:.1%}, {1000 * seconds:.0f} ms"

    def of(key: str, spec: str, scale: float = 1) -> Callable[[str], str]:
        return lambda name: f"{scale * mean(by_mode[name], key):{spec}}"

    figure, place = figures.axes(7.2, xlabel="forward + backward (ms)", ylabel="relative error of the gradient")
    for (name, found), marker in zip(by_mode.items(), "os^Dvp*hXPd", strict=False):
        place.loglog(1000 * mean(found, "seconds"), mean(found, "error"), marker, markersize=9, label=name)
    place.legend(frameon=False, fontsize=8)
    times = of("seconds", ".0f", 1000)
    columns: list[tuple[str, Any]] = [("mode", str), ("cosine", of("cosine", ".4f"))]
    columns += [("relative error", of("error", ".1e")), ("forward + backward", lambda name: f"{times(name)} ms")]
    return [
        f"The trained DEQs of results/digits ({len(config['seeds'])} seeds), {config['samples']} held-out images in one "
        "batch, the cotangent that of their cross-entropy. Means over seeds (times: of medians of "
        f"{config['repeats']} interleaved repeats).",
        "## Solving the adjoint\n\nProducts with Jᵀ a sample needs, median / 90th percentile / share solved (a failure "
        "counts as the budget), and the time of the whole backward pass.",
        pivot("", chosen(rows, "adjoint"), "{solver}", "to {rtol:g}", spent, corner="adjoint solver"),
        "## Modes\n\nThe gradient towards the cell's weights against the exact one (float64, both tolerances 1e-9, "
        f"{mean(modes, 'exact_known'):.1%} of samples solved): cosine, relative error; time of forward and backward pass. "
        "Forward tolerance 1e-5 where no other is named.",
        listed("", by_mode, columns),
        figures.save(figure, folder / "bias_by_time.png"),
    ]
