"""The classical solvers against torchdeq, xitorch and scipy: overhead, evaluations, success, on cells and known problems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from experiments.bench.options import Budgeted, Timed
from experiments.bench.peers import ScipySolver, TorchDEQSolver, XitorchSolver, available
from experiments.bench.runner import Row, Run, ticks
from experiments.solvers import report, rows
from metabroyden import Anderson, Broyden, Newton, Picard
from metabroyden.zoo.testbed import PROBLEMS, KnownProblem
from metabroyden.zoo.testbed.cells import blas, conv


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
    """The whole job; what it wrote before is replaced at the end."""
    if not available("torchdeq"):
        raise SystemExit("python -m experiments solvers needs torchdeq: pip install torchdeq==0.1.0")
    job = Run(config)
    found: list[Row] = []
    jobs = _jobs(config)
    with ticks("racing", len(jobs), show=config.progress) as done:
        for number, (words, make) in enumerate(jobs):
            found += job.unit(f"{number}-{words}", make)
            done(words)
    job.finish(found, report.write)


def _jobs(config: Solvers) -> list[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """What there is to do, with a word for each."""
    cells = _cells(config)
    easy = {name: cell() for name, cell in cells.items() if "gaussian 0.95" in name}
    options = {"budget": config.budget, "repeats": config.repeats}
    jobs: list[tuple[str, Callable[[], list[dict[str, Any]]]]] = [
        *((name, partial(_race, config, name, cell, rtol)) for name, cell in cells.items() for rtol in (1e-3, 1e-5)),
        *(("anatomy", partial(rows.anatomy_rows, name, cell, rtol=1e-5, **options)) for name, cell in easy.items()),
        ("overhead", partial(rows.gap_rows, (1, 8, 64, 512), (2, 5, 10, 20, 40), repeats=config.repeats)),
        ("limited memory", partial(rows.limited_rows, rtols=(1e-3, 1e-5), seeds=config.seeds)),
        *((name, partial(_registry, config, name)) for name in PROBLEMS),
    ]
    if config.compiled:
        dense = _dense(config, "gaussian", 1.5)
        compiled = partial(rows.compiled_rows, dense, "dense gaussian 1.5", budget=12, repeats=3 * config.repeats)
        jobs.append(("compiling", compiled))
    return jobs


def _dense(config: Solvers, kind: str, norm: float, x_seed: int = 1) -> KnownProblem:
    return blas(config.batch, 256, norm, symmetric=kind == "symmetric", x_seed=x_seed)


def _conv(config: Solvers, kind: str, norm: float, x_seed: int = 1) -> KnownProblem:
    return conv(config.batch // 2, 16, 32, norm, symmetric=kind == "symmetric", x_seed=x_seed)


def _cells(config: Solvers) -> dict[str, Callable[..., KnownProblem]]:
    """Easy, symmetric and norm-3 cells, dense and convolutional; each made when called, with contexts of an x_seed."""
    kinds = (("gaussian", 0.95), ("symmetric", 0.95), ("symmetric", 1.5), ("gaussian", 3.0))
    makers = (("dense", _dense), ("conv", _conv))
    return {
        f"{word} {kind} {norm:g}": partial(maker, config, kind, norm) for word, maker in makers for kind, norm in kinds
    }


def _race(config: Solvers, name: str, cell: Callable[..., KnownProblem], rtol: float) -> list[dict[str, Any]]:
    contestants: dict[str, dict[str, Any]] = {
        "Broyden": {"ours": Broyden(memory=config.budget), "torchdeq": TorchDEQSolver("broyden")},
        "Anderson": {"ours": Anderson(memory=5), "torchdeq": TorchDEQSolver("anderson", (("m", 6),))},
        "Picard": {"ours": Picard(), "torchdeq": TorchDEQSolver("fixed_point_iter")},
    }
    if available("xitorch"):
        options = (("alpha", -1.0), ("line_search", False), ("max_rank", config.budget))
        contestants["Broyden"]["xitorch"] = XitorchSolver("broyden1", options)
        contestants["Anderson"]["xitorch"] = XitorchSolver("anderson_acc", (("msize", 6),))
    other = cell(x_seed=1000)  # validation: the same weights, other samples
    contestants["Picard"]["ours, tuned damping"] = Picard.tuned(
        other.f, other.z0, other.context, tolerances=(rtol,), max_nfe=config.budget
    )
    problems = [cell(x_seed=1 + seed) for seed in range(config.seeds)]
    return rows.race_rows(name, problems, contestants, rtol=rtol, budget=config.budget, repeats=config.repeats)


def _registry(config: Solvers, name: str) -> list[dict[str, Any]]:
    solvers: dict[str, Any] = {
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
        "scipy broyden1": ScipySolver("broyden1"),
        "scipy anderson": ScipySolver("anderson"),
        "scipy krylov": ScipySolver("krylov"),
        "scipy hybr": ScipySolver("hybr"),
    }
    tolerances = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
    return rows.registry_rows([name], solvers, tolerances=tolerances, budget=200, batch=config.problems)
