"""Tables as pivots of rows, in Markdown and HTML. Nothing here solves or judges."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

T = TypeVar("T")
Row: TypeAlias = dict[str, Any]
"""One measurement, as JSON holds it."""

Cell: TypeAlias = str | Callable[[T], object]
"""How a cell is made of an item: a format of its keys (of a group of rows: of the first one's), or a function."""


class Table(NamedTuple):
    """A table: what it tells, its header, its rows of cells."""

    words: str
    head: list[str]
    body: list[list[str]]

    def __str__(self) -> str:
        """As Markdown, without its words."""
        return markdown(self.head, self.body)

    def html(self) -> str:
        """As HTML, without its words; `code` and **bold** are the only markup of a cell."""
        header = "".join(f"<th><button>{inline(cell)}</button></th>" for cell in self.head)
        rows = "".join(f"<tr>{''.join(f'<td>{inline(cell)}</td>' for cell in row)}</tr>" for row in self.body)
        table = f"<table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>"
        return f'<div class="table">{table}</div>'


def pivot(
    words: str,
    rows: Sequence[T],
    index: Cell[T],
    columns: Cell[T],
    cell: str | Callable[[list[T]], str],
    *,
    corner: str = "",
) -> Table:
    """Rows by an index and a column key, both in the order in which they come; a cell from the rows at its place, or a
    format of the keys of the first of them.

    Examples:
        >>> rows = [{"family": "a", "solver": "x", "nfe": 3}, {"family": "b", "solver": "y", "nfe": 5}]
        >>> print(pivot("", rows, "{family}", "{solver}", lambda found: str(found[0]["nfe"])))
        |  | x | y |
        | --- | --- | --- |
        | a | 3 |  |
        | b |  | 5 |
    """
    places: dict[tuple[str, str], list[T]] = {}
    for row in rows:
        places.setdefault((_text(index, row), _text(columns, row)), []).append(row)
    names, heads = (list(dict.fromkeys(place[side] for place in places)) for side in (0, 1))
    made = (lambda found: _text(cell, found[0])) if isinstance(cell, str) else cell
    body = [[name, *(made(places[name, head]) if (name, head) in places else "" for head in heads)] for name in names]
    return Table(words, [corner, *heads], body)


def listed(words: str, items: Iterable[T], columns: Sequence[tuple[str, Cell[T]]]) -> Table:
    """A row an item, which is a row of measurements, a name or whatever; a cell from a format of keys, or a function.

    Examples:
        >>> rows = [{"solver": "x", "seconds": 0.25}, {"solver": "y", "seconds": 2}]
        >>> print(listed("", rows, [("solver", "{solver}"), ("time", lambda row: f"{1e3 * row['seconds']:.0f} ms")]))
        | solver | time |
        | --- | --- |
        | x | 250 ms |
        | y | 2000 ms |
    """
    return Table(words, [head for head, _ in columns], [[_text(of, item) for _, of in columns] for item in items])


def _text(of: Cell[T], item: T) -> str:
    if isinstance(of, str):
        return of.format_map(item[0] if isinstance(item, list) else item)  # type: ignore[arg-type]
    return str(of(item))


def chosen(rows: Iterable[dict[str, Any]], kind: str, **wanted: Any) -> list[dict[str, Any]]:
    """Rows of one kind with these values."""
    return [row for row in rows if row["row"] == kind and all(row[key] == value for key, value in wanted.items())]


def mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    """Of one number of every row."""
    return float(np.mean([row[key] for row in rows]))


def grouped(rows: Iterable[dict[str, Any]], *keys: str) -> list[list[dict[str, Any]]]:
    """Rows that agree under these keys, in the order in which they come."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return list(found.values())


def means(rows: Iterable[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """A row for each group of `grouped`: its first, with the means of all floats that are no keys."""
    return [
        {key: mean(of, key) if isinstance(value, float) and key not in keys else value for key, value in of[0].items()}
        for of in grouped(rows, *keys)
    ]


def scaled(rows: Iterable[dict[str, Any]], factor: float, *keys: str) -> list[dict[str, Any]]:
    """Rows with the numbers under these keys in another unit."""
    return [{**row, **{key: factor * row[key] for key in keys}} for row in rows]


def markdown(head: Sequence[object], body: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def text_table(table: Table) -> str:
    """A table for a terminal, under its words: the first column left-aligned, the others right-aligned.

    Examples:
        >>> print(text_table(Table("Two", ["solver", "median"], [["Broyden", "21"], ["ours", "8"]])))
        Two
        solver   median
        Broyden      21
        ours          8
    """
    widths = [max(map(len, column)) for column in zip(table.head, *table.body, strict=True)]
    lines = [table.words] if table.words else []
    for line in (table.head, *table.body):
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        lines.append("  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join(lines)


def inline(text: str) -> str:
    """Text as HTML; `code` and **bold** are the only markup."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def number(value: float | None, spec: str = ".2f") -> str:
    """A number by a format; nothing for None and NaN."""
    return "" if value is None or np.isnan(value) else f"{value:{spec}}"


def middle(values: Iterable[float | None]) -> float:
    """The median of those that are numbers; NaN where there are none."""
    found = [value for value in values if value is not None]
    return float(np.median(found)) if found else float("nan")


def short(value: Any) -> Any:
    """Numbers to five significant digits, in lists, tuples (made lists) and values of dicts too."""
    if isinstance(value, list | tuple):
        return [short(item) for item in value]
    if isinstance(value, dict):
        return {key: short(item) for key, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value
