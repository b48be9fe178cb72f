"""`make mutants`: single faults that cosmic-ray puts into the package, and the share of them that the tests kill.

    python -m tests.mutants --sample 60 --only solvers/

pytest-cov notes once which test runs which line, and this module, as a plugin of pytest, how long each takes; both are
kept in runs/mutants until `--survey` is given. A seeded sample of places in `TARGETS` is drawn, and one change at each is
made in a copy of the tree, where the tests that run the line are run. A test that fails or takes several times its time
kills the mutant.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "runs" / "mutants"
COVERAGE, SECONDS = WORK / "coverage", WORK / "seconds.json"
FOLDERS = ("solvers", "gradients", "learned")
TARGETS = ("solve", "evaluator", "function", "problem", "fixed", "deq", "checkpoint", *map("{}/*".format, FOLDERS))
SLOW = ("devices", "documentation", "endurance", "imports", "memory", "robustness", "suite", "threads")
"""Tests beside those of `FOLDERS` that are not used."""
BUDGET = 60.0  # seconds of tests, as they took unchanged, that are run against one mutant at most
WANTED = 0.85  # the share killed below which the command fails
_seconds: dict[str, float] = {}


class Mutant(NamedTuple):
    """A file with one line changed, numbered from 1, and that change in words."""

    file: str
    line: int
    change: str
    code: str


def pytest_runtest_logreport(report: Any) -> None:
    """Note how long a test takes that passes."""
    if report.when == "call" and report.passed:
        _seconds[report.nodeid] = report.duration


def pytest_sessionfinish(session: Any) -> None:
    """Keep that; of workers it is the controller that is told."""
    if not hasattr(session.config, "workerinput"):
        SECONDS.write_text(json.dumps(_seconds))


def run_pytest(*options: str, folder: Path = ROOT, limit: float | None = None) -> bool:
    """Whether these tests pass in a tree."""
    environment = os.environ | {"PYTHONPATH": str(folder), "COVERAGE_FILE": str(COVERAGE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=120", *options]
    try:
        return not subprocess.run(command, cwd=folder, env=environment, timeout=limit, capture_output=True).returncode
    except subprocess.TimeoutExpired:
        return False


def draw(files: list[str], size: int, seed: int) -> tuple[list[Mutant], int]:
    """A random mutant at each of so many random places (0: all of them), and how many places there are."""
    from cosmic_ray.commands import init
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator
    from cosmic_ray.work_db import WorkDB, use_db

    places = defaultdict(list)
    with use_db(str(WORK / "mutants.sqlite"), WorkDB.Mode.create) as database:
        init([ROOT / file for file in files], database, {})
        for item in database.work_items:
            (spec,) = item.mutations
            places[str(spec.module_path), spec.start_pos].append((spec.operator_name, spec.occurrence))
    chance, found = random.Random(seed), []
    for (path, (line, _)), specs in chance.sample(sorted(places.items()), len(places)):
        name, occurrence = chance.choice(sorted(specs))
        before = Path(path).read_text()
        after = mutate_code(before, get_operator(name)(), occurrence)
        if after is not None and not same_meaning(before, after):
            found.append(Mutant(str(Path(path).relative_to(ROOT)), line, worded(before, after), after))
        if len(found) == size:
            break
    return found, len(places)


def same_meaning(before: str, after: str) -> bool:
    """Whether nothing but annotations and zip's own check differs, or one is no Python."""
    trees = []
    for code in (before, after):
        try:
            tree = ast.parse(code)
        except SyntaxError:
            return True
        for node in ast.walk(tree):
            for name in {"annotation", "returns"} & set(node._fields):
                setattr(node, name, None)
            if isinstance(node, ast.keyword) and node.arg == "strict":
                node.value = ast.Constant(None)
        trees.append(ast.dump(tree))
    return trees[0] == trees[1]


def worded(before: str, after: str) -> str:
    """The first line that differs, "was → is"."""
    pairs = zip(before.splitlines(), after.splitlines(), strict=False)
    return next((f"{was.strip()} → {now.strip()}" for was, now in pairs if was != now), "a line less")


def concerned(line: int, contexts: dict[int, list[str]], seconds: dict[str, float]) -> list[str]:
    """The tests that run a line, or where only an import does all of its file: the quickest, `BUDGET` seconds together."""
    names = set(contexts.get(line, [])) - {""} or {name for every in contexts.values() for name in every}
    tests = {name.rsplit("|", 1)[0] for name in names} & set(seconds)
    taken, total = [], 0.0
    for test in sorted(tests, key=seconds.__getitem__):
        total += seconds[test]
        if total <= BUDGET:
            taken.append(test)
    return taken


def survivors_of(mutants: Iterable[Mutant], workers: int) -> Iterator[tuple[Mutant, int, bool]]:
    """Each mutant, the number of tests run against it, and whether it survives."""
    import coverage

    data, seconds = coverage.CoverageData(str(COVERAGE)), json.loads(SECONDS.read_text())
    data.read()
    folders: queue.Queue[Path] = queue.Queue()

    def hunted(mutant: Mutant) -> tuple[Mutant, int, bool]:
        tests = concerned(mutant.line, data.contexts_by_lineno(str(ROOT / mutant.file)), seconds)
        folder = folders.get()
        kept = (folder / mutant.file).read_text()
        (folder / mutant.file).write_text(mutant.code)
        limit = 60 + 5 * sum(seconds[test] for test in tests)
        survives = not tests or run_pytest("-x", "-n0", *tests, folder=folder, limit=limit)
        (folder / mutant.file).write_text(kept)
        folders.put(folder)
        print("SURVIVED" if survives else "killed  ", f"{mutant.file}:{mutant.line} {mutant.change}", flush=True)
        return mutant, len(tests), survives

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(workers) as pool:
        for number in range(workers):
            left_out = shutil.ignore_patterns(".git", ".venv*", "runs", "site", "__pycache__")
            folders.put(shutil.copytree(ROOT, Path(scratch) / str(number), ignore=left_out))
        yield from pool.map(hunted, mutants)


def report(outcomes: list[tuple[Mutant, int, bool]], places: int) -> tuple[str, float]:
    """The report, and the share killed."""
    by_file: dict[str, list[bool]] = defaultdict(list)
    for mutant, _, survives in outcomes:
        by_file[mutant.file].append(not survives)
    count = max(len(outcomes), 1)
    share = sum(map(sum, by_file.values())) / count
    error = (share * (1 - share) / count * max(0.0, 1 - count / places)) ** 0.5
    lines = ["# Mutants", "", f"{share:.1%} ± {error:.1%} (a standard error) of {len(outcomes)} mutants at {places} places "
             f"are killed. Wanted: {WANTED:.0%}.", "", "| file | run | killed |", "|---|---:|---:|"]  # fmt: skip
    lines += [f"| {file} | {len(killed)} | {sum(killed)} |" for file, killed in sorted(by_file.items())]
    lines += ["", "## Survivors", ""]
    lines += [f"- {m.file}:{m.line} ({tests} tests) `{m.change}`" for m, tests, survives in outcomes if survives]
    return "\n".join(lines) + "\n", share


def main() -> int:
    """Run a sample of mutants and write the report; 1 where too few are killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Mutants of the package, run.")
    parser.add_argument("--sample", type=int, default=300, help="mutants to run; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--only", default="", help="files whose path contains this; the report goes to runs/mutants/")
    parser.add_argument("--survey", action="store_true", help="note anew which test runs which line")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    if options.survey or not SECONDS.exists():
        measured = ["--cov=metabroyden", "--cov-context=test", "--cov-report=", "-p", "tests.mutants"]
        beside = [str(path) for path in (ROOT / "tests").glob("test_*.py") if path.stem[5:] not in SLOW]
        run_pytest(*measured, f"-n{options.workers}", *(f"tests/{name}" for name in FOLDERS), *beside)
    paths = sorted({path for target in TARGETS for path in (ROOT / "metabroyden").glob(f"{target}.py")})
    files = [file for path in paths if options.only in (file := str(path.relative_to(ROOT)))]
    mutants, places = draw(files, options.sample, options.seed)
    text, share = report(list(survivors_of(mutants, options.workers)), places)
    (WORK if options.only else ROOT / "results" / "mutants").joinpath("report.md").write_text(text)
    print(text)
    return int(share < WANTED)


if __name__ == "__main__":
    sys.exit(main())
