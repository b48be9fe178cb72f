"""What every experiment shares: folders, rows that are kept as they are made, and what is written beside them.

A *row* is a JSON object of one measurement. A *unit* is a piece of an experiment whose rows are made in one go and kept in
the folder of unfinished work, so that an interrupted experiment goes on with the next unit.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from experiments.bench.options import Options
from metabroyden.comparison.tables import Row
from metabroyden.storage import atomic_write

_PACKAGES = ("metabroyden", "torch", "higher", "numpy", "scikit-learn", "torchdeq", "silva-networks", "xitorch", "scipy",
             "pypower", "pandapower", "pyscf", "epyt")  # fmt: skip
_ROOT = Path(__file__).resolve().parents[2]


class Run:
    """One run of an experiment.

    Args:
        config: the options of an experiment.
        free: options that change no figure beside those of `Options`; any other one that is not the usual one makes the
            run a trial, which replaces no published figure.
        shared: options that finished units do not depend on; default: the free ones.
        inputs: files and words that all units depend on, beside the options.
        always: options that the command line shows in any case, in words.

    Attributes:
        folder: of the results.
        work: of unfinished work.
    """

    def __init__(
        self, config: Any, *, free: Sequence[str] = (), shared: Sequence[str] | None = None,
        inputs: Iterable[Any] = (), always: str = "",
    ) -> None:  # fmt: skip
        places = tuple(item.name for item in fields(Options))
        self.config, self.always = config, always
        self._began = time.perf_counter()
        self.free = (*free, *places)
        usual = {item.name: item.default for item in fields(config)}
        kept = {key: usual[key] for key in (*(free if shared is None else shared), *places) if key in usual}
        chosen = {item.name: getattr(config, item.name) for item in fields(config) if item.name not in self.free}
        trial = any(value != usual[name] for name, value in chosen.items())
        self.folder = config.results / f"trial-{_hash(chosen)}" if trial else config.results
        self.work = Path(config.runs) / f"{config_hash(replace(config, **kept))}-{digest(*inputs)}"
        if config.overwrite:
            shutil.rmtree(self.work, ignore_errors=True)
        if not (self.work / "began.json").exists():
            atomic_write(self.work / "began.json", json.dumps(provenance(), indent=2) + "\n")

    def has(self, key: str) -> bool:
        """Whether the rows of a unit are there."""
        return (self.work / f"{key}.jsonl").exists()

    def unit(self, key: str, make: Callable[[], Iterable[Row]], **options: Any) -> list[Row]:
        """The rows of a unit: made by `make`, or read where they are there. options: see `write_rows`."""
        path = self.work / f"{key}.jsonl"
        if not self.has(key):
            write_rows(path, make(), **options)
        return read_rows(path)

    def described(self, **more: Any) -> Row:
        """How the rows were made: command, options, versions, machine, commit."""
        words = ["python -m experiments", self.config.command, self.always]
        words += [_option(self.config, item) for item in fields(self.config) if item.name not in self.free]
        return {
            "command": " ".join(filter(None, words)), "config": plain(self.config), "provenance": provenance(),
            "began": json.loads((self.work / "began.json").read_text()),
            "seconds": round(time.perf_counter() - self._began), **more,
        }  # fmt: skip

    def publish(self, rows: Iterable[Row], **more: Any) -> Path:
        """Write rows.jsonl.gz and config.json into the folder of the results."""
        return publish(self.folder, rows, self.described(**more))

    def finish(self, rows: Iterable[Row], write: Callable[[Path], Path], **more: Any) -> None:
        """Publish the rows, and print the report that write(folder) makes of them."""
        show(write(self.publish(rows, **more)))


def show(path: Path) -> None:
    """Print a report in the terminal."""
    Console().print(Markdown(path.read_text()))


def publish(folder: Path, rows: Iterable[Row], described: Row) -> Path:
    """Write config.json and rows.jsonl.gz into a folder: where there are rows, how they were made is there."""
    atomic_write(folder / "config.json", json.dumps(described, indent=2) + "\n")
    write_rows(folder / "rows.jsonl.gz", rows)
    return folder


def write_rows(path: Path, rows: Iterable[Row], *, strict: bool = False) -> Path:
    """Write rows, one a line, compressed where the name ends in .gz; strict: ValueError for numbers that JSON has not."""
    text = "".join(json.dumps(row, separators=(",", ":"), allow_nan=not strict) + "\n" for row in rows).encode()
    return atomic_write(path, gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, or of its compressed twin; ValueError names file and line of what is no JSON."""
    if not path.exists():
        path = path.with_suffix("") if path.suffix == ".gz" else path.with_name(f"{path.name}.gz")
    data = path.read_bytes()
    rows = []
    for number, line in enumerate((gzip.decompress(data) if path.suffix == ".gz" else data).splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
    return rows


def row_files(folder: Path, pattern: str = "*.jsonl") -> list[Path]:
    """Files of rows below a folder, compressed or not, without those of trials."""
    found = sorted((*folder.glob(pattern), *folder.glob(f"{pattern}.gz")))
    return [path for path in found if not any(part.startswith("trial-") for part in path.relative_to(folder).parts)]


def config_hash(config: Any) -> str:
    """Eight hex digits that change when a value of the config dataclass does."""
    return _hash(asdict(config))


def _hash(values: Row) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:8]


def digest(*inputs: Any) -> str:
    """Eight hex digits of files, by their bytes, and of other values, by their repr."""
    found = hashlib.sha256()
    for one in inputs:
        found.update(one.read_bytes() if isinstance(one, Path) else repr(one).encode())
    return found.hexdigest()[:8]


def sha256(path: Path) -> str:
    """Of a file, whole."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def plain(config: Any) -> Row:
    """A config dataclass as JSON holds it, paths as strings."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}


def _option(config: Any, item: Any) -> str:
    """An option as the command line has it; empty where it is the usual one."""
    value, name = getattr(config, item.name), item.name.replace("_", "-")
    if value == item.default:
        return ""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {shlex.join(map(str, value if isinstance(value, tuple) else (value,)))}"


def at_least_one(config: Any, *names: str) -> None:
    """ValueError where an option of these names is below one; None is no count."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def known(what: str, names: Iterable[str], among: Iterable[str]) -> None:
    """ValueError where a name is not among those that are known."""
    among = list(among)
    for name in names:
        if name not in among:
            raise ValueError(f"unknown {what} {name!r}: known are {', '.join(among)}")


def provenance() -> Row:
    """Versions, processor, threads and commit (with a mark where the tree had changes)."""
    return {**_machine(), "threads": torch.get_num_threads()}


@cache
def _machine() -> Row:
    versions = dict.fromkeys(_PACKAGES, "not installed")
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
    return {"versions": versions, **machine, "commit": _commit()}


def _commit() -> str:
    try:
        # what an experiment itself writes below results/ is no change of the code
        head, changed = (
            subprocess.run(
                ["git", *words.split()], cwd=_ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in ("rev-parse HEAD", "status --porcelain -- . :!results")
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (" with changes" if changed else "")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with so many threads of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
