"""What a row of the race is: results/race/schema.json, checked whenever rows are written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from experiments.bench.runner import Row, read_rows, write_rows

PATH = Path(__file__).parents[1] / "configs" / "race-schema.json"
"""JSON Schema of a row. Keys "row", "part", "family", "solver" say which it is; a row of equilibria has solver "float64"."""
PARTS = ("families", "outside", "ablation", "transfer", "horizon", "hyper-deq")
"""The race itself; inputs and cells of another kind; MetaBroyden without its pieces; solvers of other families; curves past
the trained horizon; another library's learned solver."""
_BY_SAMPLE = ("evaluations", "residual", "status", "distance", "score", "agrees")


def check(row: Row) -> Row:
    """The row; ValueError that names what is wrong with one that the schema does not know."""
    validator = _validators().get(_name(row))
    if validator is None:
        raise ValueError(f"a row of the race has a key 'row', one of {', '.join(_validators())}; got {_name(row)!r}")
    for error in validator.iter_errors(row):
        where = "/".join(map(str, error.absolute_path)) or "the row"
        raise ValueError(f"not a {row['row']!r} row of the race: {where}: {error.message}")
    if row["row"] == "solve":
        sizes = {name: len(row[name]) for name in _BY_SAMPLE}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"a row's lists by sample must be as long as each other, got {sizes}")
    return row


def _name(row: Any) -> Any:
    return row.get("row") if isinstance(row, dict) else None


@cache
def _validators() -> dict[str, Any]:
    from jsonschema import Draft202012Validator

    kinds = json.loads(PATH.read_text())["oneOf"]
    return {kind["properties"]["row"]["const"]: Draft202012Validator(kind) for kind in kinds}


def write(path: Path, rows: Iterable[Row]) -> None:
    """Check rows and write them; the file is replaced whole or not at all."""
    write_rows(path, map(check, rows), strict=True)


def read(folder: Path) -> list[Row]:
    """All rows in a folder, which `write` has checked; ValueError names file and line of what is no row at all."""
    rows: list[Row] = []
    for path in sorted((*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz"))):
        for number, row in enumerate(read_rows(path), 1):
            if _name(row) not in _validators():
                raise ValueError(f"{path}, line {number}: no row of the race")
            rows.append(row)
    if not rows:
        raise ValueError(f"no rows of a race in {folder}: wanted *.jsonl as python -m experiments race writes them")
    return rows
