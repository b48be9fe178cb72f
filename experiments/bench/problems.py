"""Held-out fixed-point problems: of trained families, as they are and changed, of the test bed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

from metabroyden import checkpoint
from metabroyden.comparison.problems import HeldOut
from metabroyden.meta import TaskSet
from metabroyden.nn.pin import pin
from metabroyden.solution import State
from metabroyden.solve import solve
from metabroyden.solvers import Anderson, Broyden
from metabroyden.state import Packing, gather
from metabroyden.zoo.data.bible import load_bible
from metabroyden.zoo.models import load_model
from metabroyden.zoo.models.criteria import Images, NextToken, OfFamily, device_of
from metabroyden.zoo.models.families import get_family, trained_model
from metabroyden.zoo.tasks import family_tasks, text_windows
from metabroyden.zoo.testbed import KnownProblem


@dataclass(frozen=True)
class Family:
    """A family of trained models with its frozen weights, from a folder of models, on a device."""

    name: str
    models: Path = Path("results/models")
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    own = False  # see `experiments.bench.user`

    def __post_init__(self) -> None:
        assert self.path  # or it says which command trains it

    @property
    def path(self) -> Path:
        """The file of the trained model."""
        return trained_model(self.models, self.name)

    @property
    def folder(self) -> str:
        """Its name, as that of a folder."""
        return self.name

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What results depend on."""
        return (self.path,)

    @property
    def overrides(self) -> dict[str, Any]:
        """What it says of how a solver is to be made, for `plan`: nothing, recipes do."""
        return {}

    @cached_property
    def criterion(self) -> OfFamily:
        """What the model is trained for, with its data."""
        return get_family(self.name).criterion()

    @property
    def texts(self) -> bool:
        """Whether it reads tokens."""
        return isinstance(self.criterion, NextToken)

    @property
    def splitting(self) -> bool:
        """Whether its cell is monotone, and solved by splitting."""
        return get_family(self.name).splitting

    def model(self, **options: Any) -> Any:
        """The frozen model; options: of `load_model`, such as solver."""
        return load_model(self.path, **options, warn=False).requires_grad_(False).to(self.device)

    def tasks(self, seed: int, *, pool: int = 1024, held: int = 128) -> TaskSet:
        """What solvers are trained on; of texts, whose contexts are solves of their own, `pool` made beforehand."""
        tasks = family_tasks(self.model(), self.criterion)
        return tasks.prepared(pool, torch.Generator().manual_seed(seed), held) if self.texts else tasks

    def problems(self, split: str = "test", limit: int = 256, change: Any = None) -> HeldOut:
        """The first `limit` problems of a split, see `held_out`."""
        return replace(held_out(self.model(), self.criterion, split, limit, change), name=self.name)


@torch.no_grad()
def held_out(
    model: Any, criterion: OfFamily, split: str, limit: int, change: Callable[[Tensor], Tensor] | None = None
) -> HeldOut:
    """The first `limit` problems of a split (for texts: evenly spaced segments), of inputs changed by `change`."""
    tasks = family_tasks(model, criterion)
    raw = tasks.split(split)
    count = min(limit, len(raw))
    chosen = torch.arange(count) if isinstance(criterion, Images) else torch.linspace(0, len(raw) - 1, count).long()
    z0, x = tasks.prepare(raw[chosen] if change is None else change(raw[chosen]))
    f, x = pin(model.cell, x, z0)

    if isinstance(criterion, Images):
        labels = getattr(criterion.data, split).labels[chosen].to(device_of(model))
        predict = lambda z: model.classify(z).argmax(dim=1)  # noqa: E731
        return HeldOut(f, z0, x, lambda z, index: (predict(z) == labels[index]).float(), predict)
    assert isinstance(criterion, NextToken)
    targets = text_windows(criterion.data, split, criterion.length)[1][chosen].to(device_of(model))
    bits = lambda z, index: bits_of(model.classify(z), targets[index]).mean(dim=1)  # noqa: E731
    return HeldOut(f, z0, x, bits, lambda z: model.classify(z).argmax(dim=2))


def bits_of(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, T) bits that logits (B, T, vocabulary) pay for targets (B, T)."""
    return functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none") / np.log(2)


def of_known(problem: KnownProblem, name: str = "") -> HeldOut:
    """A problem of the test bed, with its equilibria where it has them; there is no task to judge."""
    held = HeldOut(problem.f, problem.z0, problem.context, lambda z, index: torch.zeros(len(index)), name=name)
    if problem.star is None:
        return held
    return replace(held, star=packed(problem.star).double(), known=torch.ones(len(held), dtype=torch.bool))


def shifted(images: Tensor) -> Tensor:
    """Images moved by an eighth of their side."""
    return images.roll((images.shape[2] // 8, images.shape[3] // 8), (2, 3))


def noisy(images: Tensor) -> Tensor:
    """Images with noise of half their deviation."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return images + 0.5 * images.std() * noise.to(images)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {"shifted": shifted, "noisy": noisy}
BIBLE = "King James Bible"
"""The second text domain, in the plays' vocabulary."""


def outside(family: Family, limit: int) -> Iterator[HeldOut]:
    """Test inputs of another kind than those trained on: changed images, another text."""
    criterion = family.criterion
    if isinstance(criterion, NextToken):
        other = replace(criterion, data=load_bible(criterion.data))
        yield replace(held_out(family.model(), other, "test", limit), name=f"{family.name}, {BIBLE}")
        return
    for name, change in CHANGES.items():
        yield replace(family.problems("test", limit, change), name=f"{family.name}, {name}")


def packed(z: State) -> Tensor:
    """(B, n)."""
    return Packing.of(z).pack(z)


@torch.no_grad()
def double_equilibria(
    cell: Any, held: HeldOut, solvers: Sequence[Any] = (), *, rtol: float = 1e-8, max_nfe: int = 400
) -> tuple[Tensor, Tensor]:
    """Float64 equilibria of held-out problems, found from their own starts.

    Args:
        cell: the map, in any precision.
        held: its problems.
        solvers: what to try, each on what those before left; default Broyden's method, then Anderson's.
        rtol: the tolerance.
        max_nfe: evaluations that each may use.

    Returns:
        (z* (N, n), known (N,) where it was found).
    """
    solvers = solvers or (Broyden(memory=200), Anderson(memory=10, ridge=1e-12))
    double = copy.deepcopy(cell).double()
    stars, known = [], []
    for z0, x, _ in held.chunks():
        z0, x = pytree.tree_map(_in_double, (z0, x))
        f, x = pin(double, getattr(x, "context", x), z0)
        star = packed(z0).clone()
        found = torch.zeros(len(star), dtype=torch.bool, device=star.device)
        for solver in solvers:
            todo = (~found).nonzero().squeeze(1)
            if len(todo) == 0:
                break
            start, context = gather((z0, x), todo)
            solution = solve(f, start, context, solver=solver, rtol=rtol, max_nfe=max_nfe, throw=False)
            star[todo], found[todo] = packed(solution.z), solution.converged
        stars.append(star)
        known.append(found)
    return torch.cat(stars), torch.cat(known)


def with_equilibria(path: Path, cell: Any, held: HeldOut, solvers: Sequence[Any] = ()) -> HeldOut:
    """The problems with their float64 equilibria, which are found once and kept in a file."""
    if not path.exists():
        star, known = double_equilibria(cell, held, solvers)
        checkpoint.write(path, "measured/equilibria", {"star": star, "known": known}, {})
    tensors, _ = checkpoint.read(path, "measured")
    return replace(held, star=tensors["star"].to(held.device), known=tensors["known"].to(held.device))


def _in_double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
