"""What a row of the race is: configs/race-schema.json, of which a copy lies beside the rows."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from experiments.bench.runner import Row, read_rows, row_files

PATH = Path(__file__).parents[1] / "configs" / "race-schema.json"
"""JSON Schema of a row. Keys "row", "part", "family", "solver" say which it is; a row of equilibria has solver "float64"."""
PARTS = ("families", "outside", "hyper-deq")
"""The race itself; inputs of another kind and wrong weights; another library's learned solver."""
_BY_SAMPLE = ("evaluations", "residual", "status", "distance", "score", "agrees")


def check(row: Row) -> Row:
    """The row; ValueError that names what is wrong with one that the schema does not know."""
    kinds = _kinds()
    if row.get("row") not in kinds:
        raise ValueError(f"a row of the race has a key 'row', one of {', '.join(kinds)}; got {row.get('row')!r}")
    for error in kinds[row["row"]].iter_errors(row):
        where = "/".join(map(str, error.absolute_path)) or "the row"
        raise ValueError(f"not a {row['row']!r} row of the race: {where}: {error.message}")
    sizes = {name: len(row[name]) for name in _BY_SAMPLE if row["row"] == "solve"}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"a row's lists by sample must be as long as each other, got {sizes}")
    return row


@cache
def _kinds() -> dict[str, Any]:
    from jsonschema import Draft202012Validator

    kinds = json.loads(PATH.read_text())["oneOf"]
    return {kind["properties"]["row"]["const"]: Draft202012Validator(kind) for kind in kinds}


def read(folder: Path) -> list[Row]:
    """All rows of a race in a folder; ValueError where there are none, with file and line where one is no JSON."""
    rows = [row for path in row_files(folder) for row in read_rows(path)]
    if not rows:
        raise ValueError(f"no rows of a race in {folder}: wanted *.jsonl.gz as python -m experiments race writes them")
    return rows
