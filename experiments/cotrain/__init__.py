"""A trained DEQ and its root finder, trained on together: score and evaluations before and after, beside equal training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from experiments.bench.options import Compared, OnModels
from experiments.bench.problems import Family
from experiments.bench.runner import Row, Run, at_least_one, known, publish, show
from experiments.cotrain.report import write
from experiments.cotrain.rows import measured
from experiments.cotrain.variants import CO_TRAINED, CONTINUED, FAMILIES, ORIGINAL, PENALISED, Variant
from metabroyden.progress import ticks


@dataclass(frozen=True)
class Cotrain(Compared, OnModels, command="cotrain"):
    """Fine-tune trained DEQs with their root finders, and as long without; results/cotrain/FAMILY/."""

    family: str = "conv-digits"
    """One of the families in experiments/cotrain/variants.py."""
    seeds: int = 3
    """Fine-tunings of each kind; measured on held-out samples, of texts on half as many windows."""
    steps: int | None = None
    """Training steps of each; None: as many as take about 15% of the original training's time."""
    penalties: tuple[float, ...] = (1.0, 3.0)
    """Weights of the Jacobian penalty that are tried beside it; first seed alone."""
    weights: tuple[float, ...] = (0.02, 0.2)
    """Weights of the residuals, held fast, of the figure of score and evaluations; first seed alone."""


def run(config: Cotrain) -> None:
    """Some three minutes a variant, the costly ones up to ten. Interrupted, it goes on with the next one."""
    at_least_one(config, "seeds", "steps", "samples", "budget")
    known("family", [config.family], FAMILIES)
    family = Family(config.family, config.models)
    grids = ("seeds", "penalties", "weights")
    job = Run(
        config, free=("family", "models", *grids), shared=("models", *grids), inputs=family.inputs,
        always=" ".join([f"--family {config.family}", *_told(config, grids)]),
    )  # fmt: skip
    rows: list[Row] = []
    wanted = list(_variants(config))
    with ticks(f"co-training, {config.family}", len(wanted), show=config.progress) as done:
        for variant in wanted:
            rows += job.unit(variant.key, lambda: measured(config, family, variant))  # noqa: B023 (called at once)
            done(variant.key)
    publish(job.folder / config.family, rows, job.described())
    show(write(job.folder))


def _told(config: Cotrain, names: tuple[str, ...]) -> list[str]:
    """Options of these names that are not the usual ones, as the command line has them."""
    given = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(Cotrain, name)}
    every = {name: value if isinstance(value, tuple) else (value,) for name, value in given.items()}
    return [" ".join([f"--{name}", *(f"{one:g}" for one in value)]) for name, value in every.items()]


def _variants(config: Cotrain) -> Iterator[Variant]:
    usual: dict[str, Any] = {"steps": config.steps or FAMILIES[config.family].steps}
    yield Variant(ORIGINAL, 0, steps=0)
    for seed in range(config.seeds):
        yield Variant(CO_TRAINED, seed, **usual)
        yield Variant(CONTINUED, seed, **usual)
    for weight in config.penalties:
        yield Variant(PENALISED, 0, weight=weight, **usual)
    for weight in config.weights:
        yield Variant(CO_TRAINED, 0, weight=weight, **usual)
