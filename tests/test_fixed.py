"""Solving with a fixed budget gives what `solve` gives, compiled or not."""

from __future__ import annotations

import warnings

import pytest
import torch

import metabroyden as mb
from metabroyden.learned import GroupedConfig
from metabroyden.zoo.testbed import make_problem

SOLVERS = [mb.Picard(0.9), mb.Anderson(memory=3), mb.Broyden(memory=4), mb.Broyden(memory=4, kind="bad")]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("name", ["tanh_gaussian_1.5", "two_tensors", "nan_throwing", "logistic"])
def test_it_finds_what_solve_finds_for_a_constant_cost(name, solver):
    problem = make_problem(name)
    run = mb.FixedBudget(problem.f, solver, max_nfe=11, rtol=1e-5, compiled=False)
    fixed = run(problem.z0, problem.context)
    usual = mb.solve(problem.f, problem.z0, problem.context, solver=solver, rtol=1e-5, max_nfe=11, throw=False)
    assert fixed.nfe.tolist() == [11] * 8
    assert torch.equal(fixed.converged, usual.converged)
    torch.testing.assert_close(fixed.residual, usual.residual, rtol=1e-6, atol=1e-12, equal_nan=True)
    for ours, theirs in zip(*(z if isinstance(z, tuple) else (z,) for z in (fixed.z, usual.z)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    assert fixed.trace.residual.shape == (11, 8)
    assert (fixed.status[~fixed.converged] != mb.Status.CONVERGED).all()


def test_compiled_it_finds_the_same_and_says_how_long_compiling_took():
    problem = make_problem("tanh_gaussian_1.5", dtype=torch.float32)
    solver = mb.Broyden(memory=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the compiler, about its own parts
        warnings.simplefilter("ignore", DeprecationWarning)
        run = mb.FixedBudget(problem.f, solver, max_nfe=5)
        compiled = run(problem.z0, problem.context)
    once = run.compile_seconds
    assert once > 0
    run(problem.z0, problem.context)
    assert run.compile_seconds == once
    eager = mb.FixedBudget(problem.f, solver, max_nfe=5, compiled=False)(problem.z0, problem.context)
    torch.testing.assert_close(compiled.z, eager.z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compiled.residual, eager.residual, rtol=1e-3, atol=1e-6)


def test_what_cannot_be_compiled_runs_all_the_same(monkeypatch):
    def no_compiler(function, **options):
        def broken(*arguments):
            raise RuntimeError("no C++ compiler found")

        return broken

    monkeypatch.setattr(torch, "compile", no_compiler)
    run = mb.FixedBudget(torch.cos, mb.Picard(), max_nfe=3)
    with pytest.warns(UserWarning, match=r"FixedBudget runs uncompiled: RuntimeError: no C\+\+ compiler found"):
        solution = run(torch.zeros(2, 2))
    assert solution.nfe.tolist() == [3, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        run(torch.zeros(2, 2))
    with pytest.raises(ZeroDivisionError):  # f's own errors stay its own
        mb.FixedBudget(lambda z: z + 1 / 0, mb.Picard(), max_nfe=3)(torch.zeros(2, 2))


def test_a_learned_solver_runs_its_learned_steps():
    problem = make_problem("tanh_gaussian_0.95")
    learned = mb.GroupedLSTM(GroupedConfig(layout="vector", shape=(32,), safeguard=None)).double().requires_grad_(False)
    fixed = mb.FixedBudget(problem.f, learned, max_nfe=8, compiled=False)(problem.z0, problem.context)
    usual = mb.solve(problem.f, problem.z0, problem.context, solver=learned, rtol=1e-3, max_nfe=8, throw=False)
    torch.testing.assert_close(fixed.z, usual.z, rtol=1e-6, atol=1e-8)


def test_bfloat16_and_plain_closures():
    problem = make_problem("tanh_gaussian_0.95", dtype=torch.float32)
    half = lambda z: problem.f(z.float(), problem.context).bfloat16()  # noqa: E731
    run = mb.FixedBudget(half, mb.Anderson(), max_nfe=12, rtol=1e-2, f_dtype=torch.bfloat16, compiled=False)
    solution = run(problem.z0)
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
        mb.FixedBudget(torch.cos, mb.Picard(), max_nfe=3, compiled=False)(torch.full((2, 2), torch.nan))


class Model(torch.nn.Module):
    def __init__(self, solver) -> None:
        super().__init__()
        self.linear, self.solver = torch.nn.Linear(8, 8), solver

    def forward(self, x):
        f = lambda z, c: torch.tanh(0.5 * self.linear(z) + c)  # noqa: E731
        return mb.FixedBudget(f, self.solver, max_nfe=4, compiled=False)(torch.zeros_like(x), x).z


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("solver", [mb.Picard(), mb.Anderson(memory=2), mb.Broyden(memory=2)], ids=str)
def test_a_model_with_a_fixed_budget_can_be_exported_for_any_batch(solver, strict):
    model, x = Model(solver).eval(), torch.randn(3, 8)
    sizes = ({0: torch.export.Dim("batch", min=2)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own parts
        exported = torch.export.export(model, (x,), dynamic_shapes=sizes, strict=strict).module()
    for given in (2 * x, torch.randn(7, 8)):
        torch.testing.assert_close(exported(given), model(given), rtol=1e-5, atol=1e-6)


def test_of_a_compiled_run_f_is_looked_at_once_for_each_shape(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    calls = 0

    def f(z, x):
        nonlocal calls
        calls += 1
        return 0.5 * z + x

    run = mb.FixedBudget(f, mb.Picard(), max_nfe=3)
    for rows, spent in ((4, 4), (4, 7), (2, 11)):
        assert run(torch.zeros(rows, 2), torch.ones(rows, 2)).nfe.tolist() == [3] * rows
        assert calls == spent
    careless = mb.FixedBudget(lambda z, x: z.mul_(0.5), mb.Picard(), max_nfe=3)
    with pytest.raises(ValueError, match="in place"):
        careless(torch.zeros(4, 2), torch.ones(4, 2))


def test_solvers_may_ask_for_the_image_to_the_last_bit():
    seen = []

    class Asking(mb.Picard):
        def step(self, z, g, state, problem):
            seen.append((problem.image(z, g), problem.image(z.clone(), g), z + g, torch.cos(z)))
            return super().step(z, g, state, problem)

    mb.FixedBudget(torch.cos, Asking(), max_nfe=4, compiled=False)(torch.randn(3, 2))
    assert len(seen) == 3
    for image, other, total, true in seen:
        assert torch.equal(image, true)
        assert torch.equal(other, total)
