"""Reports of tables, figures and paragraphs: in Markdown, and as one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metabroyden.comparison.tables import Table, inline
from metabroyden.storage import atomic_write

CONCLUSION = "conclusion.md"
"""Kept beside a report and put into it: code states figures, a person draws conclusions."""
_PAGE = Path(__file__).with_name("page.html")
_LINK = r"\[([^]]+)\]\([^)]+\)"


class Picture(NamedTuple):
    """A figure's PNG file and the caption that says what to see in it."""

    path: Path
    caption: str


class Folded(NamedTuple):
    """Sections that a reader opens, such as tables for each tolerance; some of them may be folded themselves."""

    title: str
    sections: Sequence[Any]


Section = str | Table | Path | Picture | Folded
"""A paragraph (which may begin with a line "## heading"), a table, a figure, or several folded away."""


def write(folder: Path, title: str, sections: Sequence[Section], *, name: str = "report") -> Path:
    """Write report.md: paragraphs, tables under their words, figures (PNG files below the folder), the conclusion.

    Args:
        folder: of the results.
        title: the heading.
        sections: in their order; empty ones are left out.
        name: of the file, without its ending; the conclusion of any other than "report" is NAME-conclusion.md.

    Returns:
        The file's path.
    """
    parts = [f"# {title}"]
    conclusion = folder / _conclusion(name)
    if conclusion.exists():
        parts.append(conclusion.read_text(encoding="utf-8").strip())
    parts += [text for section in sections if (text := _markdown(folder, section))]
    return atomic_write(folder / f"{name}.md", "\n\n".join(parts) + "\n")


def _conclusion(name: str) -> str:
    return CONCLUSION if name == "report" else f"{name}-{CONCLUSION}"


def _markdown(folder: Path, section: Section) -> str:
    if isinstance(section, Folded):
        inside = "\n\n".join(text for one in section.sections if (text := _markdown(folder, one)))
        return f"<details>\n<summary>{inline(section.title)}</summary>\n\n{inside}\n\n</details>"
    if isinstance(section, Picture):
        return f"![{section.path.stem}]({section.path.relative_to(folder).as_posix()})\n\n*{section.caption}*"
    if isinstance(section, Path):
        return f"![{section.stem}]({section.relative_to(folder).as_posix()})"
    if isinstance(section, Table):
        heading = [f"## {section.words}"] if section.words else []
        return "\n\n".join([*heading, str(section)]) if section.body else ""
    return section


def write_page(folder: Path, title: str, sections: Sequence[Section], *, name: str = "report") -> Path:
    """Write report.html: one file with the conclusion, a table of contents, all tables, sortable, and all figures, zoomable.

    Args:
        folder: of the results.
        title: the heading.
        sections: in their order.
        name: of the file, without its ending.

    Returns:
        The file's path.
    """
    page, conclusion = _Page(), folder / _conclusion(name)
    opening = [conclusion.read_text(encoding="utf-8")] if conclusion.exists() else []
    body = "\n".join(part for section in (*opening, *sections) for part in page.html(section))
    links = "".join(f'<li><a href="#{key}">{words}</a></li>' for key, words in page.headings)
    contents = f"<nav><ul>{links}</ul></nav>\n" if len(page.headings) > 2 else ""
    text = _PAGE.read_text(encoding="utf-8").replace("<!-- title -->", html.escape(title))
    before, heading, rest = body.partition("<h2")
    whole = f"<h1>{html.escape(title)}</h1>\n{before}{contents}{heading}{rest}"
    return atomic_write(folder / f"{name}.html", text.replace("<!-- content -->", whole))


class _Page:
    """Sections as HTML, and the headings among them: (anchor, words)."""

    def __init__(self) -> None:
        self.headings: list[tuple[str, str]] = []

    def html(self, section: Section) -> Iterator[str]:
        if isinstance(section, Folded):
            inside = "\n".join(part for one in section.sections for part in _Page().html(one))
            yield f'<details id="{self._anchor(section.title)}"><summary>{inline(section.title)}</summary>{inside}</details>'
        elif isinstance(section, Table):
            yield from (self._heading(section.words), section.html()) if section.body else ()
        elif isinstance(section, Path):
            yield _figure(section, section.stem)
        elif isinstance(section, Picture):
            yield _figure(section.path, section.caption)
        else:
            yield from self._paragraphs(section)

    def _paragraphs(self, text: str) -> Iterator[str]:
        for paragraph in re.split(r"\n\s*\n", text.strip()):
            if paragraph.startswith("## "):
                yield self._heading(paragraph[3:])
            elif paragraph.startswith("```"):
                yield f"<pre>{html.escape(paragraph.strip('`').strip())}</pre>"
            elif paragraph:
                yield f"<p>{inline(re.sub(_LINK, _unlinked, paragraph))}</p>"

    def _heading(self, words: str) -> str:
        return f'<h2 id="{self._anchor(words)}">{inline(words)}</h2>' if words else ""

    def _anchor(self, words: str) -> str:
        key = f"section-{len(self.headings) + 1}"
        self.headings.append((key, inline(words)))
        return key


def _unlinked(link: re.Match[str]) -> str:
    return link[1]


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{html.escape(path.stem)}">'
    return f"<figure>{image}<figcaption>{inline(caption)}</figcaption></figure>"
