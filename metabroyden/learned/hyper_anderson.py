"""Anderson acceleration whose weights and start a small network predicts, as in HyperDEQ (Bai et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metabroyden.learned.base import LearnedConfig, LearnedSolver
from metabroyden.learned.secants import put
from metabroyden.solver import Step
from metabroyden.solvers.registry import register


@dataclass(frozen=True)
class HyperAndersonConfig(LearnedConfig):
    """Adds to `LearnedConfig`, whose `hidden` is the width of the network here.

    Attributes:
        memory: m; the weights are those of the last m + 1 iterates.
        gram: whether the network also sees the residuals' inner products, as least squares would, beside pooled residuals.
        zero_output: whether the network's last map begins at zero, so that untrained it is Picard; else it begins as
            convolutions usually do, as published.
    """

    hidden: int = 32
    memory: int = 5
    gram: bool = False
    zero_output: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(memory=1)


class HyperAndersonState(NamedTuple):
    """Ring buffers of the last m + 1 iterates. R rows, n coordinates, C channels."""

    z: Tensor  # (R, m + 1, n)
    g: Tensor  # (R, m + 1, n)
    pooled: Tensor  # (R, m + 1, 2C) mean and root mean square of g by channel
    extra: Tensor | None  # (R,) ‖Σᵢ αᵢgᵢ‖ of the last step, a term of the published loss
    steps: int


@register("hyper-anderson")
class HyperAnderson(LearnedSolver):
    """z⁺ = Σᵢ αᵢ(zᵢ + βgᵢ) over the last m + 1 iterates, Σᵢ αᵢ = 1, with α and β of a network instead of least squares.

    Bai, Koltun & Kolter, Neural Deep Equilibrium Solvers, ICLR 2022, algorithm 2: each residual is pooled to a short vector,
    the vectors of the last m + 1 steps pass as a sequence through two convolutions over the steps, and what comes out is
    shifted so that it sums to one. Pooled are mean and root mean square of each channel, over that of the newest residual,
    beside log sizes; α and β are one number a sample, as published, so that for sequences the future is not kept out.
    The start is an `Initializer` of two narrow maps of width 3, the loss `HyperObjective`, the rate of Adam 1e-3.
    Before training α picks the newest iterate and β = 1: Picard; but see `zero_output`.
    """

    config_type = HyperAndersonConfig
    config: HyperAndersonConfig

    def __init__(self, config: HyperAndersonConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        config = self.config
        inputs = 2 * self.layout.channels + 2 + (config.memory + 1) * config.gram
        self.inward = nn.Conv1d(inputs, config.hidden, 3, padding=1)
        self.outward = nn.Conv1d(config.hidden, 2, 3, padding=1)
        if config.zero_output:
            for parameter in self.outward.parameters():
                nn.init.zeros_(parameter)

    def init(self, z: Tensor, g: Tensor, problem: Any) -> HyperAndersonState:
        """No iterates yet."""
        zs, gs, rows = (
            z.new_empty(len(z), self.config.memory + 1, size)
            for size in (z.shape[1], z.shape[1], 2 * self.layout.channels)
        )
        return HyperAndersonState(zs, gs, rows, None, 0)

    def step(self, z: Tensor, g: Tensor, state: HyperAndersonState, problem: Any) -> Step:
        """One learned step, (R, n)."""
        shape = self.layout.resolve(problem.shape)
        canonical = self.layout.canonical(g, shape).reshape(len(g), self.layout.channels, -1)
        tiny = torch.finfo(g.dtype).tiny ** 0.5
        pooled = torch.cat([canonical.mean(2), canonical.square().mean(2).clamp_min(tiny).sqrt()], dim=1)
        size = self.config.memory + 1
        slot, used = state.steps % size, min(state.steps + 1, size)
        kept = [put(old, new, slot) for old, new in ((state.z, z), (state.g, g), (state.pooled, pooled))]
        zs, gs, rows = (buffer[:, :used] for buffer in kept)
        oldest = slot + 1 if used == size else 0
        alpha, beta = self._weights(gs, rows, oldest)
        alpha = alpha.roll(oldest, 1).unsqueeze(1)
        remainder = torch.bmm(alpha, gs).squeeze(1)
        z = torch.addcmul(torch.bmm(alpha, zs).squeeze(1), beta, remainder)
        extra = torch.linalg.vector_norm(remainder, dim=1) if torch.is_grad_enabled() else None
        return Step(z, HyperAndersonState(kept[0], kept[1], kept[2], extra, state.steps + 1))

    def _weights(self, gs: Tensor, pooled: Tensor, oldest: int) -> tuple[Tensor, Tensor]:
        """α (R, k), the oldest first, and β (R, 1), for buffers whose oldest entry is at `oldest`."""
        count, steps = gs.shape[1], self.config.memory + 1
        pooled = pooled.roll(-oldest, 1)
        sizes = pooled[..., self.layout.channels :].square().mean(2, keepdim=True).sqrt()
        features = [pooled / sizes[:, -1:], (sizes / sizes[:, -1:]).log(), sizes.log().expand_as(sizes) / 5]
        if self.config.gram:
            unit = gs / torch.linalg.vector_norm(gs, dim=2, keepdim=True).clamp_min(torch.finfo(gs.dtype).tiny ** 0.5)
            gram = torch.bmm(unit, unit.transpose(1, 2)).roll((-oldest, -oldest), (1, 2))
            features.append(nn.functional.pad(gram, (steps - count, 0)))
        series = nn.functional.pad(torch.cat(features, dim=2), (0, 0, steps - count, 0)).transpose(1, 2)
        found = self.outward(torch.relu(self.inward(series)))[:, :, -count:]
        newest = torch.arange(count, device=gs.device) == count - 1
        alpha = found[:, 0] + newest
        alpha = alpha + (1 - alpha.sum(dim=1, keepdim=True)) / count
        return alpha, 1 + found[:, 1, -1:]
