"""What meta-training minimises, over the iterations of an unroll."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from metabroyden.meta.unroll import Rollout

KINDS = ("log", "plain", "normalised")
WEIGHTS = ("linear", "uniform", "last")


class Objective(Protocol):
    """A loss of rollouts. `needs_star`: whether it wants the equilibria."""

    needs_star: bool

    def loss(self, rollout: Rollout, star: Tensor | None, done: float) -> Tensor:
        """The scalar loss; star (B, n) are equilibria, done in [0, 1) is how far meta-training has got."""
        ...


def weighted(values: Tensor, weights: str) -> Tensor:
    """Σ_k w_k v_k for values (K + 1,), Σ w_k = 1: "linear" w_k ∝ k + 1, "uniform", or "last", the last alone."""
    count = len(values)
    if weights == "last":
        return values[-1]
    if weights == "uniform":
        return values.mean()
    w = torch.arange(1, count + 1, dtype=values.dtype, device=values.device)
    return (w / w.sum()) @ values


@dataclass(frozen=True)
class ResidualObjective:
    """Σ_k w_k φ(ρ_k) averaged over samples, ρ_k the relative residual at iterate k = 0 … K, Σ w_k = 1.

    kind "log": φ = log₁₀ρ, every factor of ten counts alike at any depth (the default: it does not stall where the
    residual is already small). "plain": φ = ρ, the source's Σ w_t f(θ_t) (Andrychowicz et al. 2016, eq. 3); early
    iterates outweigh all others. "normalised": φ = ρ_k/ρ_0 (Venkataraman & Amos 2021); gamed by a worse start.
    All of them can be gamed where I − J is ill-conditioned: a small residual need not be a small distance to z*.
    weights: see `weighted`.
    """

    kind: str = "log"
    weights: str = "linear"
    needs_star = False

    def __post_init__(self) -> None:
        _check("objective kind", self.kind, KINDS)
        _check("objective weights", self.weights, WEIGHTS)

    def __call__(self, residuals: Tensor) -> Tensor:
        """The scalar loss of relative residuals (K + 1, B)."""
        if self.kind == "log":
            values = torch.log10(residuals.clamp_min(1e-12))
        else:
            values = residuals / residuals[0].detach() if self.kind == "normalised" else residuals
        return weighted(values.mean(dim=1), self.weights)

    def loss(self, rollout: Rollout, star: Tensor | None, done: float) -> Tensor:
        """The scalar loss of a rollout."""
        return self(rollout.residuals)


@dataclass(frozen=True)
class CountObjective:
    """A smooth count of the evaluations until ρ_k is below each tolerance: Σ_k σ((log₁₀ρ_k − log₁₀ tol)/width), meaned.

    Near what is reported, evaluations to a tolerance; but its gradient vanishes on samples more than a few widths from
    every tolerance, so that those who need training most get least: gamed by giving up on hard samples. For fine-tuning.
    """

    tolerances: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4)
    width: float = 0.5
    kind: str = "count"
    needs_star = False

    def __post_init__(self) -> None:
        if not self.tolerances or not all(isinstance(t, float) and 0 < t < 1 for t in self.tolerances):
            raise ValueError(f"CountObjective: tolerances must be numbers in (0, 1), got {self.tolerances!r}")
        if not self.width > 0:
            raise ValueError(f"CountObjective: width must be positive, got {self.width!r}")

    def loss(self, rollout: Rollout, star: Tensor | None, done: float) -> Tensor:
        """The scalar loss of a rollout."""
        level = torch.log10(rollout.residuals.clamp_min(1e-12))
        counts = [torch.sigmoid((level - math.log10(t)) / self.width).sum(dim=0).mean() for t in self.tolerances]
        return torch.stack(counts).mean()


@dataclass(frozen=True)
class DistanceObjective:
    """Σ_k w_k log₁₀(‖z_k − z*‖/‖z*‖) averaged over samples: cannot be gamed by an ill-conditioned I − J.

    It needs the equilibria; where a problem has several, or none was found, it pulls to what the classical solver ended
    with. Slow modes, which are what a distance is made of late in a solve, get most of the gradient.
    """

    kind: str = "distance"
    weights: str = "linear"
    needs_star = True

    def __post_init__(self) -> None:
        _check("objective weights", self.weights, WEIGHTS)

    def loss(self, rollout: Rollout, star: Tensor | None, done: float) -> Tensor:
        """The scalar loss of a rollout."""
        levels = [torch.log10(distance.clamp_min(1e-12)).mean() for distance in _distances(rollout, star)]
        return weighted(torch.stack(levels), self.weights)


@dataclass(frozen=True)
class HyperObjective:
    """λ₁ Σ_k w_k ‖z_k − z*‖ + λ₂ ‖z_0 − z*‖ + λ₃ Σ_k ‖G_k α_k‖, of Bai, Koltun & Kolter (ICLR 2022), section 4.

    The three terms are a solver's convergence, its initializer, and its α's own (what remains of the residuals combined,
    which a solver leaves in its state as `extra`). w_k ∝ k + 1, Σ w_k = 1; λ₃ falls linearly to zero over the training.
    Norms are relative to ‖z*‖, so that samples weigh alike. Early iterates dominate its value, as in any sum of plain norms.
    """

    convergence: float = 1.0
    start: float = 0.1
    remainder: float = 0.1
    kind: str = "hyper"
    needs_star = True

    def loss(self, rollout: Rollout, star: Tensor | None, done: float) -> Tensor:
        """The scalar loss of a rollout."""
        distances = torch.stack([distance.mean() for distance in _distances(rollout, star)])
        loss = self.convergence * weighted(distances, "linear") + self.start * distances[0]
        if rollout.extra:
            assert star is not None
            size = torch.linalg.vector_norm(star, dim=1).clamp_min(1e-12)
            loss = (
                loss
                + (1 - done) * self.remainder * torch.stack([(extra / size).mean() for extra in rollout.extra]).mean()
            )
        return loss


def anchored(rollout: Rollout, star: Tensor) -> Tensor:
    """log₁₀(‖z_k − z*‖/‖z*‖ + 0.01), weighted by `weighted`, averaged over the samples whose z* (B, n) is no NaN.

    A term that keeps a solver in the basin of equilibria that are known: it falls from every iterate far away, and is flat
    once a solve is near. Zero where none is known.
    """
    known = ~star.isnan().any(dim=1)
    if not known.any():
        return star.new_zeros(())
    near = _distances(rollout._replace(iterates=tuple(z[known] for z in rollout.iterates)), star[known])
    return weighted(torch.stack([torch.log10(distance + 0.01).mean() for distance in near]), "linear")


OBJECTIVES: dict[str, Any] = {
    "residual": ResidualObjective,
    "count": CountObjective,
    "distance": DistanceObjective,
    "hyper": HyperObjective,
}
"""Objectives by name."""


def _distances(rollout: Rollout, star: Tensor | None) -> list[Tensor]:
    """‖z_k − z*‖/‖z*‖ of each iterate, (B,)."""
    if star is None:
        raise ValueError("this objective needs the equilibria")
    size = torch.linalg.vector_norm(star, dim=1).clamp_min(1e-12)
    return [torch.linalg.vector_norm(z - star, dim=1) / size for z in rollout.iterates]


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
