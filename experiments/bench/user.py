"""Problems of one's own DEQ, which a function MODULE:FUNCTION returns, in the place of a trained family's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from experiments.bench.problems import Family
from metabroyden.comparison.problems import HeldOut
from metabroyden.comparison.verdict import judge_of
from metabroyden.meta import TaskSet
from metabroyden.meta.target import ModelMap, Target, target_of
from metabroyden.meta.tasks import rows
from metabroyden.nn.pin import pin
from metabroyden.solvers import PeacemanRachford
from metabroyden.solvers.classical import offers
from metabroyden.userfunction import UserProblem, kept_apart, load_problem


@dataclass(frozen=True)
class UserFamily:
    """What MODULE:FUNCTION returns, see `metabroyden.userfunction.load_problem`, with what `Family` has of a family.

    Of its x_train every fifth sample is for validation; its x_test is for the test.
    """

    name: str
    device: torch.device
    own, texts = True, False

    @cached_property
    def given(self) -> UserProblem:
        """What the function returns; ValueError where it has not both x_train and x_test."""
        found = load_problem(self.name)
        if found.x_train is None or found.x_test is None:
            raise ValueError(
                f"{self.name} must return x_train and x_test, or x: one part to train on, one to measure on"
            )
        return found

    @cached_property
    def target(self) -> Target:
        """The map behind what was given."""
        if isinstance(self.given.f, torch.nn.Module):
            self.given.f.eval().to(self.device)
        target = target_of(self.given.f)
        return target if self.given.z0 is None else target._replace(z0=self.given.z0)

    @property
    def path(self) -> Path:
        """Where the function is written."""
        assert self.given.file is not None
        return self.given.file

    @property
    def folder(self) -> str:
        """Its name, as that of a folder."""
        return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in self.name).strip("-")

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What results depend on."""
        return self.path, self.tasks().identity()

    @property
    def overrides(self) -> dict[str, Any]:
        """What it says of how a solver is to be made, for `plan`."""
        told = {"layout": self.given.layout, "conditioning": self.given.conditioning}
        return {name: value for name, value in told.items() if value not in (None, "auto")}

    @property
    def splitting(self) -> bool:
        """Whether its map offers its parts, for operator splitting."""
        return offers(self.target.f, PeacemanRachford)

    def tasks(self, seed: int = 0, *, pool: int = 0, held: int = 0) -> TaskSet:
        """What solvers are trained on; seed, pool and held are for families whose contexts are costly."""
        parts = *kept_apart(self.given.x_train, self.name), self.given.x_test
        train, validation, test = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(self.device), parts)
        return TaskSet(self.target.f, train, validation, test, encode=self.target.encode, z0=self.target.z0)

    def problems(self, split: str = "test", limit: int = 256) -> HeldOut:
        """The first `limit` problems of a split."""
        tasks = self.tasks()
        raw = rows(tasks.split(split), slice(limit))
        z0, x = tasks.prepare(raw)
        f, x = pin(tasks.f, x, z0)
        judge = None if self.given.metric is None else judge_of(self.given.metric, raw)
        return HeldOut(f, z0, x, judge, name=self.name, closed=isinstance(tasks.f, ModelMap))


def family_of(name: str, models: Path, device: torch.device) -> Family | UserFamily:
    """The trained family of this name, or one's own DEQ where the name is MODULE:FUNCTION."""
    return UserFamily(name, device) if ":" in name else Family(name, models, device)
