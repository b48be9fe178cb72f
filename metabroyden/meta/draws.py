"""What meta-training draws at random. Every draw is a function of the seed, the outer step and the place in the batch alone.

So an interrupted run need not remember a generator's state, and processes that share a batch agree on it.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from metabroyden.meta.tasks import TaskSet
from metabroyden.shared import bare
from metabroyden.solution import State
from metabroyden.state import Packing


def generator(seed: int, step: int, what: str) -> torch.Generator:
    """A generator of its own for each seed, step and purpose."""
    digest = hashlib.sha256(repr((seed, step, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def unroll_length(unroll: int | tuple[int, int], seed: int, step: int) -> int:
    """K of an outer step: as it stands, or log-uniform from low to high, both included."""
    if isinstance(unroll, int):
        return unroll
    low, high = unroll
    at = float(torch.rand((), generator=generator(seed, step, "length"), dtype=torch.float64, device="cpu"))
    return min(high, math.floor(low * ((high + 1) / low) ** at))


def training_batch(tasks: TaskSet, config: Any, step: int, part: slice = slice(None)) -> tuple[State, Any]:
    """(z0, x) of the rows `part` of an outer step's batch."""
    z0, x = tasks.draw(config.batch, generator(config.seed, step, "batch"), part)
    if config.start_noise == 0:
        return z0, x
    packing = Packing.of(z0)
    size = sum(shape.numel() for shape in packing.shapes)
    noise = torch.randn(
        config.batch, size, generator=generator(config.seed, step, "start"), dtype=torch.float64, device="cpu"
    )
    return perturb(tasks.f, z0, x, config.start_noise * noise[part]), x


@torch.no_grad()
def perturb(f: Any, z0: State, x: Any, noise: Tensor) -> State:
    """z0 + rms(f(z0))·noise, the root mean square by sample; noise (B, n)."""
    packing = Packing.of(z0)
    flat = packing.pack(z0)
    image = packing.take(f(z0, bare(x)), flat)
    scale = image.square().mean(dim=1, keepdim=True).sqrt()
    return packing.unpack(flat + scale * noise.to(flat))
