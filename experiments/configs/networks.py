"""Models that experiments make for themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from experiments.bench.training import Step
from metabroyden import DEQ, Broyden, Implicit
from metabroyden.zoo.models import CausalCell, ConvCell

CELLS: dict[str, Callable[[int], nn.Module]] = {"conv": lambda c: ConvCell(c, c, math.gcd(c, 8)), "causal": CausalCell}
"""The cells that are trained, made from their number of channels."""
IMPLICIT, FULL, UNROLLED, CHECKPOINTS = "implicit", "implicit, full memory", "unrolled", "unrolled, checkpoints"
WAYS = (IMPLICIT, FULL, UNROLLED, CHECKPOINTS)
"""How `memory` trains them."""


class Unrolled(nn.Module):
    """z ← cell(z, x) from zero, so many times.

    segment: applications in one go whose activations are computed again in the backward pass (Chen et al. 2016); None: all
    are kept.
    """

    def __init__(self, cell: nn.Module, depth: int, segment: int | None = None) -> None:
        super().__init__()
        self.cell, self.depth, self.segment = cell, depth, segment

    def forward(self, x: Tensor) -> Tensor:
        """The last z."""
        z, several = torch.zeros_like(x), partial(self._several, x)
        if self.segment is None:
            return several(z, self.depth)
        for done in range(0, self.depth, self.segment):
            count = min(self.segment, self.depth - done)
            z = checkpoint(several, z, count, use_reentrant=False, preserve_rng_state=False)
        return z

    def _several(self, x: Tensor, z: Tensor, count: int) -> Tensor:
        for _ in range(count):
            z = self.cell(z, x)
        return z


def step(options: dict[str, Any], cell: str, way: str, count: int) -> Step:
    """A training step of `memory` with its options; weights, injection and loss are the same for every way.

    The tolerance is zero, so that exactly `count` evaluations are spent. Broyden's ring buffer is full from evaluation
    memory + 2 on.
    """
    if cell not in CELLS or way not in WAYS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)} and way one of {WAYS}, got {cell}, {way}")
    sides = ("channels", "side", "side") if cell == "conv" else ("width", "tokens")
    shape = [options[name] for name in ("batch", *sides)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options["seed"])
        f = CELLS[cell](shape[1])
        for parameter in f.parameters():
            parameter.data.mul_(options["gain"] if parameter.dim() > 1 else 1.0)
        x, direction = torch.randn(shape), torch.randn(shape)
    if way in (UNROLLED, CHECKPOINTS):
        return Step(Unrolled(f, count, math.ceil(math.sqrt(count)) if way == CHECKPOINTS else None), x, direction)
    limited = Broyden(memory=options["memory"])
    backward = Implicit(solver=limited, rtol=0.0, max_nfe=options["backward"])
    solver = replace(limited, memory=count) if way == FULL else limited
    return Step(DEQ(f, solver=solver, backward=backward, rtol=0.0, max_nfe=count, warn=False), x, direction)
