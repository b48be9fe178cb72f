"""`make mutants`: single faults put into the package, and the share of them that the tests kill.

    python -m tests.mutants --sample 300 --only solvers/ --workers 2

The modules of `TARGETS` are mutated one change at a time (see `changes`): another comparison, operator or number, a
condition negated, a statement or a keyword left out, a `.clone()` dropped, the branches of a `where` exchanged. A seeded
random sample of these mutants is run. A mutant is killed by a test that fails, dies or takes several times its time, among
those that run the changed line. What no change of behaviour can show is listed in equivalent.toml, with the reason.

It is a script of our own because the tools do not suit. mutmut 3 replaces every function by a trampoline: it leaves out
decorated functions, class attributes and default values, and knows which tests run a function, not a line. cosmic-ray
begins Python, torch and the tests anew for each mutant. Here the tests are collected
once, and the process is forked for each mutant; the child exchanges the code of one function, then runs the tests that
run its line, those that have killed most so far first, then the quickest. Only what is run on import (constants,
defaults) takes a new import of the package. Coverage tells which lines a test runs; that is kept in runs/mutants.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

import coverage
import pytest

from tests.mutants.changes import ROOT, Mutant, change_of, mutants_of, unchanged
from tests.mutants.hunt import Hunt

PACKAGE = ROOT / "metabroyden"
TARGETS = (
    "solve.py",
    "evaluator.py",
    "evaluator.py",
    "problem.py",
    "fixed.py",
    "deq.py",
    "checkpoint.py",
    "solvers/*.py",
    "gradients/*.py",
    "learned/*.py",
)
ELSEWHERE = {
    *(
        "alternate",
        "convert",
        "data",
        "devices",
        "distributed",
        "documentation",
        "episodes",
        "evaluation",
        "experiments",
    ),
    *(
        "families",
        "fit",
        "frozen",
        "generalise",
        "imports",
        "keep_up",
        "language",
        "memory",
        "meta",
        "models",
        "multiscale",
    ),
    *("mutants", "ngram", "pes", "race", "race_beside", "throughput", "torchdeq", "training", "tune_hyper", "twins"),
    *("unroll", "unroll_modes"),
}
"""Tests of other parts (models, meta-training, commands, data), most of them slow."""
WANTED = 0.85  # the share killed below which the command fails
CACHE = ROOT / "runs" / "mutants.json"


def main() -> int:
    """Run a sample of mutants and write the report; 1 where too few are killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Mutants of the package, run.")
    parser.add_argument("--sample", type=int, default=300, help="mutants to run; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--only", default="", help="files whose path contains this; the report goes to runs/mutants/")
    parser.add_argument("--tests", default="", help="test files whose name contains this; as above")
    parser.add_argument(
        "--control", action="store_true", help="run unchanged files as if they were mutants: all survive"
    )
    options = parser.parse_args()
    mutants = chosen(options)
    files = sorted(path for path in (ROOT / "tests").glob("test_*.py") if path.stem[5:] not in ELSEWHERE)
    files = [path for path in files if options.tests in path.name]
    keys = {str(path.relative_to(ROOT)): key_of(path) for path in files}  # as the files are when they are read
    surveys = remembered(keys)
    tracer = coverage.Coverage(data_file=None, config_file=False, include=[str(PACKAGE / "*")])
    if len(surveys) < len(files):
        tracer.start()  # before the package is imported, to see what an import runs
    hunt = Hunt(tracer, surveys, mutants, options.workers, lambda surveys: remember(keys, surveys))
    quiet = ["--capture=no", "-p", "no:cacheprovider", "--timeout=60"]
    pytest.main([*quiet, *map(str, files)], plugins=[hunt])
    if not hunt.outcomes:
        raise SystemExit("no mutant was run: the tests cannot be collected, or no file of the package is meant")
    return publish(hunt, options)


def chosen(options: argparse.Namespace) -> list[tuple[Mutant, str]]:
    """The mutants to run, each with its change in words."""
    files = [str(path.relative_to(ROOT)) for target in TARGETS for path in sorted(PACKAGE.glob(target))]
    files = [file for file in files if options.only in file]
    if options.control:
        return [(unchanged(file), "nothing") for file in files]
    everything = [mutant for file in files for mutant in mutants_of(file)]
    size = min(options.sample or len(everything), len(everything))
    drawn = random.Random(options.seed).sample(everything, size)
    allowed = {(entry["file"], entry["change"]) for entry in equivalents()}
    worded = [(mutant, change_of(mutant)) for mutant in drawn]
    return [(mutant, change) for mutant, change in worded if change and (mutant.file, change) not in allowed]


def equivalents() -> list[dict[str, str]]:
    """Changes that no test can tell, each with its reason."""
    return tomllib.loads(Path(__file__).with_name("equivalent.toml").read_text()).get("equivalent", [])


def remembered(keys: dict[str, str]) -> dict[str, Any]:
    """What earlier runs of the unchanged tests have told, by test file, where nothing has changed since."""
    held = json.loads(CACHE.read_text()) if CACHE.exists() else {}
    return {file: held[file][1] for file, key in keys.items() if file in held and held[file][0] == key}


def remember(keys: dict[str, str], surveys: dict[str, Any]) -> None:
    """Keep what the unchanged tests have told so far, beside what was kept of other files."""
    held = json.loads(CACHE.read_text()) if CACHE.exists() else {}
    write(CACHE, json.dumps(held | {file: [keys[file], survey] for file, survey in surveys.items()}))


def key_of(path: Path) -> str:
    """A hash of what decides which lines the tests of a file run."""
    parts = [*sorted(PACKAGE.rglob("*.py")), ROOT / "tests" / "conftest.py", path]
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()


def write(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    from metabroyden.storage import atomic_write

    atomic_write(path, text)


def share(outcomes: list[dict[str, Any]], total: int) -> tuple[float, float]:
    """(share killed, its standard error), for a sample of so many mutants drawn without replacement."""
    count = max(len(outcomes), 1)
    killed = sum(outcome["killer"] is not None for outcome in outcomes) / count
    return killed, (killed * (1 - killed) / count * max(0.0, 1 - count / total)) ** 0.5


def publish(hunt: Hunt, options: argparse.Namespace) -> int:
    """Write report.md and survivors.json, print the former; the exit status."""
    from experiments.legacy.provenance import provenance

    folder = ROOT / ("runs" if options.only or options.tests or options.control else "results") / "mutants"
    by_file: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for outcome in hunt.outcomes:
        by_file[outcome["file"]].append(outcome)
    totals = {file: len(mutants_of(file)) for file in by_file}
    killed, error = share(hunt.outcomes, sum(totals.values()))
    survivors = sorted(
        (outcome for outcome in hunt.outcomes if outcome["killer"] is None), key=lambda one: (one["file"], one["first"])
    )
    described = {**vars(options), "seconds": round(hunt.seconds), **provenance()}
    lines = [
        "# Mutants",
        "",
        f"{killed:.1%} ± {error:.1%} (a standard error) of {len(hunt.outcomes)} mutants, drawn from {sum(totals.values())},"
        f" are killed; {hunt.seconds / max(len(hunt.outcomes), 1):.1f} s a mutant on {options.workers} processes."
        f" Wanted: {WANTED:.0%}. Seed {options.seed}, commit {described['commit'][:12]}.",
        "",
        "| file | mutants | run | killed | share |",
        "|---|---:|---:|---:|---:|",
    ]
    for file, outcomes in sorted(by_file.items()):
        part, width = share(outcomes, totals[file])
        count = len(outcomes) - sum(one["killer"] is None for one in outcomes)
        lines.append(f"| {file} | {totals[file]} | {len(outcomes)} | {count} | {part:.0%} ± {width:.0%} |")
    lines += ["", "## Survivors", ""]
    lines += [f"- {one['file']}:{one['first']} ({one['tests']} tests) `{one['change']}`" for one in survivors]
    write(folder / "report.md", "\n".join(lines) + "\n")
    write(folder / "survivors.json", json.dumps({"run": described, "survivors": survivors}, indent=1) + "\n")
    print("\n".join(lines))
    return int(killed < WANTED)


if __name__ == "__main__":
    sys.exit(main())
