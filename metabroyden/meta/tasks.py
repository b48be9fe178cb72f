"""Fixed-point problems as tasks: a DEQ's f with disjoint train, validation and test contexts."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metabroyden.deq import DEQ
from metabroyden.learned.fingerprint import module_of, named_fingerprint
from metabroyden.meta.target import Target, target_of
from metabroyden.shared import is_shared
from metabroyden.solution import Cell, State
from metabroyden.solve import solve
from metabroyden.state import Packing, concatenate, gather

KNOWN, LARGEST, _CHUNK = 512, 2**24, 128
"""Training problems whose equilibria are found beforehand, and coordinates of these in all, at most."""


def sampled(tree: Any) -> list[Tensor]:
    """The tensors of a pytree of contexts that have a row for each sample: those of which `gather` takes rows."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for leaf in pytree.tree_leaves(tree, is_leaf=is_shared) if isinstance(leaf, Tensor)]


def count(tree: Any) -> int:
    """How many samples a pytree of contexts is of."""
    return len(sampled(tree)[0])


def rows(tree: Any, part: slice | Tensor) -> Any:
    """The samples `part`, a slice or numbers, of a pytree of contexts; what is shared by all of them stays."""
    first = sampled(tree)[0]
    if isinstance(part, slice):
        return tree[part] if tree is first else rows(tree, torch.arange(len(first), device="cpu")[part])
    return gather(tree, part.to(first.device))


class Source(Protocol):
    """Where training problems come from."""

    def problem(self, batch: int, generator: torch.Generator) -> tuple[Any, Any, Any]:
        """(f, z0, x) of a random batch."""
        ...


class TaskSet:
    """The fixed-point problems z = f(z, x) of one trained DEQ.

    Args:
        f: callable f(z, x), or a `DEQ`, which stands for its cell; the parameters of a module are frozen while tasks
            are trained on.
        train: raw contexts to train on, such as images (N, ...): a tensor, or a pytree of tensors with the samples first.
        validation: others, on which weights are chosen.
        test: others, untouched in training, or None.
        encode: raw contexts → the context x that f takes, such as the DEQ's injection; default the identity.
        augment: (raw, generator) → raw, applied to training draws only.
        z0: x → start; default zeros like x.

    ValueError when a context of one split occurs in another, to the last bit.
    """

    def __init__(
        self,
        f: Cell,
        train: Any,
        validation: Any,
        test: Any = None,
        *,
        encode: Callable[[Any], Any] | None = None,
        augment: Callable[[Any, torch.Generator], Any] | None = None,
        z0: Callable[[Any], State] | None = None,
    ) -> None:
        if isinstance(module_of(f), DEQ):
            layer = target_of(f)
            f, z0 = layer.f, z0 or layer.z0
        self.f, self._encode, self._augment, self._z0 = f, encode, augment, z0
        self._made: tuple[State, Any] | None = None  # (z0, x) made beforehand; raw contexts are then row numbers
        self.equilibria: Tensor | None = None  # (M, n) of the first training problems; NaN where none is known
        self.raw = {"train": train, "validation": validation, "test": test}
        _refuse_overlap({name: part for name, part in self.raw.items() if part is not None})

    def prepared(self, pool: int, generator: torch.Generator, held: int) -> TaskSet:
        """Contexts made beforehand: `pool` of the training ones, the first `held` for validation, none for test.

        For contexts that are costly to make (a language model's memory is a solve of its own). Raw contexts are then
        numbers (N,). ValueError where training draws are augmented, which would be lost.
        """
        if self._augment is not None:
            raise ValueError("contexts that are augmented cannot be made beforehand")
        train = self.split("train")
        chosen = {
            "train": rows(train, torch.randperm(count(train), generator=generator, device="cpu")[:pool]),
            "validation": rows(self.split("validation"), slice(held)),
        }
        made = [self.prepare(raw) for raw in chosen.values()]
        sizes = [count(raw) for raw in chosen.values()]
        numbers = dict(zip(chosen, torch.arange(sum(sizes)).split(sizes), strict=True))
        twin = copy.copy(self)
        twin.raw = {name: numbers.get(name) for name in self.raw}
        twin._made = concatenate(made)
        return twin

    def identity(self) -> str:
        """A hash of the weights of f (where it is a module) and of the training and validation contexts."""
        digest = hashlib.sha256(str(named_fingerprint(self.f)).encode())
        for name in ("train", "validation"):
            for leaf in sampled(self.split(name)):
                digest.update(row_bytes(leaf).tobytes())
        return digest.hexdigest()[:16]

    def split(self, name: str) -> Any:
        """Raw contexts of a split; ValueError for an unknown or absent one."""
        part = self.raw.get(name)
        if part is None:
            there = [key for key, value in self.raw.items() if value is not None]
            raise ValueError(f"no split {name!r}: there are {there}")
        return part

    def problems(self, name: str) -> tuple[State, Any]:
        """(z0, x) of a whole split, for `solve` and for validation."""
        return self.prepare(self.split(name))

    def draw(self, batch: int, generator: torch.Generator, part: slice = slice(None)) -> tuple[State, Any]:
        """(z0, x) of a random training batch, drawn with replacement and augmented; of its rows `part` alone.

        The draws are those of the whole batch, whatever the part.
        """
        raw = rows(self.split("train"), self.drawn(batch, generator))
        return self.prepare(rows(raw if self._augment is None else self._augment(raw, generator), part))

    def drawn(self, batch: int, generator: torch.Generator) -> Tensor:
        """The numbers of a random training batch, drawn with replacement."""
        return torch.randint(count(self.split("train")), (batch,), generator=generator, device="cpu")

    def find_equilibria(self, solver: Any, *, rtol: float, max_nfe: int, most: int = KNOWN) -> Tensor:
        """Where a solver ends on the first training problems, for `equilibria`: (M, n), NaN where it fails.

        At most `most` problems and `LARGEST` coordinates. Solved to a tenth of `rtol`, with twice `max_nfe` evaluations: to
        `rtol` itself, they would hold back a solver that is to reach it (results/RESEARCH.md, 53).
        """
        train, found = self.split("train"), []
        first_z, _ = self.prepare(rows(train, slice(1)))
        size = Packing.of(first_z).pack(first_z).shape[1]
        most = min(count(train), most, max(1, LARGEST // size))
        for first in range(0, most, _CHUNK):
            z0, x = self.prepare(rows(train, slice(first, min(first + _CHUNK, most))))
            solution = solve(
                self.f, z0, x, solver=solver, rtol=rtol / 10, max_nfe=2 * max_nfe, throw=False, trace=False
            )
            star = Packing.of(solution.z).pack(solution.z)
            found.append(torch.where(solution.converged[:, None], star, torch.nan))
        return torch.cat(found)

    def problem(self, batch: int, generator: torch.Generator) -> tuple[Any, State, Any]:
        """(f, z0, x) of a random training batch."""
        return self.f, *self.draw(batch, generator)

    def prepare(self, raw: Any) -> tuple[State, Any]:
        """(z0, x) of raw contexts."""
        if self._made is not None:
            return gather(self._made, raw.to(pytree.tree_leaves(self._made)[0].device))
        with torch.no_grad():
            return Target(self.f, self._encode, self._z0).prepare(raw)


def _refuse_overlap(parts: dict[str, Any]) -> None:
    owner: dict[bytes, str] = {}
    for name, part in parts.items():
        if count(part) == 0:
            raise ValueError(f"the {name} split is empty")
        for row in zip(*map(row_bytes, sampled(part)), strict=True):
            first = owner.setdefault(b"".join(leaf.tobytes() for leaf in row), name)
            if first != name:
                raise ValueError(f"a context of the {name} split is in the {first} split too")


def row_bytes(leaf: Tensor) -> Any:
    """(N, bytes of a row) of a tensor, as an array."""
    return leaf.detach().cpu().contiguous().reshape(len(leaf), -1).view(torch.uint8).numpy()
