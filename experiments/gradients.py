"""Gradient modes of a trained DEQ: how biased, how dear; and who solves the adjoint system in the fewest products."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import metabroyden as mb
from experiments.bench import report
from experiments.bench.options import Compared, OnModels, Timed
from experiments.bench.runner import Row, Run
from experiments.configs.gradients import EXACT, GRID, TIGHT, adjoint_solvers, adjoints, modes
from metabroyden import DEQ
from metabroyden.comparison import figures
from metabroyden.comparison.clock import laps
from metabroyden.comparison.tables import chosen, listed, means, pivot
from metabroyden.meta import AdjointMap
from metabroyden.solvers.tuning import tune
from metabroyden.zoo.data.digits import load_digits
from metabroyden.zoo.models import load_model


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
    (tuned, _), *_ = tune(GRID, system, given["v"], given, tolerances=config.rtols, max_nfe=config.budget)
    x, _, v = adjoints(model, data.test, config.samples)
    fitted = mb.load_solver(folder / "grouped.safetensors")
    yield from adjoint_rows(config, model.cell, x, v, partial(adjoint_solvers, tuned, learned, fitted))
    yield from mode_rows(config, model.cell, x, v, learned)


def adjoint_rows(config: Gradients, cell: nn.Module, x: Tensor, v: Tensor, solvers: Any) -> Iterator[Row]:
    """Products and time of the adjoint solvers; solvers: their options by tolerance and budget."""

    def backward(layer: DEQ) -> float:
        z = layer(x)
        began = time.perf_counter()
        torch.autograd.grad(z, list(cell.parameters()), v)
        return time.perf_counter() - began

    for rtol in config.rtols:
        layers = {name: DEQ(cell, **options) for name, options in solvers(rtol, config.budget).items()}
        seconds = laps({name: partial(backward, layer) for name, layer in layers.items()}, config.repeats)
        for name, layer in layers.items():
            found: Any = layer.last_backward_solution
            spent = np.where(found.converged.numpy(), found.nfe.numpy(), config.budget)
            spread = {"median": float(np.median(spent)), "most": float(np.quantile(spent, 0.9))}
            solved = {"solved": float(found.converged.double().mean()), "seconds": float(np.median(seconds[name]))}
            yield {"row": "adjoint", "solver": name, "rtol": rtol, **spread, **solved}


def mode_rows(config: Gradients, cell: nn.Module, x: Tensor, v: Tensor, learned: Any) -> Iterator[Row]:
    """Each mode's gradient towards the cell's parameters against the exact one, in float64 to 1e-9, and its time."""

    def gradient(layer: Any, x: Tensor, v: Tensor) -> Tensor:
        found = torch.autograd.grad(layer(x), list(layer.cell.parameters()), v)
        return torch.cat([part.flatten() for part in found]).double()

    double: Any = DEQ(copy.deepcopy(cell).double(), **EXACT)
    exact = gradient(double, x.double(), v.double())
    known = float((double.last_solution.converged & double.last_backward_solution.converged).double().mean())
    layers = {name: DEQ(cell, **TIGHT, **options) for name, options in modes(learned, config.budget).items()}
    seconds = laps({name: partial(gradient, layer, x, v) for name, layer in layers.items()}, config.repeats)
    for name, layer in layers.items():
        found = gradient(layer, x, v)
        cosine, error = nn.functional.cosine_similarity(found, exact, dim=0), (found - exact).norm() / exact.norm()
        against = {"cosine": float(cosine), "error": float(error), "exact_known": known}
        yield {"row": "mode", "mode": name, "seconds": float(np.median(seconds[name])), **against}


@report.of_rows("Gradients through the digits DEQs")
def write(rows: list[Row], described: Row, folder: Path) -> list[report.Section]:
    """report.md and its figure, from rows alone."""
    found = [{**row, "ms": 1e3 * row["seconds"]} for row in means(rows, "row", "solver", "rtol", "mode")]
    adjoints, modes = chosen(found, "adjoint"), chosen(found, "mode")
    figure, place = figures.axes(7.2, xlabel="forward + backward (ms)", ylabel="relative error of the gradient")
    for row, marker in zip(modes, "os^Dvp*hXPd", strict=False):
        place.loglog(row["ms"], row["error"], marker, markersize=9, label=row["mode"])
    place.legend(frameon=False, fontsize=8)
    spent = "{median:.0f} / {most:.0f} / {solved:.1%}, {ms:.0f} ms"
    columns = [("cosine", "{cosine:.4f}"), ("relative error", "{error:.1e}"), ("forward + backward", "{ms:.0f} ms")]
    return [
        pivot("Solving the adjoint", adjoints, "{solver}", "to {rtol:g}", spent, corner="adjoint solver"),
        listed("Modes", modes, [("mode", "{mode}"), *columns]),
        figures.save(figure, folder / "bias_by_time.png"),
    ]
