"""What users' cells and surroundings do to a solve: their modes, writes, errors, strange starts and contexts."""

from __future__ import annotations

import time
import warnings
import weakref

import pytest
import torch
from torch.testing import assert_close

import metabroyden as mb
from metabroyden.meta.unroll import unroll
from metabroyden.zoo.testbed import make_problem
from metabroyden.zoo.testbed.cells import dense
from tests.conftest import tanh
from tests.helpers import CLASSICAL, DRIVERS, fixed, moved, solved
from tests.helpers import DOUBLE as D

every_solver = pytest.mark.parametrize("solver", CLASSICAL.values(), ids=CLASSICAL)
every_driver = pytest.mark.parametrize("way", DRIVERS)


@every_driver
@every_solver
def test_f_runs_in_the_callers_mode_and_the_solvers_arithmetic_in_none(solver, way):
    w, x, z0 = 0.1 * torch.randn(16, 16), torch.randn(8, 16), torch.zeros(8, 16)
    seen, options = set(), {"solver": solver, "max_nfe": 12 if way == "fixed" else 100}
    run = DRIVERS[way if solver.fixed_cost else "solve"]

    def f(z, x):
        product = z @ w
        seen.add((product.dtype, torch.is_inference_mode_enabled()))
        return torch.tanh(product + x)

    def exact(z, x):  # nothing here is cast
        f(z, x)
        return torch.tanh((z.unsqueeze(1) * w.T).sum(2) + x)

    usual = run(exact, z0, x, rtol=1e-5, **options)
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = run(f, z0, x, rtol=2e-2, **options)
        cast = run(exact, z0, x, rtol=1e-5, **options)
    assert seen == {(torch.bfloat16, False)}
    assert half.z.dtype == torch.float32
    assert half.converged.all()
    seen.clear()
    with torch.inference_mode():
        inside = run(exact, z0.clone(), x.clone(), rtol=1e-5, **options)
        given = torch.ones(1, 3)
        with pytest.raises(ValueError, match="in place"):
            run(lambda z, x: z.mul_(0.5), given, torch.ones(1), **options)
        assert (given == 1).all()
    assert seen <= {(torch.float32, True), (torch.float32, False)}
    assert (torch.float32, True) in seen
    for other in (cast, inside):
        assert torch.equal(other.z, usual.z)
        assert torch.equal(other.nfe, usual.nfe)
        assert torch.equal(other.residual, usual.residual)


@every_solver
def test_expanded_starts_that_require_gradients_are_starts_like_others(solver):
    problem = tanh(batch=5, n=6, gain=0.9)
    z0 = torch.full((1, 6), 0.1, dtype=D).requires_grad_().expand(5, 6)
    plain, strange = (
        mb.solve(problem.f, start, problem.x, solver=solver, rtol=1e-8) for start in (z0.detach().clone(), z0)
    )
    assert torch.equal(plain.z, strange.z)
    assert torch.equal(plain.nfe, strange.nfe)
    assert (z0 == 0.1).all()


@every_solver
def test_what_a_cell_raises_in_the_middle_is_passed_on(solver):
    calls = []

    def f(z, x):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return torch.tanh(0.5 * z + x)

    with pytest.raises(RuntimeError, match="out of memory"):
        solved(f, torch.zeros(2, 3), torch.ones(2, 3), solver=solver, rtol=1e-14)


@pytest.mark.parametrize("budget", [7, 9, 10, 15, 25])
def test_newton_at_the_end_of_its_budget_does_not_depend_on_the_other_samples(budget):
    scale, problem = torch.linspace(0.1, 1.6, 12, dtype=D)[:, None], tanh(batch=12, n=12, gain=1.0)
    f = lambda z, c: problem.f(c[0] * z, c[1])  # noqa: E731
    options = {"solver": mb.Newton(krylov=4), "rtol": 1e-3, "max_nfe": budget}
    together = solved(f, problem.z0, (scale, problem.x), **options)
    for i in range(12):
        alone = solved(f, problem.z0[:1], (scale[i : i + 1], problem.x[i : i + 1]), **options)
        assert int(alone.nfe[0]) == int(together.nfe[i])
        assert_close(alone.z[0], together.z[i], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", [mb.Broyden, mb.Anderson])
def test_no_more_memory_is_taken_than_there_can_be_steps(kind):
    problem, shapes = dense(4, 60, 0.95, dtype=D), []

    class Watching(kind):
        def init(self, z, g, view):
            state = kind.init(self, z, g, view)
            shapes.append(state[0].shape)
            return state

    watched = mb.solve(problem.f, problem.z0, problem.context, solver=Watching(memory=10_000), rtol=1e-9)
    assert shapes == [(4, 49, 60)]
    assert_close(watched.z, problem.star, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("every", [1, 3])
def test_a_learned_solver_that_hands_over_may_be_looked_at_seldom(every):
    problem = make_problem("tanh_gaussian_1.5", dtype=torch.float32)
    learned = moved("grouped", 32, torch.float32, initializer_width=8)
    options = {"solver": learned, "rtol": 1e-4, "max_nfe": 120, "check_every": every}
    solution = mb.solve(problem.f, problem.z0, problem.context, **options)
    again = mb.relative_residual(solution.z, problem.f(solution.z, problem.context))
    assert_close(again, solution.residual, rtol=1e-3, atol=1e-7)


# --- an f that writes to what it is given


def through_data(z, x):
    z.data.mul_(0.5)
    return z + x


def through_numpy(z, x):
    z.numpy()[:] += 1
    return 0.5 * z + x


def context_in_place(z, x):
    return 0.5 * z + x.mul_(0.9)


def context_through_data(z, x):
    x.data.mul_(0.9)
    return 0.5 * z + x


WRITERS = {
    "z": (lambda z, x: z.mul_(0.5).add_(x), "its argument z in place"),
    "z.data": (through_data, "its argument z in place"),
    "z.numpy": (through_numpy, "its argument z in place"),
    "context": (context_in_place, r"its context in place, a tensor of shape"),
    "context.data": (context_through_data, r"its context in place, a tensor of shape"),
}
WAYS = DRIVERS | {"unroll": lambda f, z0, x, **_: unroll(mb.Picard(), f, z0, x, steps=3, backend="native")}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("n", [8, 8000], ids=["copied", "summed"])
def test_an_f_that_writes_to_what_it_is_given_is_refused_however_it_is_run(way, name, n):
    f, words = WRITERS[name]
    options = {"solver": mb.Picard(), "max_nfe": 9}
    with pytest.raises(ValueError, match=words):
        WAYS[way](f, torch.zeros(6, n), torch.randn(6, n), **options)
    if way != "unroll" and n == 8 and name in ("z", "z.data"):
        with pytest.raises(ValueError, match=words):
            WAYS[way](f, torch.zeros(6, n), torch.randn(6, n).bfloat16(), f_dtype=torch.bfloat16, **options)
    if way != "unroll" and name == "context":
        with torch.inference_mode(), pytest.raises(ValueError, match="its context in place"):
            WAYS[way](f, torch.zeros(6, n), torch.randn(6, n), **options)


@pytest.mark.parametrize("mark", [lambda w: w, mb.Shared], ids=["plain", "shared"])
def test_one_that_writes_to_one_tensor_of_many_or_to_a_shared_one_is_refused(mark):
    def f(z, c):
        c["w"].add_(0.1)
        return 0.5 * z + c["x"]

    with pytest.raises(ValueError, match=r"context in place, a tensor of shape \(6, 3\)"):
        mb.solve(f, torch.zeros(6, 8), {"x": torch.ones(6, 8), "w": mark(torch.ones(6, 3))}, solver=mb.Picard())


# --- gradients, cost, strange contexts


@every_driver
def test_solutions_never_require_gradients_though_f_takes_some(way):
    def f(z, x):
        with torch.enable_grad():
            z = z.requires_grad_()
            (g,) = torch.autograd.grad((z * z).sum() / 8 + (z * x).sum() / 2, z, create_graph=True)
        return g

    z0, x = torch.zeros(3, 4), torch.randn(3, 4)
    options = {"snapshots": (1, 2), "keep_inverse": True} if way == "solve" else {"max_nfe": 5}
    found = DRIVERS[way](f, z0, x, solver=mb.Broyden(), **options)
    assert found.inverse is None or not found.inverse.rmatvec(x).requires_grad
    assert not any(t.requires_grad for t in (found.z, found.residual, found.trace.residual, *found.snapshots, z0))


def test_failed_samples_cost_no_more_than_others():
    x = torch.full((60_000, 1), torch.nan)
    began = time.process_time()
    solution = solved(lambda z, x: torch.cos(z) + x, torch.ones(60_000, 1), x, solver=mb.Picard())
    assert time.process_time() - began < 2  # quadratic: a minute
    assert solution.residual.isnan().all()


@pytest.mark.parametrize(
    "solver", [mb.Picard(), mb.Anderson(), moved("grouped", 1, torch.float32)], ids=lambda s: str(s)[:7]
)
def test_at_most_one_gathered_context_is_alive(solver):
    alive, most = [], []

    def f(z, c):
        if not any(ref() is c[0] for ref in alive):
            alive.append(weakref.ref(c[0]))
        most.append(sum(ref().numel() for ref in alive if ref() is not None))
        return c[1] * z + c[0].mean(1, keepdim=True) + 1

    c = (torch.randn(30, 500), torch.linspace(0.05, 0.9, 30)[:, None])
    mb.solve(f, torch.zeros(30, 1), c, solver=solver, rtol=1e-4, max_nfe=100)
    assert len(alive) > 3 or not isinstance(solver, mb.Picard)
    assert max(most) < 2 * c[0].numel()


@pytest.mark.parametrize("shape", [(0, 3), (0, 2, 4), (0,)])
def test_an_empty_batch_has_an_empty_solution(shape):
    never = lambda z, x: 1 / 0  # noqa: E731
    z0, x = torch.zeros(shape, dtype=D), torch.zeros(0, 5)
    for found in (
        mb.solve(never, z0, x, solver=mb.Broyden(), snapshots=(1, 2), keep_inverse=True),
        fixed(never, z0, x, solver=mb.Broyden(), max_nfe=5),
    ):
        assert (found.z.shape, found.z.dtype) == (shape, D)
        for field in (found.residual, found.nfe, found.steps, found.converged, found.status):
            assert field.shape == (0,)
        assert found.trace.residual.shape == (0, 0)
        assert found.failures() == ""


STRANGE = {
    "torch.sparse_csr": lambda parts: torch.eye(6).to_sparse_csr(),
    "torch.sparse_bsr": lambda parts: torch.eye(6).to_sparse_bsr((2, 2)),
    "nested": torch.nested.nested_tensor,
    "torch.jagged": lambda parts: torch.nested.nested_tensor(parts, layout=torch.jagged),
}


@pytest.mark.parametrize("name", STRANGE)
def test_contexts_and_states_without_rows_are_refused_by_their_layout(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that some are new
        strange = STRANGE[name]([torch.randn(k + 1) for k in range(6)])
    f = lambda z, c: torch.cos(z)  # noqa: E731
    for run in DRIVERS.values():
        with pytest.raises(ValueError, match=rf"cannot be gathered by rows, got .*{name}.*mb.Shared"):
            run(f, torch.zeros(6, 1), (torch.ones(6, 1), strange), solver=mb.Picard(), max_nfe=9)
    with pytest.raises(ValueError, match=rf"z0 must be a dense tensor, got .*{name}"):
        mb.solve(torch.cos, strange, solver=mb.Picard())
    assert mb.solve(f, torch.zeros(6, 1), mb.Shared(strange), solver=mb.Picard()).converged.all()


def test_a_sparse_coo_context_is_gathered_by_rows():
    rates = torch.linspace(0.1, 0.95, 6, dtype=D)
    f = lambda z, c: z * c[1].to_dense().sum(1, keepdim=True) + c[0]  # noqa: E731
    c = torch.ones(6, 2, dtype=D), torch.diag(rates).to_sparse()
    solution = mb.solve(f, torch.zeros(6, 2, dtype=D), c, solver=mb.Picard(), rtol=1e-10, max_nfe=500)
    assert len(solution.nfe.unique()) > 3
    assert_close(solution.z, (1 / (1 - rates))[:, None].expand(6, 2), rtol=1e-7, atol=0)


CONTEXTS = {
    "conjugated": (torch.complex64, lambda x: x.conj(), torch.real),
    "negated": (torch.complex64, lambda x: x.conj().imag, lambda x: x),
    "float8": (torch.float32, lambda x: x.to(torch.float8_e4m3fn), torch.Tensor.float),
    "complex32": (torch.complex64, lambda x: x.to(torch.complex32), lambda x: x.to(torch.complex64).real),
    "quantized": (torch.float32, lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), torch.dequantize),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch: complex32 is experimental
@pytest.mark.parametrize("width", [4, 20_000])
@pytest.mark.parametrize("kind", CONTEXTS)
@every_driver
def test_a_context_may_be_of_any_dtype_and_lazily_conjugated(kind, width, way):
    dtype, make, read = CONTEXTS[kind]
    x = make(torch.randn(3, width, dtype=dtype))
    f = lambda z, x: 0.5 * z + read(x)[:, :4]  # noqa: E731
    z = DRIVERS[way](f, torch.zeros(3, 4), x, solver=mb.Broyden(), rtol=1e-5, max_nfe=5).z
    assert_close(z, 2 * read(x)[:, :4], rtol=1e-4, atol=1e-4)
    if kind == "conjugated":
        writing = lambda z, x: 0.5 * z + x.data.add_(1).real[:, :4]  # noqa: E731
        with pytest.raises(ValueError, match="changed its context"):
            DRIVERS[way](writing, torch.zeros(3, 4), x, solver=mb.Broyden(), max_nfe=5)
