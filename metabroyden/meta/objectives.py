"""What meta-training minimises: weighted sums of residuals over the iterations of an unroll."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("log", "plain", "normalised")
WEIGHTS = ("linear", "uniform", "last")


@dataclass(frozen=True)
class ResidualObjective:
    """Σ_k w_k φ(ρ_k) averaged over samples, ρ_k the relative residual at iterate k = 0 … K, Σ w_k = 1.

    kind "log": φ = log₁₀ρ, every factor of ten counts alike at any depth (the default: it does not stall where the
    residual is already small). "plain": φ = ρ, the source's Σ w_t f(θ_t) (Andrychowicz et al. 2016, eq. 3); early
    iterates outweigh all others. "normalised": φ = ρ_k/ρ_0 (Venkataraman & Amos 2021); gamed by a worse start.
    All of them can be gamed where I − J is ill-conditioned: a small residual need not be a small distance to z*.
    weights "linear": w_k ∝ k + 1; "uniform"; "last": the last iterate alone.
    """

    kind: str = "log"
    weights: str = "linear"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"objective kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.weights not in WEIGHTS:
            raise ValueError(f"objective weights must be one of {', '.join(WEIGHTS)}, got {self.weights!r}")

    def __call__(self, residuals: Tensor) -> Tensor:
        """The scalar loss of relative residuals (K + 1, B)."""
        count = len(residuals)
        weights = torch.ones(count, dtype=residuals.dtype, device=residuals.device)
        if self.weights == "linear":
            weights = torch.arange(1, count + 1, dtype=residuals.dtype, device=residuals.device)
        elif self.weights == "last":
            weights = torch.zeros_like(weights).index_fill(0, torch.tensor(count - 1, device=weights.device), 1)
        if self.kind == "log":
            values = torch.log10(residuals.clamp_min(1e-12))
        else:
            values = residuals / residuals[0].detach() if self.kind == "normalised" else residuals
        return (weights / weights.sum()) @ values.mean(dim=1)
