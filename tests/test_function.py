"""What a solve promises holds for every solver, in both drivers, whatever surrounds it and whatever f does.

A thousand random problems, each in one of several surroundings: autocast, inference mode, a second thread, an f that writes
its value where it wrote the last one, that works in place, or that writes to its context.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import metabroyden as mb
from metabroyden.learned.layout import Layout
from metabroyden.meta.fit import make_learned
from tests.solvers.test_contract import FAMILIES, _random_map

CLASSICAL = {
    "picard": mb.Picard(0.9),
    "anderson": mb.Anderson(memory=3),
    "broyden": mb.Broyden(memory=4),
    "broyden-bad": mb.Broyden(kind="bad"),
    "broyden-search": mb.Broyden(line_search=True),
    "newton": mb.Newton(krylov=3),
}
SOLVERS = [*CLASSICAL, *mb.list_solvers(learned=True, splitting=False, adjoint=False)]
SURROUNDINGS = ("plain", "inference", "autocast", "threads", "buffer", "gradients", "in place", "writes context")


@cache
def _learned(name: str, n: int, dtype: torch.dtype):
    """A learned solver of vectors that is not at its neutral start."""
    options = {"classical": mb.Anderson(memory=3)} if name == "started" else {}
    solver = make_learned(name, Layout("vector", (n,)), seed=n, **options).to(dtype)
    g = torch.Generator().manual_seed(n)
    for parameter in solver.parameters():
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=g, dtype=torch.float64).to(dtype)
    return solver.requires_grad_(False).eval()


def _solver(name: str, n: int, dtype: torch.dtype):
    return CLASSICAL[name] if name in CLASSICAL else _learned(name, n, dtype)


class Asked:
    """f(z, (x, numbers)) in one of the surroundings; counts its rows."""

    def __init__(self, inner, scale: float, batch: int, what: str) -> None:
        self.inner, self.scale, self.what = inner, scale, what
        self.counts = np.zeros(batch, dtype=np.int64)
        self.buffers: dict[tuple[int, ...], torch.Tensor] = {}

    def value(self, z, x):
        return self.scale * self.inner(z / self.scale, x)

    def __call__(self, z, context):
        x, numbers = context
        np.add.at(self.counts, numbers.numpy(), 1)
        fz = self.value(z, x)
        if self.what == "gradients":
            with torch.inference_mode(False), torch.enable_grad():
                return fz + 0 * torch.zeros(1, dtype=z.dtype, requires_grad=True)
        if self.what == "buffer":
            kept = self.buffers.setdefault(tuple(z.shape), torch.empty_like(fz))
            return kept.copy_(fz)
        if self.what == "in place":
            return z.copy_(fz)
        if self.what == "writes context":
            x.mul_(0.9)
        return fz


def _run(f: Asked, z0, context, solver, *, fixed: bool, budget: int, rtol: float) -> mb.Solution:
    if fixed:
        return mb.FixedBudget(f, solver, max_nfe=budget, rtol=rtol, compiled=False)(z0, context)
    return mb.solve(f, z0, context, solver=solver, rtol=rtol, max_nfe=budget, throw=False)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(nan=-1.0), other.nan_to_num(nan=-1.0))


@settings(max_examples=1000, deadline=None)
@given(
    what=st.sampled_from(SURROUNDINGS),
    family=st.sampled_from(FAMILIES),
    name=st.sampled_from(SOLVERS),
    fixed=st.booleans(),
    batch=st.integers(0, 5),
    n=st.integers(1, 6),
    gain=st.floats(0.0, 5.0),
    power=st.integers(-20, 20),
    double=st.booleans(),
    rtol=st.sampled_from([0.0, 1e-9, 1e-4, 1e-1]),
    budget=st.integers(1, 25),
    seed=st.integers(0, 10**6),
)
def test_no_surroundings_make_a_solve_lie(what, family, name, fixed, batch, n, gain, power, double, rtol, budget, seed):
    dtype = torch.float64 if double else torch.float32
    solver = _solver(name, n, dtype)
    fixed = fixed and solver.fixed_cost
    x = torch.randn(batch, n, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64).to(dtype)
    z0, scale, inner = torch.zeros(batch, n, dtype=dtype), 10.0**power, _random_map(family, n, gain, seed)
    options = {"fixed": fixed, "budget": budget, "rtol": rtol}

    def ask() -> tuple[Asked, mb.Solution]:
        f = Asked(inner, scale, batch, what)
        return f, _run(f, z0.clone(), (x.clone(), torch.arange(batch)), solver, **options)

    if what in ("in place", "writes context") and batch:
        with pytest.raises(ValueError, match="in place" if what == "in place" else "context"):
            ask()
        return
    with ExitStack() as stack:
        if what == "inference":
            stack.enter_context(torch.inference_mode())
        if what == "autocast":
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        f, solution = ask()
        again = mb.relative_residual(solution.z, f.value(solution.z, x))
    _check_truth(solution, again, rtol, budget)
    assert solution.z.dtype == solution.residual.dtype == dtype
    if name != "newton":  # its finite differences and forward products are counted in test_contract
        np.testing.assert_array_equal(solution.nfe.numpy(), f.counts)
    if what == "threads":
        _check_threads(solution, lambda: ask()[1])


def _check_truth(solution: mb.Solution, again: torch.Tensor, rtol: float, budget: int) -> None:
    """What a solution says of every sample agrees with the residuals recomputed."""
    atol = 1e-12 if again.dtype == torch.float64 else 1e-6
    assert not solution.z.requires_grad
    assert not solution.residual.requires_grad
    assert torch.isfinite(solution.z).all()
    torch.testing.assert_close(again, solution.residual, rtol=1e-4, atol=atol, equal_nan=True)
    assert (solution.residual.isnan() <= (solution.status == mb.Status.NON_FINITE)).all()
    assert ((solution.status == mb.Status.CONVERGED) == solution.converged).all()
    assert (solution.residual[solution.converged] <= rtol * (1 + 1e-6)).all()
    assert ((solution.nfe >= 1) & (solution.nfe <= budget)).all()


def _check_threads(solution: mb.Solution, ask) -> None:
    """Two threads at once find the same, to the last bit."""
    found: list[mb.Solution] = []
    workers = [threading.Thread(target=lambda: found.append(ask())) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 2
    for other in found:
        assert _same(solution.z, other.z)
        assert _same(solution.residual, other.residual)
        assert torch.equal(solution.nfe, other.nfe)
