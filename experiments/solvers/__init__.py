"""The classical solvers against torchdeq, xitorch and scipy: overhead, evaluations, success, on cells and known problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from experiments.bench.options import Budgeted, Timed
from experiments.bench.peers import ScipySolver, TorchDEQSolver, XitorchSolver, available
from experiments.bench.runner import Row, Run
from experiments.solvers import overhead, report, rows
from metabroyden import Anderson, Broyden, Newton, Picard
from metabroyden.progress import ticks
from metabroyden.zoo.testbed import PROBLEMS, KnownProblem
from metabroyden.zoo.testbed.cells import blas, conv

KINDS = (("gaussian", 0.95), ("symmetric", 0.95), ("symmetric", 1.5), ("gaussian", 3.0))
"""Cells that are raced on: easy, symmetric and of norm 3."""
BATCHES, MEMORIES = (1, 8, 64, 512), (2, 5, 10, 20, 40)
"""At which the overhead is measured."""
REGISTRY: dict[str, Any] = {
    "Picard": Picard(),
    "Anderson": Anderson(),
    "Broyden": Broyden(memory=200),  # full memory, as the peers have
    "bad Broyden": Broyden(memory=200, kind="bad"),
    "Broyden, memory 10": Broyden(memory=10),
    "Broyden, line search": Broyden(memory=200, line_search=True),
    "Newton": Newton(),
    "torchdeq Picard": TorchDEQSolver("fixed_point_iter"),
    "torchdeq Anderson": TorchDEQSolver("anderson"),
    "torchdeq Broyden": TorchDEQSolver("broyden"),
    **{f"scipy {name}": ScipySolver(name) for name in ("broyden1", "anderson", "krylov", "hybr")},
}
"""Who solves the registered problems."""


@dataclass(frozen=True)
class Solvers(Budgeted, Timed, command="solvers", budget=61, repeats=7):
    """Race the classical solvers against the published libraries' and write results/solvers/."""

    batch: int = 64
    """Samples in a batch of the dense cells; the convolutional ones have half as many."""
    seeds: int = 4
    """Batches on which evaluations are counted in the race, and seeds of the limited-memory comparison."""
    problems: int = 8
    """Samples of each registered problem."""
    compiled: bool = True
    """Compile a fixed budget too (a minute or two)."""


def run(config: Solvers) -> None:
    """The whole job. Interrupted, it goes on with the next piece."""
    if not available("torchdeq"):
        raise SystemExit("python -m experiments solvers needs torchdeq: pip install torchdeq==0.1.0")
    job, pieces = Run(config), list(_pieces(config))
    found: list[Row] = []
    with ticks("racing", len(pieces), show=config.progress) as done:
        for number, (words, make) in enumerate(pieces):
            found += job.unit(f"{number}-{words}", make)
            done(words)
    job.finish(found, report.write)


def _pieces(config: Solvers) -> Iterator[tuple[str, Callable[[], Iterator[Row]]]]:
    """What there is to do, with a word for each."""
    options: dict[str, Any] = {"budget": config.budget, "repeats": config.repeats}
    cells = {f"{word} {kind} {norm:g}": (word, kind, norm) for word, (kind, norm) in product(("dense", "conv"), KINDS)}
    for name, rtol in product(cells, (1e-3, 1e-5)):
        yield name, partial(_race, config, name, cells[name], rtol)
    for name, cell in cells.items():
        if "gaussian 0.95" in name:
            yield "anatomy", partial(rows.anatomy_rows, name, _cell(config, *cell), rtol=1e-5, **options)
    yield "overhead", partial(overhead.gap_rows, BATCHES, MEMORIES, repeats=config.repeats)
    yield "price", partial(overhead.price_rows, repeats=3 * config.repeats)
    yield "limited memory", partial(rows.limited_rows, rtols=(1e-3, 1e-5), seeds=config.seeds)
    for name in PROBLEMS:
        yield name, partial(rows.registry_rows, name, REGISTRY, budget=200, batch=config.problems)
    if config.compiled:
        dense = _cell(config, "dense", "gaussian", 1.5)
        yield (
            "compiling",
            partial(rows.compiled_rows, dense, "dense gaussian 1.5", budget=12, repeats=3 * config.repeats),
        )


def _cell(config: Solvers, word: str, kind: str, norm: float, x_seed: int = 1) -> KnownProblem:
    if word == "dense":
        return blas(config.batch, 256, norm, symmetric=kind == "symmetric", x_seed=x_seed)
    return conv(config.batch // 2, 16, 32, norm, symmetric=kind == "symmetric", x_seed=x_seed)


def _race(config: Solvers, name: str, cell: tuple[str, str, float], rtol: float) -> Iterator[Row]:
    other = _cell(config, *cell, x_seed=1000)  # validation: the same weights, other samples
    given = other.f, other.z0, other.context
    contestants: dict[str, dict[str, Any]] = {
        "Broyden": {"ours": Broyden(memory=config.budget), "torchdeq": TorchDEQSolver("broyden")},
        "Anderson": {"ours": Anderson(memory=5), "torchdeq": TorchDEQSolver("anderson", (("m", 6),))},
        "Picard": {"ours": Picard(), "torchdeq": TorchDEQSolver("fixed_point_iter"),
                   "ours, tuned damping": Picard.tuned(*given, tolerances=(rtol,), max_nfe=config.budget)},
    }  # fmt: skip
    if available("xitorch"):
        options = (("alpha", -1.0), ("line_search", False), ("max_rank", config.budget))
        contestants["Broyden"]["xitorch"] = XitorchSolver("broyden1", options)
        contestants["Anderson"]["xitorch"] = XitorchSolver("anderson_acc", (("msize", 6),))
    problems = [_cell(config, *cell, x_seed=1 + seed) for seed in range(config.seeds)]
    return overhead.race_rows(name, problems, contestants, rtol=rtol, budget=config.budget, repeats=config.repeats)
