"""What a row of the race is: its schema, checked whenever rows are written."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from experiments.bench.runner import read_rows, row_files, write_rows
from metabroyden.solution import Status

Row = dict[str, Any]
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
_BY_SAMPLE = ("evaluations", "residual", "status", "distance", "score", "agrees")
KINDS = ("classical", "started", "learned", "peer")
"""Classical solvers of ours; the same from the learned start; learned ones; other libraries'."""
PARTS = ("families", "outside", "ablation", "transfer", "horizon", "hyper-deq")
"""The race itself; inputs and cells of another kind; MetaBroyden without its pieces; solvers of other families; curves past
the trained horizon; another library's learned solver."""
LETTERS = {Status.CONVERGED: "C", Status.MAX_NFE: "B", Status.NON_FINITE: "N", Status.STALLED: "S"}
"""Of a sample's status, in a row: converged, budget, not finite, stalled."""

_NUMBER, _WORDS, _COUNT = {"type": "number"}, {"type": "string"}, {"type": "integer", "minimum": 0}
_MAYBE = {"type": ["number", "null"]}
_SERIES = {"type": "array", "items": _NUMBER}
_SECONDS = {
    "type": "object",
    "properties": {"total": _NUMBER, "f": _MAYBE, "solver": _NUMBER, "bookkeeping": _NUMBER},
    "required": ["total", "f", "solver", "bookkeeping"],
    "additionalProperties": False,
}


def _kind(name: str, title: str, **properties: Any) -> dict[str, Any]:
    every = {
        "row": {"const": name},
        "part": {"enum": list(PARTS)},
        "family": _WORDS,
        "solver": _WORDS,
        "kind": {"enum": list(KINDS)},
        "seed": {"type": ["integer", "null"], "description": "meta-seed of a learned solver"},
        "config": {"type": "string", "pattern": "^[0-9a-f]{8}$", "description": "hash of the race's settings"},
        "commit": _WORDS,
        **properties,
    }
    return {
        "title": title,
        "type": "object",
        "properties": every,
        "required": list(every),
        "additionalProperties": False,
    }


SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "A row of the race",
    "oneOf": [
        _kind(
            "solve",
            "One solver on one block of samples to one tolerance",
            options={"type": "string", "description": "the solver's options, or the hash of a learned one's file"},
            tolerance=_NUMBER,
            budget=_COUNT,
            block=_COUNT,
            evaluations={"type": "array", "items": _COUNT, "description": "by sample; the budget where it failed"},
            residual={"type": "array", "items": _MAYBE, "description": "by sample, the smallest seen"},
            status={"type": "string", "pattern": "^[CBNS]*$", "description": "a letter a sample"},
            distance={"type": "array", "items": _MAYBE, "description": "by sample, relative, to the float64 equilibrium"},
            score={"type": "array", "items": _MAYBE, "description": "of the task, by sample; null: no finite state"},
            agrees={"type": "array", "items": _MAYBE, "description": "by sample, predictions that are the float64's"},
            handed_over={**_COUNT, "description": "samples that a safeguard took from a learned solver"},
            seconds={"type": "array", "items": _SECONDS, "description": "of whole solves of the block, one a round"},
            peak_bytes={"type": ["integer", "null"], "description": "of tensors alive at once in this solve"},
        ),
        _kind(
            "curve",
            "Quartiles over samples of the smallest residual so far, on the way to the tightest tolerance",
            evaluations={"type": "array", "items": _COUNT},
            low=_SERIES,
            median=_SERIES,
            high=_SERIES,
            seconds={**_SERIES, "description": "since the solve of the first block began"},
            by_time={**_SERIES, "description": "median over its samples by then"},
        ),
        _kind(
            "path",
            "Where one solve of the first sample goes: its iterates minus the equilibrium, in a plane shared by all paths",
            along={**_SERIES, "description": "first principal component of all paths' iterates"},
            across={**_SERIES, "description": "second"},
            residual={"type": "array", "items": _MAYBE},
        ),
        _kind(
            "depth",
            "The task's mean score after so many evaluations",
            evaluations=_COUNT,
            samples=_COUNT,
            score=_NUMBER,
        ),
        _kind(
            "pace",
            "Time of solves that stop after so many evaluations",
            evaluations=_COUNT,
            enough={"type": "boolean", "description": "whether so many bring the score to the equilibrium's for good"},
            seconds={"type": "array", "items": _NUMBER, "description": "of one block, one a round"},
        ),
        _kind(
            "leak",
            "How far a language model's earlier predictions move when later tokens are replaced",
            tolerance=_NUMBER,
            mean={**_NUMBER, "description": "bits"},
            most={**_NUMBER, "description": "bits"},
        ),
        _kind(
            "horizon",
            "A learned solver against its own fallback, far beyond the steps it was trained on",
            tolerance=_NUMBER,
            steps=_COUNT,
            samples=_COUNT,
            fallback={**_COUNT, "description": "samples that the fallback solves in so many evaluations"},
            learned={**_COUNT, "description": "samples that the learned solver solves in as many"},
            lost={**_COUNT, "description": "of them, those that the learned solver does not"},
            broken={**_COUNT, "description": "nor with what it had spent before the hand-over on top"},
            triggered=_COUNT,
        ),
        _kind("training", "What the meta-training of a solver took", cpu_seconds=_NUMBER, steps=_COUNT),
        _kind(
            "tuned",
            "How a classical solver did on the validation problems on which it was tuned",
            options=_WORDS,
            tolerance=_NUMBER,
            median=_NUMBER,
            success=_NUMBER,
        ),
        _kind(
            "star",
            "The equilibria that solvers are held against",
            samples=_COUNT,
            known={**_COUNT, "description": "samples whose float64 equilibrium was found"},
            score={"type": "array", "items": _NUMBER, "description": "by sample, of the task"},
            higher_is_better={"type": "boolean"},
        ),
    ],
}  # fmt: skip
"""JSON Schema of a row. Keys "row", "part", "family", "solver" say which it is; a row of equilibria has solver "float64"."""


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

    return {kind["properties"]["row"]["const"]: Draft202012Validator(kind) for kind in SCHEMA["oneOf"]}


def write(path: Path, rows: Iterable[Row]) -> None:
    """Check rows and write them, one a line; the file is replaced whole or not at all."""
    write_rows(path, map(check, rows), strict=True)


def read(folder: Path) -> list[Row]:
    """All rows of a folder's *.jsonl, which `write` has checked; ValueError names file and line of what is no row at all."""
    rows: list[Row] = []
    for path in row_files(folder):
        for number, row in enumerate(read_rows(path), 1):
            if _name(row) not in _validators():
                raise ValueError(f"{path}, line {number}: no row of the race")
            rows.append(row)
    if not rows:
        raise ValueError(f"no rows of a race in {folder}: wanted *.jsonl as python -m experiments race writes them")
    return rows
