"""A pytest plugin that runs mutants in forked children, once the tests are collected."""

from __future__ import annotations

import contextlib
import gc
import importlib.abc
import importlib.util
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.mutants.changes import ROOT, Mutant, code_of

SLOWEST = 8.0  # seconds; a slower test is not used
BUDGET = 60.0  # seconds of tests, as they took unchanged, that are run against one mutant at most

Work = Callable[[], Any]


@dataclass
class Known:
    """What a run of the unchanged tests has told.

    `seconds` a test takes, by its id; ids of tests, and by file and line the numbers of those that run it, -1 standing for
    an import; ids of tests that fail or are too slow, and are of no use.
    """

    tests: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def add(self, found: dict[str, Any]) -> None:
        """Take over what the tests of one file have told."""
        first = len(self.tests)
        self.tests += found["tests"]
        self.seconds |= found["seconds"]
        self.unused += found["unused"]
        for file, lines in found["lines"].items():
            mine = self.lines.setdefault(file, {})
            for line, numbers in lines.items():
                held = mine.setdefault(int(line), [])
                held.extend(first + n if n >= 0 else -1 for n in numbers if n >= 0 or -1 not in held)

    def concerned(self, mutant: Mutant) -> tuple[list[str], bool]:
        """The tests that run the mutant's lines, and whether an import does; where only that does, all tests of the file."""
        lines = self.lines.get(mutant.file, {})
        here = {n for line, numbers in lines.items() if mutant.first <= line <= mutant.last for n in numbers}
        imported = not mutant.function or -1 in here
        if here <= {-1}:
            here = {n for numbers in lines.values() for n in numbers} if imported else set()
        return [self.tests[n] for n in here if n >= 0 and self.tests[n] in self.seconds], imported


class Hunt:
    """Takes over from pytest: runs the unchanged tests where no survey of them is known, then the mutants."""

    def __init__(
        self,
        tracer: Any,
        surveys: dict[str, Any],
        mutants: list[tuple[Mutant, str]],
        workers: int,
        remember: Callable[[dict[str, Any]], None],
    ) -> None:
        self.tracer, self.surveys, self.mutants, self.workers = tracer, surveys, mutants, workers
        self.remember, self.known = remember, Known()
        self.outcomes: list[dict[str, Any]] = []
        self.seconds = 0.0

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Both, in the place of the tests."""
        self.session = session
        self.items = {item.nodeid: item for item in session.items}
        gc.freeze()
        self.tracer.stop()
        missing = {test for survey in self.surveys.values() for test in survey["tests"]} - set(self.items)
        if missing:
            raise RuntimeError(
                f"ids of tests must not change from one run to the next, as these do: {sorted(missing)[:3]}"
            )
        self.survey()
        for survey in self.surveys.values():
            self.known.add(survey)
        began = time.monotonic()
        self.run_mutants()
        self.seconds = time.monotonic() - began
        return True

    def survey(self) -> None:
        """Run every test once, unchanged, of the files of which nothing is known."""
        by_file: dict[str, list[pytest.Item]] = {}
        for item in self.session.items:
            file = item.nodeid.split("::")[0]
            if file not in self.surveys:
                by_file.setdefault(file, []).append(item)
        tasks = ((file, lambda items=items: self.traced(items), 1800.0) for file, items in by_file.items())
        for file, found in pooled(tasks, self.workers):
            if found is None:
                raise RuntimeError(f"the process of the unchanged tests of {file} died")
            self.surveys[file] = found
            self.remember(self.surveys)
            print(f"{file}: {sum(found['seconds'].values()):.0f} s; not used: {found['unused']}", flush=True)

    def traced(self, items: list[pytest.Item]) -> dict[str, Any]:
        """In a child: what these tests tell."""
        self.tracer.start()
        seconds, unused = {}, []
        for number, item in enumerate(items):
            self.tracer.switch_context(str(number))
            began = time.process_time()
            good = self.passes(item, items[number + 1] if number + 1 < len(items) else None)
            spent = time.process_time() - began
            if good and spent <= SLOWEST:
                seconds[item.nodeid] = spent
            else:
                unused.append(item.nodeid)
        self.tracer.stop()
        data = self.tracer.get_data()
        lines = {
            str(Path(path).relative_to(ROOT)): {
                line: [int(context or -1) for context in contexts]
                for line, contexts in data.contexts_by_lineno(path).items()
            }
            for path in data.measured_files()
        }
        return {"tests": [item.nodeid for item in items], "seconds": seconds, "unused": unused, "lines": lines}

    def passes(self, item: pytest.Item, following: pytest.Item | None) -> bool:
        """Run a test with its fixtures."""
        failed = self.session.testsfailed
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        return self.session.testsfailed == failed

    def run_mutants(self) -> None:
        """Run the mutants, and note what kills each."""
        kills: Counter[str] = Counter()

        def tasks() -> Iterator[tuple[Any, Work, float]]:
            for mutant, change in self.mutants:
                concerned, imported = self.known.concerned(mutant)
                tests, seconds = self.affordable(concerned, kills)
                key = {**asdict(mutant), "change": change, "tests": len(tests), "of": len(concerned)}
                yield key, lambda m=mutant, t=tests, i=imported: self.hunted(m, t, i), 30 + 5 * seconds

        for key, found in pooled(tasks(), self.workers):
            killer = "time or crash" if found is None else found["killer"]
            kills[killer or ""] += 1
            self.outcomes.append({**key, "killer": killer})
            word = "killed  " if killer else "SURVIVED"
            print(f"{len(self.outcomes)} {word} {key['file']}:{key['first']} {key['change']} [{killer}]", flush=True)

    def affordable(self, tests: list[str], kills: Counter[str]) -> tuple[list[str], float]:
        """The tests to run, those that have killed most first, then the quickest, and the seconds that they take."""
        total, taken = 0.0, []
        for test in sorted(tests, key=lambda test: (-kills[test], self.known.seconds[test])):
            if total + self.known.seconds[test] <= BUDGET:
                total += self.known.seconds[test]
                taken.append(test)
        return taken, total

    def hunted(self, mutant: Mutant, tests: list[str], imported: bool) -> dict[str, Any]:
        """In a child: the first test to fail with the mutant in place."""
        if not tests:
            return {"killer": None}
        if imported or not exchanged(mutant):
            return {"killer": Anew(mutant, tests, self.known).killer()}
        items = [self.items[test] for test in tests]
        for item, following in zip(items, [*items[1:], None], strict=True):
            if not self.passes(item, following):
                return {"killer": item.nodeid}
        return {"killer": None}


def exchanged(mutant: Mutant) -> bool:
    """Give the living function the mutant's code; False where that cannot be done."""

    def inner(outer: types.CodeType) -> Iterator[types.CodeType]:
        for part in outer.co_consts:
            if isinstance(part, types.CodeType):
                yield part
                yield from inner(part)

    def is_meant(code: types.CodeType) -> bool:
        return (code.co_qualname, code.co_firstlineno) == (mutant.function, mutant.begins)

    new = [code for code in inner(code_of(mutant)) if is_meant(code)]
    gc.unfreeze()
    functions = [item for item in gc.get_objects() if type(item) is types.FunctionType and is_meant(item.__code__)]
    functions = [item for item in functions if item.__code__.co_filename == str(ROOT / mutant.file)]
    if len(new) != 1 or not functions or any(item.__code__.co_freevars != new[0].co_freevars for item in functions):
        return False
    for item in functions:
        item.__code__ = new[0]
    return True


class Anew(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports package and tests anew, the mutant in the place of its module."""

    def __init__(self, mutant: Mutant, tests: list[str], known: Known) -> None:
        self.path, self.code = ROOT / mutant.file, code_of(mutant)
        self.module = mutant.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        self.tests = {test: number for number, test in enumerate(tests)}
        self.known = {*known.seconds, *known.unused}
        self.failed: str | None = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The mutant's spec."""
        if name != self.module:
            return None
        folder = [str(self.path.parent)] if self.path.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(name, self.path, loader=self, submodule_search_locations=folder)

    def exec_module(self, module: types.ModuleType) -> None:
        """Run the mutant's module."""
        exec(self.code, module.__dict__)

    def killer(self) -> str | None:
        """The first test to fail, or "import"."""
        for name in list(sys.modules):
            if name.split(".")[0] in ("metabroyden", "tests") and not name.startswith("tests.mutants"):
                del sys.modules[name]
        sys.meta_path.insert(0, self)
        files = list(dict.fromkeys(str(ROOT / test.split("::")[0]) for test in self.tests))
        status = pytest.main(["-x", "--capture=no", "-p", "no:cacheprovider", *files], plugins=[self])
        return self.failed or (
            "import" if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) else None
        )

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the tests that were chosen, in order, and those of a name never seen: a parameter reads otherwise now."""
        kept = [item for item in items if item.nodeid in self.tests or item.nodeid not in self.known]
        items[:] = sorted(kept, key=lambda item: self.tests.get(item.nodeid, -1))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the first failure."""
        if report.failed and self.failed is None:
            self.failed = report.nodeid


def pooled(tasks: Iterator[tuple[Any, Work, float]], workers: int) -> Iterator[tuple[Any, Any]]:
    """(key, what the work returned, or None where its process died) of (key, work, seconds of processor time allowed)."""
    running: dict[int, tuple[Any, int, float]] = {}
    waiting = True
    while waiting or running:
        while waiting and len(running) < workers:
            task = next(tasks, None)
            waiting = task is not None
            if task is not None:
                key, work, seconds = task
                process, pipe = forked(work, seconds)
                running[pipe] = key, process, time.monotonic() + 10 * seconds  # others may use the processors
        ready = select.select(list(running), [], [], 1.0)[0]
        for pipe, (_, process, end) in running.items():
            if pipe not in ready and time.monotonic() > end:
                end_group(process)
        for pipe in ready:
            key, process, _ = running.pop(pipe)
            with os.fdopen(pipe, "rb") as file:
                data = file.read()
            end_group(process)
            os.waitpid(process, 0)
            result = json.loads(data or '{"found": null}')
            if "error" in result:  # ours: a test's error is its failure
                raise RuntimeError(f"{key}: {result['error']}")
            yield key, result["found"]


def forked(work: Work, seconds: float) -> tuple[int, int]:
    """(process, pipe) of a child that does the work in silence and writes what it returns, as JSON."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    try:
        os.setsid()
        os.close(reading)
        silence = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(silence, number)
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
        try:
            result = {"found": work()}
        except BaseException:
            result = {"error": traceback.format_exc()}
        with os.fdopen(writing, "w") as pipe:
            json.dump(result, pipe)
    finally:
        os._exit(0)


def end_group(process: int) -> None:
    """End a child of ours and whatever it has begun."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
