"""What a solve promises holds for every solver, in both drivers, whatever surrounds it and whatever f does.

A thousand random problems, each in one of several surroundings: autocast, inference mode, a second thread, an f that writes
its value where it wrote the last one, that works in place, or that writes to its context.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import metabroyden as mb
from tests.helpers import DRIVERS, FAMILIES, check_truth, moved, random_map, same

CLASSICAL = (
    st.builds(mb.Picard, st.floats(0.1, 2)),
    st.builds(mb.Anderson, st.integers(1, 8), st.floats(0.1, 2), st.sampled_from([1e-14, 1e-8, 1e-2])),
    st.builds(mb.Broyden, st.integers(1, 12), st.floats(0.1, 2), st.sampled_from(["good", "bad"]), st.booleans()),
    st.builds(mb.Newton, st.floats(0.1, 2), st.integers(1, 6)),
)
LEARNED = mb.list_solvers(learned=True, splitting=False, adjoint=False)
SURROUNDINGS = ("plain", "closure", "inference", "autocast", "threads", "buffer", "gradients", "in place", "context")


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
            return self.buffers.setdefault(tuple(z.shape), torch.empty_like(fz)).copy_(fz)
        if self.what == "in place":
            return z.copy_(fz)
        if self.what == "context":
            x.mul_(0.9)
        return fz


@settings(max_examples=1000, deadline=None)
@given(
    what=st.sampled_from(SURROUNDINGS),
    family=st.sampled_from(FAMILIES),
    solver=st.one_of(*CLASSICAL, *[st.sampled_from(LEARNED)] * 4),
    fixed=st.booleans(),
    batch=st.integers(0, 5),
    n=st.integers(1, 10),
    gain=st.floats(0.0, 5.0),
    power=st.integers(-25, 25),
    double=st.booleans(),
    rtol=st.sampled_from([0.0, 1e-9, 1e-4, 1e-1]),
    budget=st.integers(1, 40),
    every=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_no_surroundings_make_a_solve_lie(
    what, family, solver, fixed, batch, n, gain, power, double, rtol, budget, every, seed
):
    dtype = torch.float64 if double else torch.float32
    solver = moved(solver, n, dtype) if isinstance(solver, str) else solver
    run, options = DRIVERS["fixed" if fixed and solver.fixed_cost else "solve"], {"max_nfe": budget, "rtol": rtol}
    if run is DRIVERS["solve"]:
        options["check_every"] = every
    x = torch.randn(batch, n, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64).to(dtype)
    z0, scale, inner = torch.zeros(batch, n, dtype=dtype), 10.0**power, random_map(family, n, gain, seed)

    def ask() -> tuple[Asked, mb.Solution]:
        f, context = Asked(inner, scale, batch, what), (x.clone(), torch.arange(batch))
        if what == "closure":  # nothing is gathered
            return f, run(lambda z: f(z, context), z0.clone(), solver=solver, **options)
        return f, run(f, z0.clone(), context, solver=solver, **options)

    if what in ("in place", "context") and batch:
        with pytest.raises(ValueError, match=what):
            ask()
        return
    around = {"inference": torch.inference_mode(), "autocast": torch.autocast("cpu", dtype=torch.bfloat16)}
    with around.get(what, nullcontext()):
        f, solution = ask()
        again = mb.relative_residual(solution.z, f.value(solution.z, x))
    check_truth(solution, again, rtol, budget)
    assert solution.z.dtype == solution.residual.dtype == dtype
    if what != "closure" and not isinstance(solver, mb.Newton):  # whose products are counted in test_contract
        np.testing.assert_array_equal(solution.nfe.numpy(), f.counts)
    if what == "threads":
        check_threads(solution, lambda: ask()[1])


def check_threads(solution: mb.Solution, ask) -> None:
    """Two threads at once find the same, to the last bit."""
    found: list[mb.Solution] = []
    workers = [threading.Thread(target=lambda: found.append(ask())) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 2
    for other in found:
        assert same(solution.z, other.z)
        assert same(solution.residual, other.residual)
        assert torch.equal(solution.nfe, other.nfe)
