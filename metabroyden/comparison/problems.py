"""Held-out fixed-point problems, on which solvers are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metabroyden.gradients.base import parts_of
from metabroyden.solution import State
from metabroyden.state import Packing, gather

CHUNK = 64
"""Problems solved at once where nothing else is asked: Broyden's method keeps two states for each evaluation."""


@dataclass(frozen=True)
class HeldOut:
    """N fixed-point problems z = f(z, x) of one map.

    Attributes:
        f: z⁺ = f(z, x), batch first, its weights as they are.
        z0: starts; a tensor (N, ...) or a tuple of several.
        x: contexts, a pytree with the samples first.
        judge: (states, index) → (B,) scores of the samples `index`, higher being better; None: there is no task.
        predict: states → classes (B,) or (B, T), or None.
        name: of the problem set.
        star: float64 equilibria (N, n), or None.
        known: (N,) bool, where these were found.
        closed: whether solvers see f(z) alone, with the contexts inside, as inside a model of another library.
    """

    f: Callable[..., State]
    z0: State
    x: Any
    judge: Callable[[State, Tensor], Tensor] | None = None
    predict: Callable[[State], Tensor] | None = None
    name: str = ""
    star: Tensor | None = None
    known: Tensor | None = None
    closed: bool = False

    def __len__(self) -> int:
        return len(parts_of(self.z0)[0])

    @property
    def device(self) -> torch.device:
        """Where the states are."""
        return parts_of(self.z0)[0].device

    def take(self, index: Tensor) -> tuple[State, Any]:
        """(z0, x) of these samples."""
        return gather(self.z0, index), gather(self.x, index)

    def problem(self, index: Tensor) -> tuple[Callable[..., State], State, Any]:
        """(f, z0, context) of these samples, as `solve` takes them."""
        z0, x = self.take(index)
        return (lambda z: self.f(z, x), z0, None) if self.closed else (self.f, z0, x)

    def chunks(self, size: int = CHUNK) -> Iterator[tuple[State, Any, Tensor]]:
        """(z0, x, index) of consecutive samples."""
        for index in torch.arange(len(self), device=self.device).split(size):
            yield *self.take(index), index

    def head(self, count: int) -> HeldOut:
        """The first of them, without their equilibria."""
        z0, x = self.take(torch.arange(min(count, len(self)), device=self.device))
        return replace(self, z0=z0, x=x, star=None, known=None)

    def first(self) -> tuple[State, Any]:
        """(z0, x) of the first samples, on which solvers are tuned."""
        z0, x, _ = next(iter(self.chunks()))
        return z0, x

    def states(self, flat: Tensor) -> State:
        """States (N, n) as those of the problems, in their dtype."""
        packing = Packing.of(self.z0)
        return packing.unpack(flat.to(packing.pack(self.z0).dtype))
