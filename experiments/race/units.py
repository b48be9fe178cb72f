"""What is raced on: a family of models, with its inputs as they are and changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from experiments.bench import measure, problems, runner, solvers
from experiments.bench.measure import Rules, Stamp
from experiments.bench.problems import Family, HeldOut
from experiments.bench.runner import Row
from experiments.bench.solvers import Contestant
from experiments.race import fitted
from metabroyden.comparison.figures import FLAGSHIP
from metabroyden.comparison.tables import short
from metabroyden.solve import solve
from metabroyden.zoo.data.bible import load_bible

TOLERANCES, CLOCKED = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5), (1e-2, 1e-3)
DEPTHS = range(1, 41)
PACES = (1, 2, 3, 5, 8, 12, 20, 30)
"""Evaluations after which solves are stopped to be timed, of the solvers that figures show."""
TIMED = (FLAGSHIP, "grouped", "hyper-anderson", "tuned Picard", "tuned Anderson", "Broyden", "Peaceman-Rachford")
NEAR = {"accuracy": 0.005, "bits": 0.01}
"""How far from the equilibrium's score counts as equal."""
WRONG = "wrong weights"
"""Solvers whose weights are in another order, on the family's own inputs."""
RIVALS = ("grouped", "hyper-anderson")
"""Other learned solvers, from results/meta, where they were trained."""


class Unit(NamedTuple):
    """A piece of the race: its name, the name with a hash of what it is made from, and what makes its rows.

    That is given a folder for what is wanted again after an interruption.
    """

    name: str
    key: str
    make: Callable[[Path], list[Row]]


@dataclass(frozen=True)
class Setting:
    """A race's options, where it runs, and the hash of its settings."""

    config: Any
    device: torch.device
    digest: str

    def unit(self, name: str, make: Callable[[Path], list[Row]], files: Iterable[Path] = (), also: str = "") -> Unit:
        """A unit whose rows depend on files, the shipped universal solver and the versions of libraries."""
        versions = runner.provenance()["versions"]
        used = (solvers.universal().options, versions["torch"], versions["torchdeq"], also)
        return Unit(name, f"{name}-{runner.digest(used, *files)}", make)

    def family(self, name: str) -> Family:
        """A family of trained models, where the race runs."""
        return Family(name, self.config.models, self.device)

    def fits(self) -> Iterator[tuple[str, int, Path]]:
        """(family, seed, file) of every solver that `fit_solver` makes, the largest models first."""
        for name in sorted(self.config.families, key=lambda name: -self.family(name).path.stat().st_size):
            for seed in range(self.config.seeds):
                yield name, seed, fitted.path_of(self.config.fits, name, seed)

    def files(self, name: str) -> list[Path]:
        """A family's model and the solvers trained for it."""
        fits = [path for family, _, path in self.fits() if family == name]
        rivals = [path for rival in RIVALS for path in solvers.solver_files(self.config.meta, name, rival)]
        return [self.family(name).path, *fits, *rivals]

    def fitted(self, name: str) -> list[Contestant]:
        """What `fit_solver` made for a family, with all seeds."""
        return [fitted.contestant(path, seed, self.device) for family, seed, path in self.fits() if family == name]

    def held(self, family: Family) -> HeldOut:
        """Test problems of a family."""
        return family.problems("test", self.config.segments if family.texts else self.config.images)

    def stamp(self, part: str, family: str) -> Stamp:
        """What every row of a contestant begins with."""
        commit = runner.provenance()["commit"]
        return lambda one: {
            "part": part, "family": family, "solver": one.name, "kind": one.kind, "seed": one.seed,
            "config": self.digest, "commit": commit,
        }  # fmt: skip

    def rules(self, family: Family, held: HeldOut, **changes: Any) -> Rules:
        """Those of the protocol, in blocks of a text's quarter or of half of the images."""
        block, config = max(1, len(held) // (4 if family.texts else 2)), self.config
        return replace(Rules(TOLERANCES, config.budget, block, config.rounds, CLOCKED, weighed=True), **changes)

    def measure(self, part: str, held: HeldOut, everyone: Sequence[Contestant], rules: Rules) -> list[Row]:
        """Rows of solves, and curves at the end."""
        return measure.measure(held, everyone, rules, self.stamp(part, held.name), progress=self.config.progress)

    def briefly(self, part: str, family: Family, held: HeldOut, everyone: Sequence[Contestant]) -> list[Row]:
        """Solves of a part beside the race: the clocked tolerances, one timed round, no equilibria, no memory, no curves."""
        rules = self.rules(family, held, tolerances=CLOCKED, rounds=1, weighed=False)
        return [row for row in self.measure(part, held, everyone, rules) if row["row"] == "solve"]


def family(setting: Setting, name: str) -> Unit:
    """Everyone on a family's test inputs; on inputs of another kind, those that a user would choose among; wrong weights."""
    one = setting.family(name)
    if one.texts:  # the second text domain: missing, it is asked for before any work is done
        load_bible(one.criterion.data)  # type: ignore[arg-type]
    also = problems.BIBLE if one.texts else ""
    return setting.unit(name, lambda work: list(_family_rows(setting, one, work)), setting.files(name), also)


def _family_rows(setting: Setting, family: Family, work: Path) -> Iterator[Row]:
    budget, stamp = setting.config.budget, setting.stamp("families", family.name)
    validation, held = family.problems("validation", 64), setting.held(family)
    ours = solvers.classical(validation, budget, splitting=family.splitting)
    fits, peers = setting.fitted(family.name), solvers.peers(validation, budget)
    rivals = solvers.learned(setting.config.meta, family.name, RIVALS, setting.device)
    learned = [*fits, *rivals, solvers.universal(setting.device)]
    everyone = [*ours, *solvers.started(learned[0], ours), *learned, *peers]
    sure = tuple(one.solver for one in ours if one.name == "Peaceman-Rachford")
    held = problems.with_equilibria(work / "equilibria.safetensors", family.model().cell, held, sure)
    rules = setting.rules(family, held)
    yield from _tuned_rows(validation, ours, budget, stamp)
    yield (star := _star_row(family, held, stamp))
    yield from setting.measure("families", held, everyone, rules)
    near = NEAR["bits" if family.texts else "accuracy"]
    yield from _metric_rows(held, everyone, float(np.mean(star["score"])), near, rules, stamp)
    for one in fits:
        told = {key: one.solver.summary[key] for key in ("cpu_seconds", "steps")}
        yield {"row": "training", **stamp(one), **told, **one.solver.summary[fitted.VERDICT]}
    for one in everyone if family.texts else ():
        if one.kind != "peer":
            model = family.model(solver=one.solver)
            yield from measure.leak_rows(model, family.criterion, stamp(one), tolerances=CLOCKED)  # type: ignore[arg-type]
    few = [*ours, *learned, *(one for one in peers if one.name in ("torchdeq Broyden", "tuned torchdeq Anderson"))]
    for other in problems.outside(family, len(held)):
        yield from setting.briefly("outside", family, other, few)
    wrong = [replace(one, solver=solvers.shuffled(one.solver, one.seed or 0)) for one in fits]
    plain = [one for one in ours if one.name == "Broyden"]
    yield from setting.briefly("outside", family, replace(held, name=f"{family.name}, {WRONG}"), [*wrong, *plain])


def _tuned_rows(validation: HeldOut, ours: Sequence[Contestant], budget: int, stamp: Stamp) -> Iterator[Row]:
    """How ours did on the problems that they were tuned on: which families are headline ones follows from that."""
    z0, x = validation.first()
    for one in ours:
        found = solve(validation.f, z0, x, solver=one.solver, rtol=min(TOLERANCES), max_nfe=budget, throw=False)
        for tolerance in TOLERANCES:
            spent, reached = found.trace.evaluations_to(tolerance, budget)
            figures = {"median": float(np.median(spent)), "success": float(reached.mean())}
            yield {"row": "tuned", **stamp(one), "options": one.options, "tolerance": tolerance, **figures}


def _star_row(family: Family, held: HeldOut, stamp: Stamp) -> Row:
    assert held.star is not None
    assert held.known is not None
    assert held.judge is not None
    scores = held.judge(held.states(held.star), torch.arange(len(held), device=held.device))
    row = {"row": "star", **stamp(Contestant("float64", "classical", None)), "higher_is_better": not family.texts}
    return {**row, "samples": len(held), "known": int(held.known.sum()), "score": short(scores.tolist())}


def _metric_rows(
    held: HeldOut, everyone: Sequence[Contestant], goal: float, near: float, rules: Rules, stamp: Stamp
) -> Iterator[Row]:
    """Score by evaluations, and the time of as many as bring it to the goal, the equilibrium's, for good."""
    timed: list[tuple[Contestant, int, bool]] = []
    depths = [k for k in DEPTHS if k <= rules.budget]
    for one in everyone:
        if one.kind == "peer" or one.solver.min_nfe > 1:  # no state after every evaluation
            continue
        scores = {row["evaluations"]: row["score"] for row in measure.depth_rows(held, one.solver, depths)}
        for k, score in scores.items():
            yield {"row": "depth", **stamp(one), "samples": len(held), "evaluations": k, "score": score}
        far = max((k for k, score in scores.items() if abs(score - goal) > near), default=0)
        enough = [k for k in depths if k > far][:1]
        timed += [(one, k, True) for k in enough]
        if one.name in TIMED and not one.seed:
            timed += [(one, k, False) for k in PACES if k in depths and k not in enough]
    yield from measure.pace_rows(held, timed, rules, stamp)
