"""Physics beside DEQs: power flow, water networks and self-consistent fields, solved as they are by the universal solver."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

import metabroyden as mb
from experiments.bench import solvers
from experiments.bench.options import Compared
from experiments.bench.runner import Row, Run, at_least_one, known, threads
from experiments.physics.parts import PACKAGES, library
from experiments.physics.report import write
from experiments.physics.suite import SUITE
from metabroyden.comparison.measure import Rules, measure, stamp_of
from metabroyden.progress import ticks
from metabroyden.state import Packing

TOLERANCES = (1e-3, 1e-6)


@dataclass(frozen=True)
class Physics(Compared, command="physics", samples=8, budget=100):
    """Count evaluations of the universal solver, of classical ones and of each field's own on problems of physics."""

    only: tuple[str, ...] = tuple(SUITE)
    """Which problems, by name."""


def run(config: Physics) -> None:
    """The whole job, some minutes. Interrupted, it goes on with the next problem."""
    at_least_one(config, "samples", "budget")
    known("problem", config.only, SUITE)
    for kind in {SUITE[name].kind for name in config.only}:
        library(PACKAGES[kind])
    job, rows = Run(config, shared=("only",), inputs=TOLERANCES), list[Row]()
    with ticks("physics", len(config.only), show=config.progress) as done, threads(1), torch.no_grad():
        for name in config.only:
            rows += job.unit(name, lambda: measured(config, name))  # noqa: B023 (called at once)
            done(name)
    job.finish(rows, write)


def measured(config: Physics, name: str) -> list[Row]:
    """The rows of one problem set; classical solvers are tuned on other samples of it."""
    kind, problems, own = SUITE[name]
    held, apart = replace(problems(config.samples, "test"), name=name), problems(config.samples, "validation")
    tuned = solvers.grids.tuned_solvers(apart.f, apart.z0, apart.x, budget=config.budget, tolerances=TOLERANCES)
    plain = {"Picard": mb.Picard(), "Anderson": mb.Anderson(), "Broyden": mb.Broyden(config.budget)}
    universal = solvers.universal()
    universal.solver.double()
    everyone = [*solvers.contestants(**plain, **tuned), universal, own(config.samples)]
    rules = Rules(TOLERANCES, config.budget, block=config.samples)
    size = Packing.of(held.z0).pack(held.z0).shape[1]
    return measure(held, everyone, rules, stamp_of(held, physics=kind, size=size))
