"""What a step costs beside f: passes over the states, and iterates that are kept."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import metabroyden as mb
from metabroyden.learned.layout import Layout
from tests.helpers import normal, perturbed

BATCH, SHAPE = 8, (4, 6, 6)
LEARNED = {"layout": Layout("image", SHAPE), "initializer_width": 0}


class Passes(TorchDispatchMode):
    """Counts the operations that read or write as many numbers as a batch of states has; not views of them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = function(*args, **(kwargs or {}))
        tensors = [one for one in (*args, value) if isinstance(one, torch.Tensor)]
        aliases = any(returned.alias_info and not returned.alias_info.is_write for returned in function._schema.returns)
        if not aliases and any(one.numel() >= BATCH * SHAPE[0] * SHAPE[1] * SHAPE[2] for one in tensors):
            self.seen[str(function)] += 1
        return value


def halfway(z, x):
    """A contraction in one pass."""
    return torch.lerp(z, x, 0.5)


def solved(how, solver, max_nfe, **options):
    z0, x = torch.zeros(BATCH, *SHAPE), normal(BATCH, *SHAPE)
    if how == "fixed":
        return mb.FixedBudget(halfway, solver, max_nfe=max_nfe, rtol=0.0, compiled=False)(z0, x)
    return mb.solve(halfway, z0, x, solver=solver, rtol=0.0, max_nfe=max_nfe, throw=False, **options)


@pytest.mark.parametrize("how", ["solve", "fixed"])
@pytest.mark.parametrize(
    ("solver", "most"),
    [
        (mb.Picard(0.5), 4),
        (mb.MetaBroyden(**LEARNED), 11),
    ],  # g, two norms, the step; two maps, two gates, w, m and P more
    ids=["picard", "meta-broyden"],
)
def test_a_step_makes_few_passes_over_the_states(solver, most, how):
    counts = []
    for max_nfe in (5, 10):
        with Passes() as passes:
            solved(how, solver, max_nfe)
        counts.append(passes.seen)
    beside_f = {name: count // 5 for name, count in (counts[1] - counts[0]).items()}
    beside_f["aten.lerp.Scalar"] -= 1
    assert sum(beside_f.values()) <= most, beside_f


@pytest.mark.parametrize(("options", "most"), [({}, 8), ({"keep_inverse": True}, 14)], ids=["plain", "keep_inverse"])
def test_learned_steps_keep_iterates_only_for_what_will_read_them(options, most):
    seen, alive = [], []

    def f(z, x):
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(z))
        return torch.lerp(z, x, 0.1)

    solver = perturbed(mb.MetaBroyden(layout=Layout("vector", (12,)), initializer_width=0), 0.01).requires_grad_(False)
    mb.solve(f, torch.zeros(3, 12), normal(3, 12), solver=solver, rtol=0.0, max_nfe=20, throw=False, **options)
    assert max(alive[:16]) <= most
    assert (max(alive[:16]) > 8) == bool(options)


def test_secant_steps_see_the_pairs_of_the_learned_ones_however_few_were_kept():
    """The trail begins so late that nothing is lost: as where it is kept from the first step."""
    solver = perturbed(mb.MetaBroyden(layout=Layout("image", SHAPE), learned_steps=8, memory=3), 0.05).requires_grad_(
        False
    )
    plain, kept = (solved("solve", solver, 14, keep_inverse=keep) for keep in (False, True))
    torch.testing.assert_close(plain.trace.residual, kept.trace.residual, rtol=0, atol=0, equal_nan=True)
    assert int(plain.nfe.min()) > 10, "or no secant step was taken"


def test_a_fixed_budget_judges_norms_of_any_size_alike():
    """Norms whose squares float32 does not hold, in a batch with ordinary ones; NaN; best iterates after a rise."""
    size = torch.tensor([1.0, 1e-30, 1e25, 1.0])[:, None]
    z0, x = torch.zeros(4, 3), size * normal(4, 3)
    x[3] = torch.nan
    run = mb.FixedBudget(halfway, mb.Picard(), max_nfe=12, rtol=1e-2, compiled=False)
    found, alone = run(z0, x), mb.solve(halfway, z0, x, solver=mb.Picard(), rtol=1e-2, max_nfe=12, throw=False)
    assert found.converged.tolist() == alone.converged.tolist() == [True, True, True, False]
    torch.testing.assert_close(found.z, alone.z, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.residual, alone.residual, equal_nan=True, rtol=1e-5, atol=0)
