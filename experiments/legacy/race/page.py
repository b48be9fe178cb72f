"""report.html: one file with all tables, sortable, and all figures, zoomable; nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

from metabroyden.storage import atomic_write

Table = tuple[str, list[str], list[list[str]]]
_TEMPLATE = Path(__file__).with_name("page.html")


def write(path: Path, lead: Sequence[str], figures: Sequence[Path], tables: Sequence[Table]) -> Path:
    """Write the page: paragraphs, PNG files, tables as in `report.tables`; `code` and **bold** are the only markup."""
    parts = ["<h1>The race</h1>", *(f"<p>{_inline(words)}</p>" for words in lead), "<h2>Figures</h2>"]
    parts += [_figure(figure) for figure in figures]
    parts += [_table(*table) for table in tables]
    page = _TEMPLATE.read_text().replace("<!-- content -->", "\n".join(parts))
    return atomic_write(path, page)


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def _figure(path: Path) -> str:
    data, name = base64.b64encode(path.read_bytes()).decode(), html.escape(path.stem)
    image = f'<img src="data:image/png;base64,{data}" alt="{name}">'
    caption = f"{name}: click to enlarge, wheel and drag to move, Escape to close"
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _table(words: str, head: list[str], body: list[list[str]]) -> str:
    header = "".join(f"<th><button>{_inline(cell)}</button></th>" for cell in head)
    rows = "".join(f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in body)
    table = f"<table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<h2>{_inline(words)}</h2><div class="table">{table}</div>'
