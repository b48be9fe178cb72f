"""What an experiment's report says beside its tables: the command, machine and commit that made it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.bench.runner import Row, read_rows, row_files
from metabroyden.comparison.report import CONCLUSION, Folded, Picture, Section, write, write_page

__all__ = [
    "CONCLUSION",
    "Folded",
    "Picture",
    "Section",
    "made_by",
    "of_rows",
    "read_config",
    "runs_below",
    "write",
    "write_page",
]
Sections = Callable[[list[Row], Row, Path], list[Section]]


def made_by(described: dict[str, Any], *packages: str) -> str:
    """The command that made a report, and on what: machine, versions of torch and of these packages, commit."""
    made = described["provenance"]
    versions = ", ".join(f"{name} {made['versions'][name]}" for name in ("torch", *packages))
    return (
        f"Made by\n\n```\n{described['command']}\n```\n\non {made['cores']} cores, {made['threads']} threads; {versions}; "
        f"commit {made['commit']}."
    )


def read_config(folder: Path) -> dict[str, Any]:
    """How the rows of a folder were made: its config.json."""
    return json.loads((folder / "config.json").read_text())


def runs_below(folder: Path, pattern: str) -> list[tuple[Row, list[Row]]]:
    """(how they were made, rows) of every run whose rows.jsonl is at such a place below a folder."""
    return [(read_config(path.parent), read_rows(path)) for path in row_files(folder, pattern)]


def of_rows(title: str, *packages: str) -> Callable[[Sections], Callable[[Path], Path]]:
    """Turn sections(rows, described, folder) into write(folder), which makes report.md of a folder's rows and config.json.

    The report begins with the command that made the rows, and the versions of torch and of these packages.
    """

    def decorated(sections: Sections) -> Callable[[Path], Path]:
        @functools.wraps(sections)
        def written(folder: Path) -> Path:
            described = read_config(folder)
            found = sections(read_rows(folder / "rows.jsonl"), described, folder)
            return write(folder, title, [made_by(described, *packages), *found])

        return written

    return decorated
