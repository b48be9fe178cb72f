"""A report: front matter, tables, figures, and a conclusion that a person wrote."""

from __future__ import annotations

import base64
import functools
import html
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.bench.runner import Row, read_rows, row_files
from experiments.bench.tables import Table, inline
from metabroyden.storage import atomic_write

CONCLUSION = "conclusion.md"
"""Kept beside a report and put into it: code states figures, a person draws conclusions."""
Section = str | Table | Path
Sections = Callable[[list[Row], Row, Path], list[Section]]
_PAGE = Path(__file__).with_name("page.html")
_LINK = r"\[([^]]+)\]\([^)]+\)"


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


def write(folder: Path, title: str, sections: Sequence[Section], *, name: str = "report") -> Path:
    """Write report.md: paragraphs, tables under their words, figures (PNG files below the folder), the conclusion.

    Args:
        folder: of the results.
        title: the heading.
        sections: paragraphs, `Table`s and files of figures in their order; empty ones are left out.
        name: of the file, without its ending; the conclusion of any other than "report" is NAME-conclusion.md.
    """
    parts = [f"# {title}"]
    conclusion = folder / (CONCLUSION if name == "report" else f"{name}-{CONCLUSION}")
    if conclusion.exists():
        parts.append(conclusion.read_text().strip())
    parts += [text for section in sections if (text := _markdown(folder, section))]
    return atomic_write(folder / f"{name}.md", "\n\n".join(parts) + "\n")


def _markdown(folder: Path, section: Section) -> str:
    if isinstance(section, Path):
        return f"![{section.stem}]({section.relative_to(folder)})"
    if isinstance(section, Table):
        heading = [f"## {section.words}"] if section.words else []
        return "\n\n".join([*heading, str(section)]) if section.body else ""
    return section


def write_page(folder: Path, title: str, sections: Sequence[Section]) -> Path:
    """Write report.html: one file with all tables, sortable, and figures, zoomable; it loads nothing from elsewhere."""
    words = [section for section in sections if isinstance(section, str)]
    figures = [section for section in sections if isinstance(section, Path)]
    tables = [section for section in sections if isinstance(section, Table) and section.body]
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{inline(re.sub(_LINK, _unlinked, text))}</p>" for text in words)]
    parts += ["<h2>Figures</h2>", *map(_figure, figures), *(table.html() for table in tables)]
    return atomic_write(folder / "report.html", _PAGE.read_text().replace("<!-- content -->", "\n".join(parts)))


def _unlinked(link: re.Match[str]) -> str:
    return link[1]


def _figure(path: Path) -> str:
    data, name = base64.b64encode(path.read_bytes()).decode(), html.escape(path.stem)
    caption = f"{name}: click to enlarge, wheel and drag to move, Escape to close"
    image = f'<img src="data:image/png;base64,{data}" alt="{name}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
