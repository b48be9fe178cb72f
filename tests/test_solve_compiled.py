"""`solve(..., compiled=...)` makes chunks of steps as one graph, and finds what it finds without."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.testing import assert_close

import metabroyden as mb
from metabroyden import chunk
from metabroyden.solvers import Step
from metabroyden.zoo.models import MonotoneDense
from tests.helpers import DOUBLE as D
from tests.helpers import moved, normal, perturbed, refused

N = 8
W = 1.1 * normal(N, N, seed=3, dtype=D) / N**0.5
GAINS = torch.tensor([1e-3, 1e-2, 0.1, 1.0, 2.0, 3.0], dtype=D)
FIELDS = ("nfe", "steps", "converged", "status")


def f(z, x):
    return torch.tanh(z @ W.to(z) + x)


def problem(rows: int = 6, first: int = 0):
    """(z0, x) of samples that need different numbers of steps."""
    x = normal(len(GAINS), N, seed=1, dtype=D) * GAINS[:, None]
    x = x.repeat(2, 1)[first : first + rows]
    return torch.zeros_like(x), x


@pytest.fixture(autouse=True)
def nothing_compiled():
    chunk._KNOWN.clear()
    torch._dynamo.reset()
    yield
    chunk._KNOWN.clear()
    torch._dynamo.reset()


def graphs() -> int:
    """Graphs made so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compare(f, z0, context=None, backend="eager", every=4, **options):
    """Solve with and without `compiled`: the same, a second time without compiling. (solution, graphs made)."""
    options = {"rtol": 1e-6, "max_nfe": 12, "throw": False} | options
    usual, before = mb.solve(f, z0, context, check_every=every, **options), graphs()
    given = {} if every == chunk.LENGTH else {"check_every": every}
    made = []
    for _ in range(2):
        ours = mb.solve(f, z0, context, compiled=backend, **given, **options)
        for name in FIELDS:
            assert torch.equal(getattr(ours, name), getattr(usual, name)), name
        made.append(graphs() - before - sum(made))
        assert_close(ours.z, usual.z, rtol=1e-9, atol=1e-12)
        assert_close(ours.residual, usual.residual, rtol=1e-6, atol=1e-12, equal_nan=True)
        for here, there in zip(ours.snapshots, usual.snapshots, strict=True):
            assert_close(here, there, rtol=1e-9, atol=1e-12)
    assert made[1] == 0, "the second solve compiles nothing"
    return ours, usual, made[0]


CONTEXTS = {
    "tensor": (f, lambda x: x),
    "dict": (lambda z, c: c["s"] * torch.tanh(z @ c["w"] + c["x"]), lambda x: {"x": x, "w": mb.Shared(W), "s": 1.0}),
}


@pytest.mark.parametrize(
    ("solver", "context", "backend"),
    [
        (mb.Picard(0.9), "tensor", "eager"),
        (mb.Anderson(memory=2), "dict", "aot_eager"),
        (mb.Broyden(memory=4), "tensor", "eager"),
    ],
    ids=str,
)
def test_it_finds_what_it_finds_uncompiled_while_rows_leave_at_different_times(solver, context, backend):
    function, of = CONTEXTS[context]
    z0, x = problem()
    ours, usual, made = compare(function, z0, of(x), backend, solver=solver, rtol=1e-2)
    assert len(set(ours.nfe.tolist())) >= 2, "or nothing was gathered"
    assert 0 < made <= 3
    assert_close(ours.trace.residual, usual.trace.residual, rtol=1e-6, atol=1e-12, equal_nan=True)
    assert torch.equal(ours.trace.nfe, usual.trace.nfe)


def test_one_graph_serves_any_number_of_rows_and_another_a_single_one():
    made = [compare(f, *problem(rows), solver=mb.Picard(), rtol=1e-2)[2] for rows in (12, 9, 7, 3, 4)]
    assert made == [2, 0, 0, 0, 0]  # of three steps after the first evaluation, then of four
    assert compare(f, *problem(1, first=2), solver=mb.Picard(), rtol=1e-6)[2] == 2


def test_graphs_for_contexts_of_many_shapes_are_all_kept():
    mean, (z0, x) = lambda z, c: f(z, c[0] + c[1].mean(1, keepdim=True)), problem()
    solve = lambda length: compare(mean, z0, (x, z0.new_ones(6, length)), solver=mb.Picard(), max_nfe=4)[2]  # noqa: E731
    assert [solve(length) for length in range(2, 12)] == [1] * 10
    assert solve(2) == 0


def test_of_a_function_without_a_context_the_whole_batch_goes_on():
    z0, x = problem()
    ours, _, made = compare(lambda z: f(z, x), z0, solver=mb.Picard(), rtol=1e-2)
    assert len(set(ours.nfe.tolist())) >= 2
    assert made <= 4


def test_a_learned_solver_hands_over_between_chunks():
    safeguard = mb.Safeguard(horizon=5, patience=4, progress=0.8, resumed_patience=4)
    solver = moved("meta-broyden", N, safeguard=safeguard, initializer_width=8)
    ours, *_ = compare(f, *problem(), solver=solver, max_nfe=16, rtol=1e-4)
    assert ours.trace.phase.max() >= 1
    assert ours.nfe.unique().numel() >= 2


def test_a_state_of_several_tensors_in_half_precision_with_snapshots():
    two = lambda z, x: (f(z[1], x.to(z[1])), torch.sin(0.3 * z[0]))  # noqa: E731
    (z0, x), options = problem(), {"solver": mb.Picard(), "rtol": 3e-2, "max_nfe": 13, "snapshots": (2, 7)}
    z0, x = z0.float(), x.float()
    ours, *_ = compare(two, (z0, z0), x, f_dtype=torch.bfloat16, **options)
    assert ours.z[0].dtype == torch.float32


class Dear:
    """No solver of ours: costs two evaluations a step, the last one at the next iterate, and asks for all that there is."""

    min_nfe = 2

    def start(self, z0, problem):
        return z0

    def init(self, z, g, problem):
        return ()

    def step(self, z, g, state, problem):
        half = z + 0.5 * g
        z_next = problem.image(half, problem.residual(half)) + 0.0 * problem.origin() + 0.0 * problem.context
        return Step(z_next, state, problem.residual(z_next))


@pytest.mark.parametrize("budget", [10, 11])
def test_a_step_may_cost_several_evaluations(budget):
    ours, *_ = compare(f, *problem(), solver=Dear(), max_nfe=budget, rtol=1e-3, every=2)
    assert ours.steps.max() == (budget - 1) // 2


def test_a_value_that_is_not_finite_ends_its_sample_and_touches_no_other():
    grows = lambda z, x: torch.where(x > 1, 1e200 * (z + x), 0.5 * z + x)  # noqa: E731
    x = torch.tensor([[0.1], [2.0], [0.3]], dtype=D)
    ours, *_ = compare(grows, torch.zeros_like(x), x, solver=mb.Picard(), rtol=1e-2)
    assert ours.status.tolist() == [mb.Status.CONVERGED, mb.Status.NON_FINITE, mb.Status.CONVERGED]


def test_what_is_compiled_goes_with_f_and_with_the_solver():
    def solved(keep_f: bool):
        cell, (z0, x) = (f if keep_f else lambda z, x: f(z, x)), problem()
        learned = perturbed(mb.MetaBroyden(layout=mb.Layout("vector", (N,)), initializer_width=0).double(), 0.01)
        mb.solve(cell, z0, x, solver=learned, compiled="eager", max_nfe=5, throw=False)
        assert any("compiled_fn" in name for name in vars(chunk))
        return weakref.ref(learned), weakref.ref(cell)

    for keep_f in (True, False):
        learned, cell = solved(keep_f)
        gc.collect()
        assert learned() is None
        assert (cell() is None) != keep_f
        assert not any("compiled_fn" in name for name in vars(chunk))


def test_what_cannot_be_compiled_runs_all_the_same_and_says_so_once():
    def looks(z, x):
        return z if float(z.sum()) > 1e9 else f(z, x)

    (z0, x), options = problem(), {"solver": mb.Picard(), "rtol": 1e-2, "max_nfe": 12, "throw": False}
    with pytest.warns(UserWarning, match="solve runs uncompiled: ") as seen:
        ours = mb.solve(looks, z0, x, compiled="eager", **options)
    assert seen[0].filename == __file__
    again, usual = mb.solve(looks, z0, x, compiled="eager", **options), mb.solve(f, z0, x, check_every=4, **options)
    for solution in (ours, again):
        assert torch.equal(solution.z, usual.z)
        assert torch.equal(solution.nfe, usual.nfe)


def test_a_step_that_changes_its_iterate_is_refused():
    class Careless(mb.Picard):
        def step(self, z, g, state, problem):
            return Step(z.add_(g), state)

    call = lambda: mb.solve(f, *problem(), solver=Careless(), compiled="eager")  # noqa: E731
    refused("changed the iterate z in place", call)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": mb.Newton()}, r"compiled=\.\.\.\) needs a solver whose steps cost a known number .*; Newton"),
        ({"solver": mb.Broyden(line_search=True)}, r"line_search=True.* decides on the way"),
        ({"compiled": "fast"}, "compiled must be True, False or the name of a backend of torch.compile.*got 'fast'"),
        ({"compiled": 1.5}, "compiled must be True, False or the name of a backend of torch.compile.*got 1.5"),
    ],
)
def test_bad_input_is_refused(options, words):
    refused(words, lambda: mb.solve(f, *problem(), **({"solver": mb.Picard(), "compiled": True} | options)))


def test_a_solver_that_uses_parts_of_f_is_refused():
    cell, z0 = MonotoneDense(N), torch.zeros(2, N)
    call = lambda: mb.solve(cell, z0, z0, solver=mb.PeacemanRachford(), compiled=True)  # noqa: E731
    refused("evaluates f as a whole, and .* uses parts of it", call)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of the compiler
def test_by_default_inductor_compiles():
    compare(f, *problem(), True, solver=mb.Picard(), max_nfe=4, rtol=1e-2)
