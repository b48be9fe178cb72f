"""The incumbent: Anderson acceleration whose weights a small network predicts, from a learned start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metabroyden.learned.base import LearnedConfig, LearnedSolver, register
from metabroyden.solvers.base import Step


@dataclass(frozen=True)
class HyperAndersonConfig(LearnedConfig):
    """Adds to `LearnedConfig`, whose `hidden` is the width of the network here.

    Attributes:
        memory: m; the weights are those of the last m + 1 iterates.
        gram: whether the network also sees the residuals' inner products, as least squares would, beside pooled residuals.
    """

    hidden: int = 32
    memory: int = 5
    gram: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 1:
            raise ValueError(f"memory must be at least 1, got {self.memory}")


class HyperAndersonState(NamedTuple):
    """The last k ≤ m + 1 iterates, the oldest first. R rows, n coordinates, C channels."""

    z: Tensor  # (R, k, n)
    g: Tensor  # (R, k, n)
    pooled: Tensor  # (R, k, 2C) mean and root mean square of g by channel
    extra: Tensor | None  # (R,) ‖Σᵢ αᵢgᵢ‖ of the last step, a term of the published loss


@register("hyper-anderson")
class HyperAnderson(LearnedSolver):
    """z⁺ = Σᵢ αᵢ(zᵢ + βgᵢ) over the last m + 1 iterates, Σᵢ αᵢ = 1, with α and β of a network instead of least squares.

    Bai, Koltun & Kolter, Neural Deep Equilibrium Solvers, ICLR 2022, algorithm 2: each residual is pooled to a short vector,
    the vectors of the last m + 1 steps pass as a sequence through two convolutions over the steps, and what comes out is
    shifted so that it sums to one. Pooled are mean and root mean square of each channel, over that of the newest residual,
    beside log sizes; α and β are one number a sample, as published, so that for sequences the future is not kept out.
    Before training α picks the newest iterate and β = 1: Picard.
    """

    config_type = HyperAndersonConfig
    config: HyperAndersonConfig

    def __init__(self, config: HyperAndersonConfig) -> None:
        super().__init__(config)
        inputs = 2 * self.layout.channels + 2 + (config.memory + 1) * config.gram
        self.inward = nn.Conv1d(inputs, config.hidden, 3, padding=1)
        self.outward = nn.Conv1d(config.hidden, 2, 3, padding=1)
        nn.init.zeros_(self.outward.weight)
        assert self.outward.bias is not None
        nn.init.zeros_(self.outward.bias)

    def init(self, z: Tensor, g: Tensor, problem: Any) -> HyperAndersonState:
        """No iterates yet."""
        empty = z.new_empty(len(z), 0, z.shape[1])
        return HyperAndersonState(empty, empty, z.new_empty(len(z), 0, 2 * self.layout.channels), None)

    def step(self, z: Tensor, g: Tensor, state: HyperAndersonState, problem: Any) -> Step:
        """One learned step, (R, n)."""
        canonical = self.layout.canonical(g, self.layout.resolve(problem.shape)).reshape(
            len(g), self.layout.channels, -1
        )
        tiny = torch.finfo(g.dtype).tiny ** 0.5
        pooled = torch.cat([canonical.mean(2), canonical.square().mean(2).clamp_min(tiny).sqrt()], dim=1)
        keep = self.config.memory
        zs, gs, rows = (
            torch.cat([old[:, -keep:], new.unsqueeze(1)], dim=1)
            for old, new in ((state.z, z), (state.g, g), (state.pooled, pooled))
        )
        alpha, beta = self._weights(gs, rows)
        remainder = torch.bmm(alpha.unsqueeze(1), gs).squeeze(1)
        z = torch.bmm(alpha.unsqueeze(1), zs).squeeze(1) + beta * remainder
        extra = torch.linalg.vector_norm(remainder, dim=1) if torch.is_grad_enabled() else None
        return Step(z, HyperAndersonState(zs, gs, rows, extra))

    def _weights(self, gs: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """α (R, k) and β (R, 1)."""
        count, steps = gs.shape[1], self.config.memory + 1
        sizes = pooled[..., self.layout.channels :].square().mean(2, keepdim=True).sqrt()
        features = [pooled / sizes[:, -1:], (sizes / sizes[:, -1:]).log(), sizes.log().expand_as(sizes) / 5]
        if self.config.gram:
            unit = gs / torch.linalg.vector_norm(gs, dim=2, keepdim=True).clamp_min(torch.finfo(gs.dtype).tiny ** 0.5)
            gram = torch.bmm(unit, unit.transpose(1, 2))
            features.append(nn.functional.pad(gram, (steps - count, 0)))
        series = nn.functional.pad(torch.cat(features, dim=2), (0, 0, steps - count, 0)).transpose(1, 2)
        found = self.outward(torch.relu(self.inward(series)))[:, :, -count:]
        newest = torch.arange(count, device=gs.device) == count - 1
        alpha = found[:, 0] + newest
        alpha = alpha + (1 - alpha.sum(dim=1, keepdim=True)) / count
        return alpha, 1 + found[:, 1, -1:]
