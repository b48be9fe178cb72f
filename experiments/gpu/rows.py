"""What is measured on a GPU.

Rows say what they are under the key "row":
  tests    how the tests marked cuda went
  fit      a call of fit_solver on the device: outer steps, seconds, whether its solver was returned and why not
  solve    one solver on a batch to one tolerance: mean evaluations, share solved, seconds by round
  f        seconds of one evaluation of f on a batch, by round
  fixed    a fixed budget as one graph (on a GPU a CUDA graph), seconds by round beside those of the same solver in `solve`
  chunked  `solve(compiled=…)` beside `solve`, the same way
"""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import metabroyden as mb
from experiments.bench import solvers
from experiments.bench.peers import available
from experiments.bench.runner import Row
from experiments.gpu.cases import CASES, Case, repeated
from metabroyden.comparison.clock import laps, now
from metabroyden.comparison.figures import FLAGSHIP
from metabroyden.comparison.measure import Contestant, Rules, measure
from metabroyden.comparison.problems import HeldOut
from metabroyden.comparison.statistics import Outcome, fastest
from metabroyden.comparison.tables import chosen, grouped, short

TOLERANCES, ROUNDS, BLOCKS = (1e-2, 1e-3), 3, 8
"""Tolerances; timed rounds; solves of single problems, each of another one."""
COMPILED = (1, 256)
"""Batch sizes that are compiled for: each takes some ten seconds a solver."""
TESTS = ("tests/test_devices.py", "tests/zoo/test_frozen.py")


def tested(config: Any) -> list[Row]:
    """The tests marked cuda, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "-rfE"]
    began = time.perf_counter()
    run = subprocess.run(
        [*command, *(TESTS[:1] if config.smoke else TESTS)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    seconds, lines = time.perf_counter() - began, (run.stdout + run.stderr).splitlines()
    dots = [line.split()[0] for line in lines if line.rstrip().endswith("%]")]
    counts = {word: sum(line.count(letter) for line in dots) for word, letter in zip(
        ("passed", "failed", "skipped"), ".Fs", strict=True
    )}  # fmt: skip
    return [{"row": "tests", "code": run.returncode, **counts, "seconds": round(seconds, 1), "tail": lines[-8:]}]


def measured(config: Any, name: str, device: torch.device, ends: float) -> list[Row]:
    """The rows of one model; batch sizes and compiled solves that would begin after `ends` are left out."""
    return short([{**row, "name": name} for row in _measured(config, CASES[name](config, device), ends)])


def _measured(config: Any, case: Case, ends: float) -> Iterator[Row]:
    ours = case.solver
    if ours is None:
        ours, row = _fit(config, case)
        yield row
    held = case.held
    tuned = {"Broyden": mb.Broyden(config.budget), **solvers.tuned(held.head(64), config.budget)}
    everyone = [Contestant(FLAGSHIP, "learned", ours, seed=0), *solvers.contestants(**tuned)]
    everyone += solvers.torchdeq() if available("torchdeq") else []
    outcomes: dict[int, dict[str, Outcome]] = {}
    for batch in config.batches:
        if time.perf_counter() > ends:
            break
        rows = _solves(config, held, everyone, batch)
        yield from rows
        outcomes[batch] = {row["solver"]: _outcome(row) for row in rows if row.get("tolerance") == TOLERANCES[0]}
    for batch in COMPILED:
        if batch in outcomes and time.perf_counter() < ends:
            best = fastest({name: one for name, one in outcomes[batch].items() if name in tuned})
            pair = {FLAGSHIP: ours, best: tuned[best]}
            budgets = {name: max(3, int(np.ceil(outcomes[batch][name].p90))) for name in pair}
            yield from _compiled(config, repeated(held, batch), pair, budgets)


def _fit(config: Any, case: Case) -> tuple[Any, Row]:
    steps: Row = {"steps": 2} if config.smoke else {"seconds": config.seconds}
    began = now(case.held.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a refusal is in the row
        solver, verdict = mb.fit_solver(
            case.held.f, case.x_train, rtol=TOLERANCES[0], **steps, fallback=False, progress=False, return_report=True
        )
    row = {"row": "fit", "steps": solver.summary["steps"], "training_seconds": solver.summary["seconds"]}
    seconds = now(case.held.device) - began
    return solver, {
        **row,
        "seconds": seconds,
        "returned": not verdict.failed_criteria,
        "reasons": verdict.failed_criteria,
    }


def _solves(config: Any, held: HeldOut, everyone: list[Contestant], batch: int) -> list[Row]:
    """Of single problems several, one after another; of larger batches one."""
    problems = repeated(held, batch if batch > 1 else BLOCKS)
    rules = Rules(TOLERANCES, config.budget, batch, ROUNDS)
    rows = []
    for found in grouped(chosen(measure(problems, everyone, rules), "solve"), "solver", "tolerance"):
        outcome, first = Outcome.of(found), found[0]
        rows.append({
            "row": "solve", "batch": batch, "solver": first["solver"], "kind": first["kind"],
            "tolerance": first["tolerance"], "evaluations": outcome.evaluations[0].tolist(),
            "solved": outcome.solved[0].tolist(), "seconds": outcome.seconds[0].tolist(),
        })  # fmt: skip
    z0, x = problems.take(torch.arange(batch, device=held.device))
    job = partial(_seconds, partial(held.f, z0, x), held.device)
    return [*rows, {"row": "f", "batch": batch, "seconds": laps({"f": job}, 5 * ROUNDS)["f"].tolist()}]


def _outcome(row: Row) -> Outcome:
    solved, seconds = np.array([row["solved"]]), np.array([row["seconds"]])
    return Outcome(np.array([row["evaluations"]]), solved, seconds)


def _compiled(config: Any, held: HeldOut, pair: dict[str, Any], budgets: dict[str, int]) -> Iterator[Row]:
    """Solves as graphs beside the usual ones."""
    on_gpu, batch, given = held.device.type == "cuda", len(held), (held.z0, held.x)
    mode, backend = ("reduce-overhead", "inductor") if on_gpu else (None, "aot_eager")
    for name, solver in pair.items():
        options: Row = {"solver": solver, "rtol": TOLERANCES[0], "max_nfe": config.budget, "throw": False}
        run = mb.FixedBudget(held.f, solver, max_nfe=budgets[name], rtol=TOLERANCES[0], compiled=on_gpu, mode=mode)
        usual = partial(mb.solve, held.f, *given, **options)
        ways: dict[str, Callable[[], Any]] = {
            "fixed": partial(run, *given),
            "chunked": partial(usual, compiled=backend),
        }
        for kind, way in ways.items():
            row = {"row": kind, "batch": batch, "solver": name, "budget": budgets[name]}
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                seconds, found = _lap(way, held.device)
            refused = [str(one.message) for one in told if "uncompiled" in str(one.message)]
            if refused:
                yield {**row, "refused": refused[0][:300]}
                continue
            every = laps(
                {key: partial(_seconds, one, held.device) for key, one in ((kind, way), ("usual", usual))}, 3 * ROUNDS
            )
            yield {
                **row, "compile_seconds": seconds, "seconds": every[kind].tolist(), "usual": every["usual"].tolist(),
                "solved": float(found.converged.double().mean()), "evaluations": float(found.nfe.double().mean()),
            }  # fmt: skip


def _lap(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """(seconds until the device has done it, what comes of it)."""
    began = now(device)
    found = work()
    return now(device) - began, found


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    return _lap(work, device)[0]
