"""Solving with a fixed budget gives what `solve` gives, compiled, exported or not, with nobody looking."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import metabroyden as mb
from metabroyden.solvers import Step
from metabroyden.zoo.testbed import make_problem
from tests.helpers import DOUBLE as D
from tests.helpers import Reuses, contraction, fixed, inputs, moved, solved

SOLVERS = [mb.Picard(0.9), mb.Anderson(memory=3), mb.Broyden(memory=4), mb.Broyden(memory=4, kind="bad")]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("name", ["tanh_gaussian_1.5", "two_tensors", "nan_throwing", "logistic"])
def test_it_finds_what_solve_finds_for_a_constant_cost(name, solver):
    problem, options = make_problem(name), {"solver": solver, "max_nfe": 11, "rtol": 1e-5}
    ours, usual = (run(problem.f, problem.z0, problem.context, **options) for run in (fixed, solved))
    assert ours.nfe.tolist() == [11] * 8
    assert torch.equal(ours.converged, usual.converged)
    assert_close(ours.residual, usual.residual, rtol=1e-6, atol=1e-12, equal_nan=True)
    assert_close(ours.z, usual.z, rtol=1e-6, atol=1e-9)
    assert ours.trace.residual.shape == (11, 8)
    assert (ours.status[~ours.converged] != mb.Status.CONVERGED).all()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of the compiler
def test_compiled_it_finds_the_same_and_says_how_long_compiling_took():
    problem, solver = make_problem("tanh_gaussian_1.5", dtype=torch.float32), mb.Broyden(memory=2)
    run = mb.FixedBudget(problem.f, solver, max_nfe=3)
    compiled, once = run(problem.z0, problem.context), run.compile_seconds
    assert once > 0
    run(problem.z0, problem.context)
    assert run.compile_seconds == once
    eager = fixed(problem.f, problem.z0, problem.context, solver=solver, max_nfe=3)
    assert_close(compiled.z, eager.z, rtol=1e-5, atol=1e-6)
    assert_close(compiled.residual, eager.residual, rtol=1e-3, atol=1e-6)


def test_what_cannot_be_compiled_runs_all_the_same(monkeypatch):
    def no_compiler(function, **options):
        def broken(*arguments):
            raise RuntimeError("no C++ compiler found")

        return broken

    monkeypatch.setattr(torch, "compile", no_compiler)
    run = mb.FixedBudget(torch.cos, mb.Picard(), max_nfe=3)
    with pytest.warns(UserWarning, match=r"FixedBudget runs uncompiled: RuntimeError: no C\+\+ compiler found"):
        assert run(torch.zeros(2, 2)).nfe.tolist() == [3, 3]
    run(torch.zeros(2, 2))  # said once
    with pytest.raises(ZeroDivisionError):  # f's own errors stay its own
        mb.FixedBudget(lambda z: z + 1 / 0, mb.Picard(), max_nfe=3)(torch.zeros(2, 2))


def test_a_learned_solver_runs_its_learned_steps():
    problem = make_problem("tanh_gaussian_0.95")
    options = {"solver": moved("grouped", 32, safeguard=None), "max_nfe": 8}
    ours, usual = (run(problem.f, problem.z0, problem.context, **options) for run in (fixed, solved))
    assert_close(ours.z, usual.z, rtol=1e-6, atol=1e-8)


def test_bfloat16_and_plain_closures():
    problem = make_problem("tanh_gaussian_0.95", dtype=torch.float32)
    half = lambda z: problem.f(z.float(), problem.context).bfloat16()  # noqa: E731
    solution = fixed(half, problem.z0, solver=mb.Anderson(), max_nfe=12, rtol=1e-2, f_dtype=torch.bfloat16)
    assert solution.converged.all()
    assert solution.z.dtype == torch.float32


@pytest.mark.parametrize(
    ("solver", "options", "words"),
    [
        (mb.Newton(), {"max_nfe": 9}, "FixedBudget needs a solver whose steps cost a known number of evaluations"),
        (mb.Broyden(line_search=True), {"max_nfe": 9}, "decides on the way"),
        (mb.Picard(), {"max_nfe": 0}, "max_nfe must be an integer of at least 1, got 0"),
        (mb.Picard(), {"max_nfe": 5, "rtol": -1.0}, "rtol must be a finite number"),
    ],
)
def test_bad_input_is_refused(solver, options, words):
    with pytest.raises(ValueError, match=words):
        mb.FixedBudget(torch.cos, solver, **options)
    with pytest.raises(ValueError, match="finite"):
        fixed(torch.cos, torch.full((2, 2), torch.nan), solver=mb.Picard(), max_nfe=3)
    with pytest.raises(ValueError, match="wanted 5 rows as in z0"):
        fixed(contraction, torch.zeros(5, 2), torch.zeros(3, 2), solver=mb.Picard(), max_nfe=3)


class Model(torch.nn.Module):
    def __init__(self, solver) -> None:
        super().__init__()
        self.linear, self.solver = torch.nn.Linear(4, 4), solver

    def forward(self, x):
        f = lambda z, c: torch.tanh(0.5 * self.linear(z) + c)  # noqa: E731
        return mb.FixedBudget(f, self.solver, max_nfe=4, compiled=False)(torch.zeros_like(x), x).z


@pytest.mark.filterwarnings("ignore")  # of the exporter, about its own parts
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("solver", [mb.Picard(), mb.Anderson(memory=2), mb.Broyden(memory=2)], ids=str)
def test_a_model_with_a_fixed_budget_can_be_exported_for_any_batch(solver, strict):
    model, x = Model(solver).eval(), torch.randn(3, 4)
    sizes = ({0: torch.export.Dim("batch", min=2)},)
    exported = torch.export.export(model, (x,), dynamic_shapes=sizes, strict=strict).module()
    for given in (2 * x, torch.randn(7, 4)):
        assert_close(exported(given), model(given), rtol=1e-5, atol=1e-6)


def test_of_a_compiled_run_f_is_looked_at_once_for_each_shape(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    calls = []
    run = mb.FixedBudget(lambda z, x: calls.append(1) or 0.5 * z + x, mb.Picard(), max_nfe=3)
    for rows, spent in ((4, 4), (4, 7), (2, 11)):
        assert run(torch.zeros(rows, 2), torch.ones(rows, 2)).nfe.tolist() == [3] * rows
        assert len(calls) == spent
    careless = mb.FixedBudget(lambda z, x: z.mul_(0.5), mb.Picard(), max_nfe=3)
    with pytest.raises(ValueError, match="in place"):
        careless(torch.zeros(4, 2), torch.ones(4, 2))


def test_solvers_may_ask_for_the_image_to_the_last_bit():
    seen = []

    class Asking(mb.Picard):
        def step(self, z, g, state, problem):
            seen.append((problem.image(z, g), torch.cos(z), problem.image(z.clone(), g), z + g))
            return super().step(z, g, state, problem)

    fixed(torch.cos, torch.randn(3, 2), solver=Asking(), max_nfe=4)
    assert len(seen) == 3
    for image, true, other, total in seen:
        assert torch.equal(image, true)
        assert torch.equal(other, total)


@pytest.mark.parametrize(("rtol", "atol"), [(1e-2, 0.0), (0.0, 1e-2), (1e-3, 1e-2)])
def test_the_first_iterate_within_the_tolerances_is_returned_though_later_ones_are_better(rtol, atol):
    options = {"solver": mb.Picard(), "max_nfe": 14, "rtol": rtol, "atol": atol}
    ours, usual = (run(contraction, *inputs(), **options) for run in (fixed, solved))
    assert torch.equal(ours.z, usual.z)
    assert_close(ours.residual, usual.residual, rtol=1e-12, atol=0)
    assert ours.status.tolist() == [mb.Status.CONVERGED] * 5
    assert (ours.trace.residual[-1] < ours.residual)[2:].all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_is_named_unless_the_sample_had_converged(value):
    calls, others, options = [], [0, 1, 2, 4], {"solver": mb.Picard(), "max_nfe": 9, "rtol": 2e-2}

    def f(z, x):
        calls.append(1)
        image = contraction(z, x)
        for row, call in ((3, 3), (4, 9), (1, 9)):
            if len(calls) == call:
                image[row] = value
        return image

    solution, healthy = fixed(f, *inputs(), **options), fixed(contraction, *inputs(), **options)
    assert solution.status.tolist() == [0, 0, 0, mb.Status.NON_FINITE, 0]
    assert torch.isfinite(solution.z).all()
    assert torch.equal(solution.z[others], healthy.z[others])
    assert_close(solution.residual[3], solution.trace.residual[1, 3])
    assert solution.trace.absolute[2:, 3].isnan().all()


class Dear(mb.Picard):
    """Costs three evaluations a step, and looks at what it may spend and at f(z0)."""

    min_nfe = 3

    def init(self, z, g, problem):
        assert problem.shape == (4,)
        assert_close(problem.origin(), contraction(torch.zeros_like(z), problem.context))
        return [problem.steps_left]

    def step(self, z, g, state, problem):
        assert_close(problem.origin(), contraction(torch.zeros_like(z), problem.context))
        assert state[-1] == problem.steps_left
        state.append(problem.steps_left - 3)
        for _ in range(2):
            z = z + problem.residual(z)
        return Step(z + g, state)


def test_a_dear_step_is_made_only_where_the_budget_reaches_and_f_at_z0_is_known():
    for budget, spent in ((3, 1), (4, 4), (5, 4), (6, 4), (7, 7), (9, 7)):
        solution = fixed(Reuses(contraction), *inputs(), solver=Dear(), max_nfe=budget)
        assert solution.nfe.tolist() == [spent] * 5
        assert solution.trace.residual.shape == (spent, 5)


@pytest.mark.parametrize("width", [0, 8])
def test_it_keeps_the_first_image_and_the_budget(width):
    learned, x, w = moved("grouped", 8, torch.float32, initializer_width=width), torch.randn(5, 8), torch.randn(8, 8)
    f, calls = lambda z, x: torch.tanh(0.2 * z @ w.T + x), []
    for budget in (1, 2, 8):
        calls.clear()
        counted = lambda z, x: calls.append(1) or f(z, x)  # noqa: E731
        ours = fixed(Reuses(counted), torch.zeros(5, 8), x, solver=learned, max_nfe=budget)
        assert len(calls) == budget
        assert ours.nfe.tolist() == [budget] * 5
        assert torch.equal(ours.z, fixed(f, torch.zeros(5, 8), x, solver=learned, max_nfe=budget).z)


def test_it_solves_a_converted_network_by_substitution():
    net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).to(D).requires_grad_(False)
    deq, x = mb.to_deq(net).deq, torch.randn(4, 5, dtype=D)
    found = fixed(deq.cell, deq.cell.initial_state(x), x, solver=deq.solver, max_nfe=7, rtol=0.0)
    assert found.converged.all()
    assert_close(found.z[-1], net(x))
