"""Adapt the universal solver, or a family's, to a DEQ in a few steps, and measure it before and after."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from experiments.bench import measure, report, solvers
from experiments.bench.measure import Rules
from experiments.bench.options import Compared, OnFamily, Seeded
from experiments.bench.problems import Family
from experiments.bench.runner import Run, publish, sha256, show
from experiments.generalise import BROYDEN, TOLERANCE, over_broyden
from metabroyden import Broyden, load_solver, save_solver
from metabroyden.comparison.figures import axes, bars, save
from metabroyden.comparison.statistics import Field
from metabroyden.meta.specialise import SpecialiseConfig, specialise
from metabroyden.progress import progress_bar

FREE = ("family", "seed", "models")


@dataclass(frozen=True)
class Specialise(Seeded, Compared, OnFamily, command="specialise"):
    """Adapt a solver to a family's DEQ in a few outer steps; evaluations to 1e-2 on its test contexts before and after."""

    start: str = "universal"
    """What is adapted: a shipped solver's name or the path of a learned solver that fits the family."""
    steps: int = 20
    """Outer steps."""
    batch: int = 96
    """Contexts of a step."""
    unroll: int = 14
    """Solver steps that a step differentiates through."""
    learning_rate: float = 1e-2
    """Of Adam, linear to zero."""
    orthogonal_rate: float = 0.08
    """Of the matrices of initializer and preconditioner, linear to zero."""
    rank: int = 64
    """Inner channels of the preconditioner that a universal solver is given."""
    initializer_width: int = 64
    """Width of the initializer that it is given."""


def run(config: Specialise) -> None:
    """The whole job; twenty steps are done again rather than gone on with."""
    family, start = Family(config.family, config.models), load_solver(config.start)
    told = ("steps", "batch", "unroll", "learning_rate", "orthogonal_rate", "rank", "initializer_width", "seed")
    settings = SpecialiseConfig(**{name: getattr(config, name) for name in told})
    tasks = family.tasks(config.seed, pool=min(1024, config.steps * config.batch), held=settings.validation_size)
    with progress_bar(f"{config.family}, adapting", config.steps, show=config.progress) as bar:
        adapted = specialise(start, tasks, settings, progress=bar)
    tuned = solvers.tuned(family.problems("validation", 64), config.budget)
    everyone = solvers.contestants(**{BROYDEN: Broyden(config.budget), **tuned, "before": start, "after": adapted})
    held = replace(family.problems("test", config.samples), predict=None)
    rows = measure.measure(held, everyone, Rules((TOLERANCE,), config.budget), progress=config.progress)
    job = Run(config, free=FREE, shared=(), always=f"--family {config.family}")
    more = {"model_sha256": sha256(family.path), "parameters": sum(p.numel() for p in adapted.parameters())}
    folder = publish(job.folder / config.family / f"seed{config.seed}", rows, job.described(**more))
    save_solver(adapted, folder / "solver.safetensors")
    show(write(job.folder))


def write(folder: Path) -> Path:
    """report.md and specialise.png over all families and seeds in a folder, from rows alone."""
    words = (
        "`python -m experiments specialise --family NAME`: a few outer steps on a DEQ's training contexts. Median "
        "evaluations to 1e-2 on its test contexts (share solved), ratio to Broyden's with full memory; before: the solver "
        "that was adapted."
    )
    rows, runs = [], []
    for described, found in report.runs_below(folder, "*/*/rows.jsonl"):
        name = "{family}, {steps} steps from {start}, seed {seed}".format_map(described["config"])
        rows += [{**row, "family": name} for row in found]
        commit = described["provenance"]["commit"]
        runs.append(f"- {name}: `{described['command']}`, {described['parameters']:,} parameters, commit {commit}")
    field = Field(rows)

    def over(family: str, name: str) -> float:
        return field.over(family, name, BROYDEN, TOLERANCE).value

    figure, place = axes(max(6.4, 1.2 * len(field.families)), ylabel="evaluations to 1e-2 over Broyden's")
    bars(place, field.families, ("before", "after"), over)
    place.axhline(1, color="0.4", linewidth=1)
    place.legend(frameon=False)
    drawn = save(figure, folder / "specialise.png")
    return report.write(folder, "Specialisation", [words, "\n".join(runs), over_broyden("", field), drawn])
