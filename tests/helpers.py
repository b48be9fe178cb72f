"""What several test files share: tensors, cells and learned solvers made in a line, and refusals checked in one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metabroyden as mb
from metabroyden.learned.layout import Layout
from metabroyden.meta.fit import make_learned
from metabroyden.solvers import Step

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """Normal numbers that follow from the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def contexts(count: int, seed: int = 0) -> Tensor:
    """Contexts (count, 3, 4, 4) for `ConvTanh`."""
    return 0.5 * normal(count, 3, 4, 4, seed=seed)


def refused(words: str, call: Callable[[], Any], error: type[Exception] = ValueError) -> None:
    """The call raises this error, with these words."""
    with pytest.raises(error, match=words):
        call()


def vector(name: str, n: int, **options: Any) -> Any:
    """A learned solver for states (B, n), in float64."""
    return make_learned(name, Layout("vector", (n,)), **options).double()


def perturbed(solver: Any, size: float = 0.1, seed: int = 2) -> Any:
    """The solver, with noise of this size on its weights."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in solver.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator).to(parameter)
    return solver


def same_parameters(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same weights and buffers, bit for bit."""
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


class ConvTanh(nn.Module):
    """tanh(conv(z) + x) on 3 channels, which expands in a direction or two: plain Picard fails."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.conv.weight.data = 0.25 * normal(3, 3, 3, 3)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(z) + x)


# --- solves

CLASSICAL = {
    "picard": mb.Picard(),
    "anderson": mb.Anderson(),
    "broyden": mb.Broyden(),
    "broyden-bad": mb.Broyden(kind="bad"),
    "broyden-search": mb.Broyden(line_search=True),
    "newton": mb.Newton(),
}
FAMILIES = ("tanh", "linear", "relu", "cubic", "root", "quotient", "exponential", "step")


def random_map(family: str, n: int, gain: float, seed: int):
    """A random map of one of several kinds, acting on every row alone."""
    w = gain * normal(n, n, seed=seed, dtype=DOUBLE) / n**0.5
    times = lambda z: (z.unsqueeze(1) * w.to(z)).sum(2)  # noqa: E731
    return {
        "tanh": lambda z, x: torch.tanh(times(z) + x),
        "linear": lambda z, x: times(z) + x,
        "relu": lambda z, x: torch.relu(times(z) + x),
        "cubic": lambda z, x: times(z) ** 3 + x,
        "root": lambda z, x: torch.sqrt(times(z) + x),
        "quotient": lambda z, x: x / times(z),
        "exponential": lambda z, x: torch.exp(times(z)) - x,
        "step": lambda z, x: torch.sign(times(z)) * x,
    }[family]


@cache
def moved(name: str, n: int, dtype: torch.dtype = DOUBLE, size: float = 0.03, **options: Any):
    """A learned solver of vectors that is not at its neutral start."""
    options = {"classical": mb.Anderson(memory=3)} | options if name == "started" else options
    solver = perturbed(make_learned(name, Layout("vector", (n,)), seed=n, **options), size, seed=n)
    return solver.to(dtype).requires_grad_(False).eval()


def contraction(z: Tensor, x: Tensor) -> Tensor:
    return 0.4 * z.roll(1, 1) - 0.1 * z + x


def inputs(batch: int = 5, n: int = 4, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    """(z0, x) of `contraction`: sample 0 is solved at once, sample 1 soon."""
    x = normal(batch, n, seed=2, dtype=DOUBLE)
    x[0], x[1] = 0, 1e-2 * x[1]
    return torch.zeros(batch, n, dtype=dtype), x.to(dtype)


def shifted(z: Tensor, x: Tensor) -> Tensor:
    """z* = 2, with a relative residual that shrinks with ‖g‖."""
    return 2 + 0.1 * (z - 2) + 0 * x


class Steps:
    """Goes to given points, one after another, whatever f says. Its state: the steps made, and the samples' numbers."""

    def __init__(self, *points: list[float]) -> None:
        self.points = [torch.tensor(point, dtype=DOUBLE)[:, None] for point in points]

    def start(self, z0: Tensor, problem: Any) -> Tensor:
        return z0

    def init(self, z: Tensor, g: Tensor, problem: Any) -> tuple[int, Tensor]:
        return 0, torch.arange(len(z))

    def step(self, z: Tensor, g: Tensor, state: tuple[int, Tensor], problem: Any) -> Step:
        made, samples = state
        return Step(self.points[made][samples], (made + 1, samples))


class Reuses:
    """f that writes every value to the memory of the one before, of as many rows."""

    def __init__(self, f: Any) -> None:
        self.f, self.memory = f, {}

    def __call__(self, *arguments: Tensor) -> Tensor:
        value = self.f(*arguments)
        if torch._C._functorch.maybe_current_level() is not None:  # forward AD cannot write there
            return value
        return self.memory.setdefault(len(value), torch.empty_like(value)).copy_(value)


def fixed(f: Any, z0: Any, x: Any = None, *, solver: Any, **options: Any) -> mb.Solution:
    """What a fixed budget makes of a problem, uncompiled."""
    return mb.FixedBudget(f, solver, compiled=False, **options)(z0, x)


def solved(f: Any, z0: Any, x: Any = None, **options: Any) -> mb.Solution:
    """What `solve` makes of it, failures included."""
    return mb.solve(f, z0, x, **{"throw": False} | options)


DRIVERS = {"solve": solved, "fixed": fixed}


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the last bit, NaN in the same places."""
    return torch.equal(one.nan_to_num(nan=-1.0), other.nan_to_num(nan=-1.0))


def check_truth(solution: mb.Solution, again: Tensor, rtol: float, budget: int) -> None:
    """What a solution says of every sample agrees with the residuals recomputed."""
    atol = 1e-12 if again.dtype == DOUBLE else 1e-6
    assert not solution.z.requires_grad
    assert not solution.residual.requires_grad
    assert torch.isfinite(solution.z).all()
    torch.testing.assert_close(again, solution.residual, rtol=1e-4, atol=atol, equal_nan=True)
    assert (solution.residual.isnan() <= (solution.status == mb.Status.NON_FINITE)).all()
    assert ((solution.status == mb.Status.CONVERGED) == solution.converged).all()
    assert (solution.residual[solution.converged] <= rtol * (1 + 1e-6)).all()
    assert ((solution.nfe >= 1) & (solution.nfe <= budget)).all()
