"""HyperAnderson in many configurations at equal budget, on validation problems: our strongest learned rival."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from experiments.bench import measure, report, runner
from experiments.bench.measure import Rules
from experiments.bench.options import Compared, OnFamily, Seeded, Unrolled
from experiments.bench.runner import Row, at_least_one, digest, known, read_rows, row_files
from experiments.bench.solvers import JUDGED, contestant
from experiments.configs.hyper_anderson import VARIANTS, overrides
from experiments.meta import Job, Meta
from metabroyden.comparison.statistics import Outcome
from metabroyden.comparison.tables import Table, chosen, listed


@dataclass(frozen=True)
class TuneHyper(Seeded, Unrolled, Compared, OnFamily, command="tune-hyper", results=Path("results/meta")):
    """Try HyperAnderson's configurations on the validation problems of a family; the test split is not read."""

    steps: int = 600
    """Outer steps of 10 solver iterations each; longer unrolls get as many iterations in fewer steps."""
    only: tuple[str, ...] = ()
    """Names of the configurations to try; all where none is given."""


def run(config: TuneHyper) -> None:
    """Train and measure what has not been yet; the report is written after each configuration."""
    known("configuration", config.only, VARIANTS)
    at_least_one(config, "steps")
    job, rows = runner.Run(config, free=("family", "only", "backend", "models"), always=f"--family {config.family}"), []
    names = config.only or tuple(VARIANTS)
    for number, name in enumerate(names, 1):
        rows += _rows(config, name, job)
        runner.publish(job.folder / "hyper-anderson-tuning" / config.family, rows, job.described())
        path = write(job.folder)
        Console().print(f"{config.family}: {number} of {len(names)} configurations: {name}")
    runner.show(path)


def _rows(config: TuneHyper, name: str, run: runner.Run) -> list[Row]:
    """One configuration, trained and measured; those of an earlier sitting where they are there."""
    recipe = overrides(name, 10 * config.steps)
    objective = recipe.pop("objective")
    meta = Meta(
        family=config.family, solver="hyper-anderson", seed=config.seed, budget=config.budget, samples=config.samples,
        objective=objective, backend=config.backend, models=config.models, runs=config.runs, progress=config.progress,
        overwrite=config.overwrite,
    )  # fmt: skip
    job = Job(meta, recipe)

    def rows() -> list[Row]:
        one, held = contestant(name, job.trained(), config.seed), job.family.problems("validation", config.samples)
        told = {"objective": objective, "steps": recipe["steps"], "unroll": recipe["unroll"]}
        taken = {key: one.solver.summary[key] for key in ("seconds", "skipped_steps")}
        trained = {"row": "trained", "solver": name, "config": asdict(one.solver.config), "recipe": told, **taken}
        return [trained, *measure.measure(held, [one], Rules(JUDGED, config.budget))]

    return run.unit(f"{config.family}-{digest(name, recipe, job.family.path)}", rows)


def write(folder: Path) -> Path:
    """hyper-anderson-tuning.md over all families tried, from rows alone."""
    words = (
        "Each trained for as many solver iterations, on the same batches; the weights kept are those that did best on "
        "validation. Sorted by the geometric mean of evaluations to 1e-2 and 1e-3. Median evaluations (share solved), mean; "
        "a failure counts as the budget. The test split was not read."
    )
    sections: list[report.Section] = [words]
    for path in row_files(folder / "hyper-anderson-tuning", "*/rows.jsonl"):
        sections += [table(path.parent.name, read_rows(path)), report.made_by(report.read_config(path.parent))]
    return report.write(
        folder, "HyperAnderson: configurations on validation problems", sections, name="hyper-anderson-tuning"
    )


def table(family: str, rows: list[Row]) -> Table:
    """A configuration a line, the best first."""

    def outcome(row: Row, at: float) -> Outcome:
        return Outcome.of(chosen(rows, "solve", solver=row["solver"], tolerance=at))

    def mean(row: Row) -> float:
        return float(np.exp(np.mean([np.log(outcome(row, at).evaluations).mean() for at in JUDGED])))

    def to(at: float) -> Callable[[Row], str]:
        return lambda row: "{0}, {0.mean:.1f}".format(outcome(row, at))

    return listed(family, sorted(chosen(rows, "trained"), key=mean), [
        ("", "{solver}"),
        ("geometric mean", lambda row: f"{mean(row):.2f}"),
        *((f"to {at:g}", to(at)) for at in JUDGED),
        ("training", "{recipe[steps]} × {recipe[unroll]}"),
        ("took", "{seconds:.0f} s"),
    ])  # fmt: skip
