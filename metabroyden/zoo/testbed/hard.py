"""Problems made to expose a solver: divergent, cyclic, singular, vanishing, not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from metabroyden.zoo.testbed.base import ALL_FAIL, ALL_OPEN, KnownProblem, register


def _spread(batch: int, low: float, high: float, dtype: torch.dtype) -> Tensor:
    """(batch, 1) numbers from low to high."""
    return torch.linspace(low, high, batch, dtype=torch.float64).to(dtype)[:, None]


@register("divergent")
def divergent(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """f(z) = 2|z| + x, x > 0: no fixed point, and ‖f(z) − z‖ / ‖f(z)‖ is never below one half."""
    x = _spread(batch, 0.5, 2.0, dtype).expand(-1, 3).contiguous()
    correct = "No solver converges, and every one says so; z stays finite."
    return KnownProblem(lambda z, x: 2 * z.abs() + x, torch.zeros_like(x), x, correct, expects=ALL_FAIL)


@register("overflowing")
def overflowing(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """f(z) = x·(z⁴ + 1) with x > 1: no fixed point; a few plain steps leave the range of the dtype."""
    x = _spread(batch, 1.5, 4.0, dtype).expand(-1, 2).contiguous()
    correct = "Failure is reported, nothing raises, the best iterate kept is finite."
    return KnownProblem(lambda z, x: x * (z**4 + 1), torch.zeros_like(x), x, correct, expects=ALL_FAIL)


@register("cyclic")
def cyclic(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """f(z) = x − z: Picard alternates between two points for ever; z* = x/2."""
    x = _spread(batch, 1.0, 3.0, torch.float64).expand(-1, 2).contiguous()
    correct = "Picard cycles to the end of its budget; the others converge in a handful of evaluations."
    return KnownProblem(
        lambda z, x: x - z, torch.zeros(batch, 2, dtype=dtype), x.to(dtype), correct, x / 2, expects={"picard": "fails"}
    )


@register("logistic")
def logistic(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """f(z) = r z (1 − z) from z = 0.5, r in [3.2, 3.5]: an attracting cycle round the repelling z* = 1 − 1/r."""
    r = _spread(batch, 3.2, 3.5, torch.float64)
    correct = "Picard settles on a cycle and reports failure; the others converge to 1 − 1/r."
    z0, star = torch.full((batch, 1), 0.5, dtype=dtype), 1 - 1 / r
    return KnownProblem(lambda z, r: r * z * (1 - z), z0, r.to(dtype), correct, star, expects={"picard": "fails"})


@register("singular_jacobian")
def singular_jacobian(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """f(z) = z − (z − x)²/2 from z = x + 1: I − J vanishes at z* = x, convergence is at best linear."""
    x = _spread(batch, 2.0, 4.0, torch.float64)
    correct = "Slow progress towards x; what is reported as converged has a true residual, though z is far from x."
    return KnownProblem(
        lambda z, x: z - 0.5 * (z - x) ** 2, (x + 1).to(dtype), x.to(dtype), correct, None, expects=ALL_OPEN
    )


@register("vanishing")
def vanishing(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """f(z) = z/2: z* = 0, where a relative residual is 0/0; on the way there it is one at every z."""
    z0 = _spread(batch, 1.0, 3.0, dtype).expand(-1, 3).contiguous()
    correct = "Picard approaches zero at a relative residual of one and reports failure; others may hit zero exactly."
    return KnownProblem(
        lambda z, x: 0.5 * z + 0 * x, z0, torch.zeros_like(z0), correct, expects=ALL_OPEN | {"picard": "fails"}
    )


@register("nan_throwing")
def nan_throwing(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """f(z) = √(x − z) from z = 0: not finite at the start for x < 0, where z > x after a long step; else z* exists."""
    x = _spread(batch, -1.0, 2.0, torch.float64)
    correct = "What is not finite at the start comes back as z0, the rest with a true residual; samples stay apart."
    return KnownProblem(
        lambda z, x: torch.sqrt(x - z), torch.zeros(batch, 1, dtype=dtype), x.to(dtype), correct, expects=ALL_OPEN
    )


@register("done_at_once")
def done_at_once(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """f(z) = x from z0 = x: the first evaluation verifies the answer."""
    x = _spread(batch, 1.0, 2.0, dtype).expand(-1, 2).contiguous()
    correct = "One evaluation, residual zero."
    return KnownProblem(lambda z, x: x + 0 * z, x.clone(), x, correct, x.double(), contractive=True)
