"""What is raced on: a family of models with its inputs as they are and changed, or cells of no family."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.legacy import equilibria, meta_rows, texts
from experiments.legacy.equilibria import HeldOut
from experiments.legacy.metrics import short
from experiments.legacy.provenance import provenance
from experiments.legacy.race import contestants, measure
from experiments.legacy.race.contestants import FLAGSHIP, Contestant
from experiments.legacy.race.schema import TOLERANCES, Row
from metabroyden.meta.progress import progress_bar
from metabroyden.solve import solve
from metabroyden.solvers import Anderson, Broyden, Newton, Picard
from metabroyden.zoo.data.bible import load_bible
from metabroyden.zoo.models import load_model
from metabroyden.zoo.models.criteria import NextToken
from metabroyden.zoo.models.families import get_family, trained_model
from metabroyden.zoo.testbed import KnownProblem, make_problem
from metabroyden.zoo.testbed.cells import blas

CLOCKED = (1e-2, 1e-3)
DEPTHS = range(1, 41)
PACES = (1, 2, 3, 5, 8, 12, 20, 30)
"""Evaluations after which solves are stopped to be timed, of the solvers that figures show."""
TIMED = (FLAGSHIP, "grouped", "hyper-anderson", "tuned Picard", "tuned Anderson", "Broyden", "Peaceman-Rachford")
PATHS = (FLAGSHIP, "Broyden", "tuned Anderson")
"""Solvers whose iterates are drawn."""
NEAR = {"accuracy": 0.005, "bits": 0.01}
"""How far from the equilibrium's score counts as equal."""
NORMS = (0.5, 0.9, 1.2, 1.5, 2.0, 3.0)
"""Of dense cells of 128 units: a sweep of the spectral norm."""
WIDTHS = (16, 64, 256, 1024)
"""Of dense cells of norm 1.5."""
BUSES = (14, 30, 57, 118)
"""Of power networks."""


@dataclass(frozen=True)
class Settings:
    """What a race is run with.

    Attributes:
        images, segments: held-out problems of a family. budget: evaluations a sample. rounds: timed ones of a block.
        models, meta: folders of trained models and solvers. device: where to run. digest: hash of the race's settings.
        progress: show bars.
    """

    images: int
    segments: int
    budget: int
    rounds: int
    models: Path
    meta: Path
    device: torch.device
    digest: str
    progress: bool


class Unit:
    """A piece of the race whose rows are made in one go.

    Attributes:
        name: of its file of rows. key: name with a hash of what it is made from.
    """

    name: str
    key: str

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.commit = _made()["commit"]

    def rows(self, work: Path) -> list[Row]:
        """All of them; what may be wanted again after an interruption is kept in `work`."""
        raise NotImplementedError

    def stamp(self, part: str, family: str) -> Callable[[Contestant], Row]:
        """What every row of a contestant begins with."""

        def begin(one: Contestant) -> Row:
            who = {"solver": one.name, "kind": one.kind, "seed": one.seed}
            return {"part": part, "family": family, **who, "config": self.settings.digest, "commit": self.commit}

        return begin

    def solves(
        self,
        everyone: Sequence[Contestant],
        held: HeldOut,
        star: Tensor,
        known: Tensor,
        rules: measure.Rules,
        stamp: Callable[[Contestant], Row],
        title: str,
    ) -> list[Row]:
        """`measure.solve_rows` behind a bar."""
        blocks = math.ceil(len(held) / rules.block) * len(rules.tolerances)
        with progress_bar(title, blocks, show=self.settings.progress) as bar:
            count = iter(range(1, blocks + 1))
            done = (lambda: None) if bar is None else (lambda: bar(next(count), ""))
            return measure.solve_rows(everyone, held, star, known, rules, stamp, done)


class OnFamily(Unit):
    """A unit on the held-out problems of one family.

    Attributes:
        family: its name. kind: the family itself. path: of its trained model. texts: whether it reads tokens.
    """

    def __init__(self, settings: Settings, family: str) -> None:
        super().__init__(settings)
        self.family, self.kind, self.path = family, get_family(family), trained_model(settings.models, family)
        self.criterion = self.kind.criterion()
        self.texts = isinstance(self.criterion, NextToken)

    @property
    def count(self) -> int:
        """Held-out problems."""
        return self.settings.segments if self.texts else self.settings.images

    def rules(self, held: HeldOut) -> measure.Rules:
        """Those of the protocol, in blocks of a text's quarter or of half of the images."""
        block = max(1, len(held) // (4 if self.texts else 2))
        return measure.Rules(TOLERANCES, CLOCKED, self.settings.budget, block, self.settings.rounds)

    def model(self, **options: Any) -> Any:
        """The frozen model."""
        return load_model(self.path, **options, warn=False).requires_grad_(False).to(self.settings.device)

    def trained(self, family: str, names: tuple[str, ...] = (FLAGSHIP,)) -> list[Contestant]:
        """Solvers trained on a family, with all seeds that are there, where the race runs."""
        found = contestants.learned(self.settings.meta, family, names)
        for one in found:
            one.solver.to(self.settings.device)
        return found

    def briefly(self, part: str, everyone: Sequence[Contestant], held: HeldOut) -> list[Row]:
        """Solves of a part beside the race: the clocked tolerances, one timed round, no equilibria, no memory, no curves."""
        rules = replace(self.rules(held), tolerances=CLOCKED, rounds=1, weighed=False)
        stamp = self.stamp(part, self.family)
        rows = self.solves(everyone, held, *measure.unknown(held), rules, stamp, self.name)
        return [row for row in rows if row["row"] == "solve"]

    def solvers_of(self, family: str) -> list[Path]:
        """Files of the solvers trained on a family."""
        return sorted((self.settings.meta / family).glob("*-seed*/solver.safetensors"))


class FamilyUnit(OnFamily):
    """A family of trained models."""

    def __init__(self, settings: Settings, name: str) -> None:
        super().__init__(settings, name)
        self.name = name
        # of the second text domain; missing, it is asked for before any work is done
        self.bible = None
        if isinstance(self.criterion, NextToken):
            self.bible = replace(self.criterion, data=load_bible(self.criterion.data))
        self.key = f"{name}-{digest(self.path, *self.solvers_of(name), also=BIBLE if self.texts else '')}"
        self._stamp = self.stamp("families", name)

    def rows(self, work: Path) -> list[Row]:
        """Everyone on the family's test inputs; on inputs of another kind, those that a user would choose among."""
        settings = self.settings
        model = self.model()
        validation = equilibria.held_out(model, self.criterion, "validation", 64)
        held = equilibria.held_out(model, self.criterion, "test", self.count)
        ours = contestants.classical(validation, settings.budget, splitting=self.kind.splitting)
        learned = [*contestants.learned(settings.meta, self.name), contestants.universal()]
        peers = contestants.peers(validation, settings.budget)
        for one in learned:
            one.solver.to(settings.device)
        everyone = [*ours, *contestants.started(learned[0], ours), *learned, *peers]
        rules = self.rules(held)
        star, known = self._equilibria(work / "equilibria.safetensors", model, held, ours)
        settled = self._star_row(held, star, known)
        rows = [*self._tuned_rows(ours, validation), settled]
        rows += self.solves(everyone, held, star, known, rules, self._stamp, self.name)
        rows += self._metric_rows(everyone, held, float(np.mean(settled["score"])), rules)
        rows += self._learned_rows(learned[:-1], held)
        shown = [one for one in everyone if one.name in PATHS and not one.seed and not getattr(one.solver, "parts", ())]
        rows += measure.path_rows(shown, held, star, rules, self._stamp) if bool(known[0]) else []
        rows += self._leak_rows([one for one in everyone if not one.peer])
        few = [*ours, *learned, *(one for one in peers if one.name in ("torchdeq Broyden", "tuned torchdeq Anderson"))]
        for name, held in self._outside(model):
            outside = self.stamp("outside", f"{self.name}, {name}")
            once = replace(rules, tolerances=CLOCKED, rounds=1, weighed=False)
            rows += self.solves(few, held, *measure.unknown(held), once, outside, f"{self.name}, {name}")
        return rows

    def _outside(self, model: Any) -> Iterator[tuple[str, HeldOut]]:
        """Test inputs of another kind than those trained on: changed images, another text."""
        if self.bible is not None:
            yield BIBLE, equilibria.held_out(model, self.bible, "test", self.count)
            return
        for name, change in CHANGES.items():
            yield name, equilibria.held_out(model, self.criterion, "test", self.count, change)

    def _equilibria(self, path: Path, model: Any, held: HeldOut, ours: list[Contestant]) -> tuple[Tensor, Tensor]:
        sure = tuple(one.solver for one in ours if one.name == "Peaceman-Rachford")
        return meta_rows.kept_equilibria(path, model.cell, held, sure)

    def _tuned_rows(self, ours: list[Contestant], validation: HeldOut) -> list[Row]:
        """How ours did on the problems that they were tuned on: which families are headline ones follows from that."""
        z0, x, _ = next(iter(validation.chunks()))
        budget, rows = self.settings.budget, []
        for one in ours:
            tightest = min(TOLERANCES)
            found = solve(validation.f, z0, x, solver=one.solver, rtol=tightest, max_nfe=budget, throw=False)
            for tolerance in TOLERANCES:
                spent, reached = found.trace.evaluations_to(tolerance, budget)
                figures = {"median": float(np.median(spent)), "success": float(reached.mean())}
                row = {"row": "tuned", **self._stamp(one), "options": one.options, "tolerance": tolerance, **figures}
                rows.append(row)
        return rows

    def _star_row(self, held: HeldOut, star: Tensor, known: Tensor) -> Row:
        index = torch.arange(len(held), device=held.device)
        return {
            "row": "star",
            **self._stamp(Contestant("float64", "classical", None, "")),
            "samples": len(held),
            "known": int(known.sum()),
            "score": short(held.judge(meta_rows.states_at(star, held), index).tolist()),
            "higher_is_better": not self.texts,
        }

    def _metric_rows(self, everyone: list[Contestant], held: HeldOut, goal: float, rules: measure.Rules) -> list[Row]:
        """Score by evaluations, and the time of as many as bring it to the goal, the equilibrium's, for good."""
        near = NEAR["bits" if self.texts else "accuracy"]
        found: list[Row] = []
        timed: list[tuple[Contestant, int, bool]] = []
        depths = [k for k in DEPTHS if k <= self.settings.budget]
        for one in everyone:
            if one.peer or one.solver.min_nfe > 1:  # no state after every evaluation
                continue
            scores = equilibria.depth_rows(self.name, held, solver=one.solver, depths=depths)
            for row in scores:
                figures = {key: row[key] for key in ("evaluations", "score")}
                found.append({"row": "depth", **self._stamp(one), "samples": len(held), **figures})
            far = [row["evaluations"] for row in scores if abs(row["score"] - goal) > near]
            later = [k for k in depths if not far or k > far[-1]]
            if later:
                timed.append((one, later[0], True))
            if one.name in TIMED and not one.seed:
                timed += [(one, k, False) for k in PACES if k in depths and k != (later or [0])[0]]
        return [*found, *measure.pace_rows(timed, held, rules, self._stamp)]

    def _learned_rows(self, learned: list[Contestant], held: HeldOut) -> list[Row]:
        """What meta-training took, and what is lost far past its horizon."""
        rows = []
        for one in learned:
            taken = {key: one.solver.summary[key] for key in ("cpu_seconds", "steps")}
            rows.append({"row": "training", **self._stamp(one), **taken})
            steps = 4 * getattr(one.solver, "trained_for", 14)
            rows += [
                {**row, **self._stamp(one)} for row in meta_rows.horizon_rows(one.name, one.solver, held, steps=steps)
            ]
        return rows

    def _leak_rows(self, everyone: list[Contestant]) -> list[Row]:
        rows: list[Row] = []
        if not isinstance(self.criterion, NextToken):
            return rows
        for one in everyone:
            model = self.model(solver=one.solver)
            for row in texts.leak_rows(one.name, model, self.criterion, tolerances=CLOCKED):
                figures = {key: row[key] for key in ("tolerance", "mean", "most")}
                rows.append({"row": "leak", **self._stamp(one), **figures})
        return rows


@cache
def _made() -> dict[str, Any]:
    """Commit and versions: asked for once, not for every family."""
    return provenance()


def digest(*paths: Path, also: str = "") -> str:
    """Hash of files, the shipped universal solver and the versions of libraries: what rows depend on beside the settings."""
    versions = _made()["versions"]
    used = [contestants.universal().options, versions["torch"], versions["torchdeq"]]
    found = hashlib.sha256(repr(used).encode() + also.encode())
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()[:8]


def _shifted(images: Tensor) -> Tensor:
    return images.roll((images.shape[2] // 8, images.shape[3] // 8), (2, 3))


def _noisy(images: Tensor) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return images + 0.5 * images.std() * noise.to(images)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {"shifted": _shifted, "noisy": _noisy}
"""Of images: by an eighth of their side; by noise of half their deviation."""
BIBLE = "King James Bible"
"""The second text domain, in the plays' vocabulary."""


class CellsUnit(Unit):
    """Cells that no family has: a sweep of the spectral norm, other widths, power flow.

    The universal solver was trained on random cells, dense ones of 16 to 128 units and norms 0.4 to 3 among them: here only
    the wider ones and power flow are new to it.
    """

    name = "cells"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.key = f"cells-{digest()}"

    def rows(self, work: Path) -> list[Row]:
        """The classical solvers as they are, the universal one and torchdeq's."""
        settings, rows = self.settings, []
        plain = {
            "Picard": Picard(),
            "Anderson": Anderson(),
            "Broyden": Broyden(settings.budget),
            "Newton-Krylov": Newton(),
        }
        ours = [Contestant(name, "classical", solver, repr(solver)) for name, solver in plain.items()]
        peers = [
            Contestant(f"torchdeq {name}", "peer", contestants.torchdeq(name), "") for name in ("Broyden", "Anderson")
        ]
        everyone = [*ours, contestants.universal(), *peers]
        for name, problem in _cells(settings.images // 4).items():
            held = HeldOut(problem.f, problem.z0, problem.context, lambda z, index: torch.zeros(len(index)))
            star, known = measure.unknown(held)
            if problem.star is not None:
                star, known = meta_rows.packed(problem.star).double(), ~known
            rules = measure.Rules(CLOCKED, CLOCKED, settings.budget, len(held), settings.rounds, weighed=False)
            rows += self.solves(everyone, held, star, known, rules, self.stamp("outside", name), name)
        return rows


def _cells(count: int) -> dict[str, KnownProblem]:
    count = max(1, count)
    found = {f"dense, norm {norm:g}": blas(count, 128, norm, seed=11, x_seed=12) for norm in NORMS}
    found |= {f"dense, {width} wide": blas(count, width, 1.5, seed=13, x_seed=14) for width in WIDTHS}
    found |= {
        f"power flow, {buses} buses": make_problem(f"power_flow_{buses}", dtype=torch.float32, batch=count, seed=15)
        for buses in BUSES
    }
    return found
