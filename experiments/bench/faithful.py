"""Remakes published tables from the committed rows and compares every cell: `python -m experiments.bench.faithful`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from experiments import generalise
from experiments.bench.runner import read_rows
from experiments.bench.statistics import Field
from experiments.bench.tables import Table
from experiments.race import report as race
from experiments.race import schema
from experiments.solvers import report as solvers

RESULTS = Path("results")


def remade() -> Iterable[tuple[str, Table]]:
    """(experiment, table): the race's medians, ratios and means, two of other experiments."""
    field = Field(schema.read(RESULTS / "race" / "rows"), "families")
    for tolerance in race.SHOWN:
        yield "race", race.main_table(field, tolerance)
    yield "race", race.means_table(field)
    rows = read_rows(RESULTS / "solvers" / "rows.jsonl")
    yield from (("solvers", solvers.race_table(rows, method)) for method in ("Broyden", "Anderson", "Picard"))
    rows = read_rows(RESULTS / "generalise" / "rows.jsonl")
    yield "generalise", generalise.over_broyden("Families never seen", Field(rows, "families unseen"))


def published(experiment: str) -> list[list[str]]:
    """The lines of all tables of a report, as cells."""
    lines = (RESULTS / experiment / "report.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def compared(table: Table, lines: list[list[str]]) -> tuple[int, list[str]]:
    """(cells, those that differ, in words); the published table begins at the line that equals the header."""
    places = [at for at, line in enumerate(lines) if line == [cell.strip() for cell in table.head]]
    if not places:
        return 0, [f"{table.words}: no such table was published"]
    every = [lines[at + 2 : at + 2 + len(table.body)] for at in places]
    found = [[f"{table.words}: {new[0]}: {old!r} → {now!r}" for before, new in zip(one, table.body, strict=False)
              for old, now in zip(before, new, strict=False) if old != now.strip()] for one in every]  # fmt: skip
    return sum(map(len, table.body)), min(found, key=len)


def main() -> None:
    """Print how many cells there are, and which differ; exit status 1 where some do."""
    total, differ = 0, list[str]()
    for experiment, table in remade():
        count, words = compared(table, published(experiment))
        total, differ = total + count, [*differ, *words]
        print(f"{experiment}: {table.words}: {count} cells, {len(words)} differ", flush=True)
    print("\n".join([f"{total} cells, {len(differ)} differ", *differ]))
    raise SystemExit(bool(differ))


if __name__ == "__main__":
    main()
