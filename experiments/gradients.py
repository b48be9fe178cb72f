"""Gradient modes of a trained DEQ: how biased, how dear; and who solves the adjoint system in the fewest products."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.bench import figures, report
from experiments.bench.options import Compared, OnModels, Timed
from experiments.bench.runner import Row, Run, read_rows
from experiments.bench.tables import pivot
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
    units = [job.unit(f"seed{seed}", lambda: _one(config, seed)) for seed in config.seeds]  # noqa: B023
    rows = [{"seed": seed, **row} for seed, rows in zip(config.seeds, units, strict=True) for row in rows]
    job.finish(rows, write)


def _one(config: Gradients, seed: int) -> list[Row]:
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


def _in_turns(work: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median seconds by name of work that returns what it took, interleaved, after a round that warms up."""
    seconds = [{name: one() for name, one in work.items()} for _ in range(repeats + 1)][1:]
    return {name: float(f"{np.median([lap[name] for lap in seconds]):.4g}") for name in work}


def _adjoint_rows(
    config: Gradients, cell: nn.Module, solvers: dict[str, tuple[Any, Any, bool]], x: Tensor, v: Tensor
) -> Iterator[Row]:
    def backward(layer: DEQ) -> float:
        z = layer(x)
        began = time.perf_counter()
        torch.autograd.grad(z, list(cell.parameters()), v)
        return time.perf_counter() - began

    for rtol in config.rtols:
        layers = {}
        for name, (forward, solver, reuse) in solvers.items():
            mode = Implicit(solver=solver, rtol=rtol, max_nfe=config.budget, precondition=reuse)
            layers[name] = DEQ(cell, solver=forward, backward=mode, rtol=1e-4, max_nfe=80, warn=False)
        work = {name: partial(backward, layer) for name, layer in layers.items()}
        seconds = _in_turns(work, config.repeats)
        for name, layer in layers.items():
            found = layer.last_backward_solution
            assert found is not None
            spent = np.where(found.converged.numpy(), found.nfe.numpy(), config.budget)
            spread = {"median": float(np.median(spent)), "most": float(np.quantile(spent, 0.9))}
            solved = float(found.converged.double().mean())
            yield {"row": "adjoint", "solver": name, "rtol": rtol, **spread, "solved": solved, "seconds": seconds[name]}


def _mode_rows(config: Gradients, cell: nn.Module, learned: Any, x: Tensor, v: Tensor) -> Iterator[Row]:
    """Each mode's gradient towards the cell's parameters against the exact one, in float64 to 1e-9, and its time."""
    double = copy.deepcopy(cell).double()
    exact_mode = Implicit(solver=Broyden(memory=100), rtol=1e-9, max_nfe=300)
    exact_layer = DEQ(double, solver=Broyden(memory=200), backward=exact_mode, rtol=1e-9, max_nfe=400, warn=False)
    z = exact_layer(x.double())
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(z, list(double.parameters()), v.double())])
    solution, back = exact_layer.last_solution, exact_layer.last_backward_solution
    assert solution is not None
    assert back is not None
    known = float((solution.converged & back.converged).double().mean())
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
        mode = modes["implicit, 0.001"]
        layers[f"implicit, 0.001, forward to {rtol:g}"] = DEQ(cell, backward=mode, rtol=rtol, **tight)
    gradients: dict[str, Tensor] = {}

    def both_ways(name: str) -> float:
        began = time.perf_counter()
        found = torch.autograd.grad(layers[name](x), list(cell.parameters()), v)
        took = time.perf_counter() - began
        gradients[name] = torch.cat([g.flatten() for g in found]).double()
        return took

    seconds = _in_turns({name: partial(both_ways, name) for name in layers}, config.repeats)
    for name, gradient in gradients.items():
        cosine = float(nn.functional.cosine_similarity(gradient, exact, dim=0))
        error = float((gradient - exact).norm() / exact.norm())
        yield {
            "row": "mode",
            "mode": name,
            "cosine": cosine,
            "error": error,
            "seconds": seconds[name],
            "exact_known": known,
        }


def write(folder: Path) -> Path:
    """report.md and its figure, from rows alone."""
    rows, described = read_rows(folder / "rows.jsonl"), report.read_config(folder)
    config = described["config"]
    adjoint, modes = ([row for row in rows if row["row"] == kind] for kind in ("adjoint", "mode"))

    def spent(found: Sequence[Row]) -> str:
        median, most, solved, seconds = (_mean(found, key) for key in ("median", "most", "solved", "seconds"))
        return f"{median:.0f} / {most:.0f} / {solved:.1%}, {1000 * seconds:.0f} ms"

    written = {"cosine": ".4f", "relative error": ".1e", "forward + backward": ".0f"}
    keys = dict(zip(written, ("cosine", "error", "seconds"), strict=True))

    def bias(found: Sequence[tuple[str, Row]]) -> str:
        column = found[0][0]
        value = _mean([row for _, row in found], keys[column])
        return f"{1000 * value:.0f} ms" if column == "forward + backward" else f"{value:{written[column]}}"

    sections: list[report.Section] = [
        f"{report.made_by(described)} {described['seconds']} s.",
        f"The trained DEQs of results/digits ({len(config['seeds'])} seeds), {config['samples']} held-out images in one "
        "batch, the cotangent that of their cross-entropy. Means over seeds (times: of medians of "
        f"{config['repeats']} interleaved repeats).",
        "## Solving the adjoint\n\nProducts with Jᵀ a sample needs, median / 90th percentile / share solved (a failure "
        "counts as the budget), and the time of the whole backward pass.",
        pivot("", adjoint, lambda r: r["solver"], lambda r: f"to {r['rtol']:g}", spent, corner="adjoint solver"),
        "## Modes\n\nThe gradient towards the cell's weights against the exact one (float64, both tolerances 1e-9, "
        f"{_mean(modes, 'exact_known'):.1%} of samples solved): cosine, relative error; time of forward and backward pass. "
        "Forward tolerance 1e-5 where no other is named.",
        pivot(
            "",
            [(column, row) for row in modes for column in written],
            lambda pair: pair[1]["mode"],
            lambda pair: pair[0],
            bias,
            corner="mode",
        ),
        _figure(modes, folder / "bias_by_time.png"),
    ]
    return report.write(folder, "Gradients through the digits DEQs", sections)


def _mean(rows: Sequence[Row], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def _figure(modes: Sequence[Row], path: Path) -> Path:
    figure, place = figures.axes(7.2, xlabel="forward + backward (ms)", ylabel="relative error of the gradient")
    for name, marker in zip(dict.fromkeys(row["mode"] for row in modes), "os^Dvp*hXPd", strict=False):
        mine = [row for row in modes if row["mode"] == name]
        place.loglog(1000 * _mean(mine, "seconds"), _mean(mine, "error"), marker, markersize=9, label=name)
    place.legend(frameon=False, fontsize=8)
    return figures.save(figure, path)
