"""Remakes the published reports from the committed rows and compares every cell: `python -m experiments.bench.faithful`."""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from unittest import mock

from matplotlib.figure import Figure

from metabroyden.comparison import figures

RESULTS = Path("results")
REPORTS = {
    "race": "race.report", "solvers": "solvers.report", "models": "models.report", "meta": "meta", "meta/pes": "pes",
    "generalise": "generalise", "specialise": "specialise", "throughput": "throughput", "torchdeq": "drop_in",
    "gradients": "gradients", "memory": "memory", "alternate": "alternate", "lost": "lost", "digits": "digits",
    "cotrain": "cotrain.report",
}  # fmt: skip
"""Folders of results, and the modules whose `write` makes their report.md."""


def cells(path: Path) -> list[str]:
    """Of all tables of a report."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    return [cell.strip() for line in lines for cell in line.strip("|").split("|")]


def compared(name: str, folder: Path) -> tuple[int, list[str]]:
    """(cells, those that differ, in words) of a report, remade in a folder."""
    shutil.copytree(RESULTS / name, folder)
    before, module = cells(folder / "report.md"), importlib.import_module(f"experiments.{REPORTS[name]}")
    pairs = list(zip_longest(before, cells(module.write(folder))))
    return len(pairs), [f"{name}: {old!r} → {new!r}" for old, new in pairs if old != new]


@contextmanager
def undrawn() -> Iterator[None]:
    """While it lasts, figures are made and not drawn."""
    with mock.patch.object(figures, "png", return_value=b""), mock.patch.object(Figure, "savefig"):
        yield


def main(names: list[str]) -> None:
    """Print how many cells there are, and which differ; exit status 1 where some do."""
    total, differ = 0, list[str]()
    with tempfile.TemporaryDirectory() as folder, undrawn():
        for name in names or REPORTS:
            count, words = compared(name, Path(folder, name.replace("/", "-")))
            total, differ = total + count, [*differ, *words]
            print(f"{name}: {count} cells, {len(words)} differ", flush=True)
    print("\n".join([f"{total} cells, {len(differ)} differ", *differ]))
    raise SystemExit(bool(differ))


if __name__ == "__main__":
    main(sys.argv[1:])
