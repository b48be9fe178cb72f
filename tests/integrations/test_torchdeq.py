"""torchdeq: our solvers in its DEQs, its models handed to `fit_solver`."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import pytest
import torch
import torchdeq
from torch import nn

import metabroyden as mb
from metabroyden.integrations.torchdeq import FixedPointMap, holds_deq, register
from metabroyden.learned.fingerprint import fingerprint
from metabroyden.learned.layout import Layout
from metabroyden.meta.fit import make_learned
from metabroyden.meta.trainer import MetaTrainer
from tests.helpers import DOUBLE, ConvTanh, normal, perturbed, refused, same_parameters, vector

CORES = ("indexing", "sliced")
CLASSICAL = {"picard": mb.Picard(), "anderson": mb.Anderson(), "broyden": mb.Broyden(), "newton": mb.Newton()}
SOLVERS = CLASSICAL | {name: vector(name, 6) for name in ("grouped", "coordinatewise")}
each_core = pytest.mark.parametrize("core", CORES)
Z0 = torch.zeros(4, 6, dtype=DOUBLE)


def drop_in(solver=None, name: str = "test"):
    return register(name, mb.Broyden() if solver is None else solver)


def layer(solver=None, **options):
    """A torchdeq DEQ that solves, and with b_solver="test" differentiates, with one of our solvers."""
    drop_in(solver)
    return torchdeq.get_deq(f_solver="test", **options)


def halves(z):
    return 0.5 * z + 1


class Problem(nn.Module):
    """f(z) = tanh(Wz + x), W a parameter, x a leaf."""

    def __init__(self) -> None:
        super().__init__()
        generator, self.calls = torch.Generator().manual_seed(0), 0
        w, self.x = (torch.randn(n, 6, generator=generator, dtype=DOUBLE) for n in (6, 4))
        self.weight = nn.Parameter(0.8 * w / torch.linalg.matrix_norm(w, 2))
        self.x.requires_grad_()

    def forward(self, z):
        self.calls += 1
        return torch.tanh(z @ self.weight.T + self.x)

    def gradients(self, z):
        return torch.autograd.grad((z**2).sum(), [self.weight, self.x])

    def exact(self):
        """(z*, gradients of Σz*²) by plain iteration and a dense linear solve."""
        z = Z0
        with torch.no_grad():
            for _ in range(400):
                z = self(z)
        image = self(z.requires_grad_())
        jacobian = (1 - image.detach() ** 2).unsqueeze(2) * self.weight.detach()
        adjoint = torch.linalg.solve((torch.eye(6, dtype=DOUBLE) - jacobian).mT, (2 * z.detach()).unsqueeze(2)).squeeze(
            2
        )
        return z.detach(), torch.autograd.grad(image, [self.weight, self.x], adjoint)


def check_gradients(problem: Problem, z, wanted) -> None:
    for mine, theirs in zip(problem.gradients(z), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


@each_core
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_of_ours_solves_inside_torchdeq(name, core):
    problem = Problem()
    deq = layer(SOLVERS[name], core=core, f_tol=1e-9, f_max_iter=100, f_stop_mode="rel")
    star, _ = problem.exact()
    for mode in (True, False):
        (z,), info = deq.train(mode)(problem, Z0)
        torch.testing.assert_close(z.detach(), star, rtol=0, atol=1e-7)
        assert info["converged"].all()
        assert (info["rel_lowest"] <= 1e-9).all()
    assert not any(isinstance(module, mb.GroupedLSTM) for module in deq.modules())


@pytest.mark.parametrize("name", ["picard", "broyden", "newton"])
def test_f_is_called_max_iter_times_at_most(name):
    problem, solve = Problem(), drop_in(SOLVERS[name])
    for budget in (1, 3, 7):
        problem.calls = 0
        _, _, info = solve(problem, Z0, max_iter=budget, tol=1e-30)
        assert problem.calls <= budget
        assert (info["nfe"] == problem.calls).all()


def test_modes_mean_relative_and_absolute_tolerance():
    problem = Problem()
    for mode in ("rel", "abs"):
        z, _, info = drop_in()(problem, Z0, 50, 1e-5, mode)
        size = (problem(z) - z).norm(dim=1).detach()
        torch.testing.assert_close(info["abs_lowest"], size, rtol=1e-9, atol=0)
        torch.testing.assert_close(info["rel_lowest"], size / problem(z).norm(dim=1).detach(), rtol=1e-9, atol=0)
        assert (info[f"{mode}_lowest"] <= 1e-5).all()
    assert (info["rel_lowest"] > 1e-30).all()
    large = drop_in()(lambda z: 0.5 * z + 1e6, torch.zeros(2, 3), 50, 1e-3, "abs")[2]
    assert (large["abs_lowest"] <= 1e-3).all()


def test_the_statistics_are_those_of_the_calls():
    seen, rate = [], torch.tensor([[0.1], [0.9]])
    f = lambda z: seen.append(z.clone()) or rate * z + 1  # noqa: E731
    z, _, info = drop_in(mb.Picard())(f, torch.zeros(2, 3), 12, 1e-2, "rel")
    assert type(info).__name__ == "SolverStat"
    sizes = torch.stack([(rate * point + 1 - point).norm(dim=1) for point in seen], dim=1)
    sizes[0, 3:] = torch.nan  # stopped: nothing padded
    assert info["abs_trace"].shape == info["rel_trace"].shape == sizes.shape
    torch.testing.assert_close(info["abs_trace"], sizes, rtol=1e-4, atol=0, equal_nan=True)
    assert info["nfe"].tolist() == [3, 12]
    assert info["nstep"].tolist() == [3.0, 12.0]
    assert info["converged"].tolist() == [True, False]
    assert info["status"].tolist() == [mb.Status.CONVERGED, mb.Status.MAX_NFE]
    assert info["sradius"].tolist() == [-1.0]
    torch.testing.assert_close(z[1], torch.full((3,), float(seen[11][1, 0])))


def test_nstep_is_when_the_returned_iterate_was_measured():
    values = iter([1.0, 0.5, 3.0, 4.0])  # f(z) − z: the second is the smallest
    _, _, info = drop_in(mb.Picard())(lambda z: z + next(values), torch.ones(1, 1), 4, 1e-9, "abs")
    assert (info["nstep"].tolist(), info["nfe"].tolist(), info["abs_lowest"].tolist()) == ([2.0], [4], [0.5])


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"n_states": 4}, [5, 10, 15, 20]),
        ({"indexing": [2, 3]}, [2, 3, 20]),
        ({"n_states": 3}, [8, 14, 20]),
        ({"indexing": [2, 30]}, [2, 30, 20]),
    ],
)
def test_states_are_the_best_iterates_after_so_many_evaluations_and_as_many_as_asked(options, steps):
    problem, solve = Problem(), drop_in()
    deq = layer(core="indexing", f_tol=1e-3, f_stop_mode="rel", f_max_iter=20, **options)
    assert deq.indexing == steps
    z, states, info = solve(problem, Z0, 20, 1e-3, "rel", steps)
    assert len(states) == len(steps)
    assert info["nfe"].max() < 20  # it stopped early
    for step, state in zip(steps, states, strict=True):
        torch.testing.assert_close(state, solve(problem, Z0, min(step, 20), 1e-3, "rel")[0], rtol=0, atol=1e-12)
    assert torch.equal(states[-1], z)
    assert len(deq(problem, Z0)[0]) == len(steps)


EXACT = {"b_solver": "test", "f_tol": 1e-12, "b_tol": 1e-12, "f_stop_mode": "rel", "b_stop_mode": "rel"}
IFT = {"ift": {"ift": True}, "hook": {"hook_ift": True}, "two states": {"ift": True, "n_states": 2}}


@each_core
@pytest.mark.parametrize("options", IFT)
@pytest.mark.parametrize("name", ["picard", "anderson", "broyden"])
def test_implicit_gradients_with_our_backward_solver_are_exact(core, options, name):
    problem, written = Problem(), []
    deq = layer(SOLVERS[name], core=core, f_max_iter=200, b_max_iter=200, **EXACT, **IFT[options])
    star, wanted = problem.exact()
    out, _ = deq(problem, Z0, backward_writer=written.append)
    torch.testing.assert_close(out[-1].detach(), star, rtol=0, atol=1e-10)
    if options == "two states" and core == "sliced":
        return  # the sliced core's gradient includes that of earlier slices
    check_gradients(problem, out[-1], wanted)
    assert [bool(info["converged"].all()) for info in written] == [True]
    assert "nfe" in written[0]


def test_an_early_stop_does_not_turn_implicit_gradients_into_phantom_ones():
    problem = Problem()
    deq = layer(core="indexing", b_solver="test", ift=True, indexing=[3], f_max_iter=300, b_max_iter=100,
                f_tol=1e-12, b_tol=1e-12)  # fmt: skip
    out, _ = deq(problem, Z0)
    assert len(out) == 2
    check_gradients(problem, out[-1], problem.exact()[1])


@each_core
def test_phantom_gradients_are_those_at_our_solution(core):
    problem = Problem()
    out, _ = layer(core=core, grad=3, tau=0.7, f_tol=1e-12, f_max_iter=60)(problem, Z0)
    z, _ = problem.exact()
    for _ in range(3):
        z = 0.7 * problem(z) + 0.3 * z
    check_gradients(problem, out[-1], problem.gradients(z))


def pair(z1, z2):
    """Two coupled tensors, (B, 2, 3) and (B, 4)."""
    return torch.tanh(0.4 * z1 + z2.mean(1).reshape(-1, 1, 1)), 0.3 * z2 + z1.flatten(1)[:, :4] + 1


@each_core
@pytest.mark.parametrize("no_stat", [False, True])
@pytest.mark.parametrize("container", [tuple, list])
@pytest.mark.parametrize("learned", [False, True])
def test_states_of_several_tensors(core, no_stat, container, learned):
    solver = make_learned("grouped", Layout("vector", (10,))) if learned else mb.Broyden()
    deq = layer(solver, core=core, no_stat=no_stat, f_tol=1e-6, f_max_iter=60, grad=2)
    out, info = deq(pair, container([torch.zeros(3, 2, 3), torch.zeros(3, 4)]))
    assert [tuple(part.shape) for part in out[-1]] == [(3, 2, 3), (3, 4)]
    for part, image in zip(out[-1], pair(*out[-1]), strict=True):
        torch.testing.assert_close(part, image, rtol=0, atol=1e-4)
    assert info["nfe"].shape == (3,)


@pytest.mark.parametrize("shape", [(), (5,), (0, 3)])
def test_states_of_one_axis_of_none_and_of_no_sample(shape):
    z0 = torch.zeros(shape, dtype=DOUBLE)
    z, states, info = drop_in()(torch.cos, z0, 50, 1e-9, indexing=[2, 50])
    assert z.shape == states[0].shape == states[1].shape == shape
    torch.testing.assert_close(z, torch.full_like(z, 0.7390851332), rtol=0, atol=1e-8)
    samples = 0 if 0 in shape else max(1, z0.numel())
    assert info["nfe"].shape == info["abs_lowest"].shape == info["nstep"].shape == (samples,)
    if samples:
        assert layer()(torch.cos, z0)[0][0].shape == shape


def test_any_state_is_a_start_and_none_is_differentiated_through():
    problem, solve = Problem(), drop_in()
    star, _ = problem.exact()
    z, _, info = solve(problem, (star + 1e-6).requires_grad_(), 50, 1e-3, "rel")
    assert (info["nfe"] == 1).all()
    assert not z.requires_grad
    cold, warm = (solve(problem, z0, 50, 1e-6, "rel")[2]["nfe"] for z0 in (Z0, (star + 1e-3).requires_grad_()))
    assert (warm < cold).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("several", [False, True])
def test_half_precision_states_are_solved_in_single_precision(dtype, several):
    seen, z0 = set(), torch.zeros(3, 4, dtype=dtype)

    def f(*parts):
        seen.update(part.dtype for part in parts)
        image = tuple(part * 0.9 + 0.1 for part in parts)
        return image if several else image[0]

    deq = layer(f_tol=1e-2, f_stop_mode="rel", f_max_iter=40, no_stat=several)
    (z,), info = deq.eval()(f, [z0, z0[:, :2]] if several else z0)
    parts = z if several else [z]
    assert seen == {part.dtype for part in parts} == {dtype}
    assert info["rel_trace"].dtype == torch.float32
    for part in parts:
        torch.testing.assert_close(part.float(), torch.ones_like(part, dtype=torch.float32), rtol=0, atol=0.15)


def test_what_was_never_finite_comes_back_as_nan():
    f = lambda z: torch.where(torch.tensor([[True], [False]]), halves(z), torch.inf)  # noqa: E731
    z, states, info = drop_in()(f, torch.zeros(2, 3), 30, 1e-4, "rel", [1, 2, 30])
    for state in (z, states[-1]):
        torch.testing.assert_close(state[0], torch.full((3,), 2.0), rtol=0, atol=1e-3)
    assert all(state[1].isnan().all() for state in (z, *states))
    assert info["rel_lowest"][1].isnan()
    assert info["rel_trace"][1].isnan().all()
    assert info["status"].tolist() == [mb.Status.CONVERGED, mb.Status.NON_FINITE]
    assert info["nstep"][1] == 0
    # nor does a start that is not finite spoil other samples
    z0 = torch.zeros(2, 3)
    z0[1, 0] = torch.nan
    z, _, info = drop_in()(halves, z0, 30, 1e-4, "rel")
    torch.testing.assert_close(z[0], torch.full((3,), 2.0), rtol=0, atol=1e-3)
    assert z[1].isnan().all()
    assert info["converged"].tolist() == [True, False]


@pytest.mark.parametrize("options", [{"ift": True}, {"hook_ift": True}])
def test_an_infinite_cotangent_does_not_become_a_zero_gradient(options):
    problem = Problem()
    (z,), _ = layer(b_solver="test", f_tol=1e-9, b_tol=1e-9, **options)(problem, Z0)
    weights = torch.tensor([1.0, torch.inf, 1.0, 1.0], dtype=DOUBLE)
    grad_weight, grad_x = torch.autograd.grad((weights * z.sum(1)).sum(), [problem.weight, problem.x])
    assert not grad_weight.isfinite().all()
    assert not grad_x[1].isfinite().any()
    assert grad_x[[0, 2, 3]].isfinite().all()
    assert (grad_x[[0, 2, 3]] != 0).all()


def test_it_works_under_autocast_and_inference_mode():
    deq, cell, kinds = layer(f_tol=1e-2, f_stop_mode="rel").eval(), nn.Linear(6, 6), set()
    cell.weight.data.mul_(0.3)

    def f(z):
        value = cell(z)
        kinds.add(value.dtype)
        return value.float()

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        (z,), _ = deq(f, torch.zeros(2, 6))
    assert kinds == {torch.bfloat16}
    torch.testing.assert_close(z, cell(z).detach(), rtol=0, atol=2e-2)


@pytest.mark.parametrize("flat", [False, True])
def test_a_learned_solver_knows_the_layout_of_a_flattened_state(flat):
    cell, x = ConvTanh(), torch.randn(5, 3, 4, 4)
    learned = perturbed(make_learned("grouped", Layout("image", (3, 4, 4))), 0.02)  # far from its untrained beginning
    f = (lambda z: cell(z.reshape(5, 3, 4, 4), x).flatten(1)) if flat else (lambda z: cell(z, x))
    deq = layer(learned, f_tol=1e-5, f_stop_mode="rel", f_max_iter=60).eval()
    (z,), info = deq(f, torch.zeros(5, 48) if flat else torch.zeros(5, 3, 4, 4))
    assert info["converged"].all()
    with_context = mb.solve(lambda z, x: cell(z, x), 0 * x, x, solver=learned, rtol=1e-5, max_nfe=60)
    torch.testing.assert_close(z.reshape(5, 3, 4, 4), with_context.z, rtol=0, atol=1e-4)


def run(z0=None, **options):
    return drop_in()(torch.cos, torch.zeros(2, 3) if z0 is None else z0, **options)


REFUSED = [
    ("takes no ls, m: set options on the Broyden itself", TypeError, lambda: run(m=5, ls=True)),
    ("takes no tau", TypeError, lambda: layer()(torch.cos, torch.zeros(2, 3), solver_kwargs={"tau": 0.5})),
    ("stop_mode must be 'abs' or 'rel', got 'relative'", ValueError, lambda: run(stop_mode="relative")),
    ("max_iter must be at least 1, got 0", ValueError, lambda: run(max_iter=0)),
    (r"floating dtype, got torch\.int64", ValueError, lambda: run(torch.zeros(2, 3, dtype=torch.int64))),
    ("at least one coordinate a sample", ValueError, lambda: run(torch.zeros(3, 0))),
    *(
        ("solver must be an instance", TypeError, lambda wrong=wrong: register("test", wrong))
        for wrong in (mb.Broyden, "broyden", None, torch.cos)
    ),
    ("name must be a non-empty string, got 3", TypeError, lambda: register(3, mb.Broyden())),
    ("unexpected keyword", TypeError, lambda: register("test", mb.Broyden(), memory=3)),
]


@pytest.mark.parametrize(("words", "error", "call"), REFUSED)
def test_bad_arguments_are_refused(words, error, call):
    refused(words, call, error)


def test_torchdeqs_own_names_are_given_away_only_on_request():
    theirs = torchdeq.solver.get_solver("broyden")
    refused("'broyden' is a solver of torchdeq's own", lambda: register("broyden", mb.Broyden()))
    assert torchdeq.solver.get_solver("broyden") is theirs
    try:
        assert register("broyden", mb.Broyden(), replace=True) is torchdeq.solver.get_solver("broyden")
    finally:
        torchdeq.register_solver("broyden", theirs)


def test_a_solver_can_be_swapped_in_a_deq_that_is_there():
    deq = torchdeq.get_deq(f_solver="anderson", f_tol=1e-6).eval()
    deq.f_solver = register("test", mb.Broyden())
    assert "nfe" in deq(torch.cos, torch.zeros(2, 3))[1]


def test_without_torchdeq_the_package_imports_and_says_what_to_install():
    code = """
import sys
sys.modules["torchdeq"] = None
import torch, metabroyden as mb
for use in (
    lambda: mb.integrations.torchdeq.register("ours", mb.Broyden()),
    lambda: mb.integrations.torchdeq.FixedPointMap(torch.nn.Linear(2, 2)),
):
    try:
        use()
    except ImportError as error:
        assert "pip install torchdeq==0.1.0" in str(error), error
    else:
        raise AssertionError("no ImportError")
assert not mb.integrations.torchdeq.holds_deq(torch.nn.Linear(2, 2))
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


# --- torchdeq models handed to fit_solver


class Model(nn.Module):
    """What a torchdeq user has: stem, a DEQ on a closure, head; drops out and normalises in training mode."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.dropout, self.cell, self.head, self.encoded = nn.Dropout(0.5), ConvTanh(), nn.Linear(48, 5), 0
        self.deq = torchdeq.get_deq(**{"f_solver": "broyden", "f_tol": 1e-6, "f_max_iter": 40, **options})

    def forward(self, images):
        self.encoded += 1
        x = self.stem(images)
        out, _ = self.deq(lambda z: self.cell(self.dropout(z), x), torch.zeros_like(x))
        return self.head(out[-1].flatten(1))


def images(count: int, seed: int = 0) -> torch.Tensor:
    return normal(count, 1, 4, 4, seed=seed)


def captured(count: int = 6):
    """(model, inputs, the map inside it, a state)."""
    model = Model()
    return model, images(count), FixedPointMap(model), torch.randn(count, 3, 4, 4)


def test_the_map_inside_a_model_is_what_its_deq_solves():
    model, x, f, z = captured()
    usual = model.deq.f_solver
    z0, value = f.initial_state(x), f(z, x)
    assert z0.shape == (6, 3, 4, 4)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.deq.f_solver is usual
    before = model.encoded
    with torch.no_grad():
        solution = mb.solve(f, z0, x, solver=mb.Broyden(), rtol=1e-6)
        assert model.encoded - before <= len(solution.nfe.unique())  # once more whenever rows are gathered
        wanted = model.eval().cell(z, model.stem(x))
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)
        torch.testing.assert_close(model.head(solution.z.flatten(1)), model(x), rtol=0, atol=1e-4)


def test_gradients_flow_through_the_state_and_not_into_the_parameters():
    model, x, f, z = captured()
    f(z.requires_grad_(), x).square().sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    twin = z.detach().clone().requires_grad_()
    model.eval().cell(twin, model.stem(x)).square().sum().backward()
    torch.testing.assert_close(z.grad, twin.grad)


def test_the_model_runs_once_for_an_input_and_again_when_it_must():
    model, x, f, z = captured()
    for _ in range(3):
        first = f(z, x)
    f.initial_state(x)
    assert model.encoded == 1
    rows = x[:4]  # what a solve does with samples that are done
    torch.testing.assert_close(f(z[:4], rows), first[:4])
    f(z[:4], rows)
    assert model.encoded == 2
    x.mul_(2)
    doubled = f(z, x)
    assert not torch.equal(doubled, first)
    model.stem[0].bias.data.add_(1)
    model.stem[1].running_mean.add_(0.5)
    moved = f(z, x)
    assert model.encoded == 4
    assert not torch.equal(moved, doubled)


def test_copies_and_inference_mode_see_their_own_model():
    _, x, f, z = captured()
    value, twin = f(z, x), copy.deepcopy(f)
    twin.model.cell.conv.weight.data.mul_(2)
    assert torch.equal(f(z, x), value)
    assert not torch.equal(twin(z, x), value)
    first = images(6)
    with torch.inference_mode():
        torch.testing.assert_close(f(z, images(6)), value)
        f(z, first)  # captured here, differentiated there
    assert f(z.clone().requires_grad_(), first).requires_grad


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torchdeq.get_deq(), torchdeq.get_deq()

    def forward(self, x):
        out, _ = self.first(lambda z: 0.5 * z + x, torch.zeros_like(x))
        return self.second(lambda z: 0.1 * z + out[-1], torch.ones_like(x))[0][-1]


class Idle(Model):
    def forward(self, images):
        return images


def test_what_is_no_model_with_one_deq_is_refused():
    model, x = Two(), torch.ones(3, 2)
    words = r"Two has 2 torchdeq DEQs \(first, second\): .*FixedPointMap\(model, deq=name"
    refused(words, lambda: FixedPointMap(model))
    refused("got 'third'", lambda: FixedPointMap(model, "third"))
    torch.testing.assert_close(FixedPointMap(model, "first")(0 * x, x), x)
    for chosen in ("second", model.second):
        torch.testing.assert_close(FixedPointMap(model, chosen)(0 * x, x), 2 * x, rtol=0, atol=1e-2)
    refused("must hold a torchdeq DEQ; Linear has none", lambda: FixedPointMap(nn.Linear(2, 2)))
    refused("is one itself: give the model that calls it", lambda: FixedPointMap(torchdeq.get_deq()))
    refused("model must be a module, got int", lambda: FixedPointMap(3), TypeError)
    words = "x must be a tensor or a pytree of them, the model's raw inputs, got list"
    refused(words, lambda: FixedPointMap(Model()).initial_state([1]), TypeError)
    refused("2 torchdeq DEQs", lambda: mb.fit_solver(model, torch.randn(20, 2), progress=False))
    refused("Idle did not call its torchdeq DEQ", lambda: FixedPointMap(Idle()).initial_state(images(3)))


class Wary(Model):
    def forward(self, images):
        try:
            return super().forward(images)
        except Exception:
            return images


class Hidden(nn.Module):
    """torchdeq's solver, as a module."""

    def forward(self, *arguments, **options):
        return torchdeq.solver.get_solver("anderson")(*arguments, **options)


def test_a_model_that_catches_exceptions_and_one_that_hides_its_solver_are_captured_all_the_same():
    model = Wary()
    del model.deq.f_solver
    model.deq.f_solver = Hidden()
    assert FixedPointMap(model).initial_state(images(3)).shape == (3, 3, 4, 4)
    assert isinstance(model.deq.f_solver, Hidden)
    assert model.eval()(images(3)).shape == (3, 5)


class Scales(nn.Module):
    def __init__(self, no_stat: bool) -> None:
        super().__init__()
        self.deq = torchdeq.get_deq(no_stat=no_stat, core="sliced", f_stop_mode="rel")

    def forward(self, x):
        start = [torch.zeros(len(x), 2, 3), torch.zeros(len(x), 4)]
        out, _ = self.deq(lambda a, b: (pair(a, b)[0], pair(a, b)[1] + x), start)
        return out[-1][1]


def fitted(f, x, **options):
    return mb.fit_solver(f, x, **{"steps": 1, "progress": False, "fallback": False} | options)


@pytest.mark.usefixtures("quick_fits")
@pytest.mark.parametrize("no_stat", [False, True])
def test_a_state_of_several_tensors_is_one_flat_tensor(no_stat):
    model, x = Scales(no_stat), torch.randn(30, 4)
    assert FixedPointMap(model).initial_state(x).shape == (30, 10)
    solver = fitted(model, x, steps=2)
    assert (solver.config.layout, solver.config.shape) == ("vector", (10,))
    model.deq.f_solver = register("test", solver)
    assert model.eval()(x).shape == (30, 4)


class Resolutions(nn.Module):
    """A DEQ over images of several resolutions, coupled; inputs of the finest."""

    def __init__(self, no_stat: bool, shapes=((2, 4, 4), (3, 2, 2))) -> None:
        super().__init__()
        self.deq, self.shapes = (
            torchdeq.get_deq(no_stat=no_stat, core="sliced", f_stop_mode="rel", f_max_iter=40),
            shapes,
        )

    def forward(self, x):
        def f(*z):
            coarse = [0.5 * torch.tanh(part + z[0].mean(dim=(1, 2, 3), keepdim=True)) for part in z[1:]]
            return [
                torch.tanh(0.6 * z[0] + x + 0.1 * sum(part.mean(dim=(1, 2, 3), keepdim=True) for part in z)),
                *coarse,
            ]

        out, _ = self.deq(f, [torch.zeros(len(x), *shape) for shape in self.shapes])
        return out[-1][0].flatten(1)


@pytest.mark.usefixtures("quick_fits")
@pytest.mark.filterwarnings("ignore:solver 'test' was fitted")
@pytest.mark.parametrize("no_stat", [False, True])
@pytest.mark.parametrize("shapes", [((2, 4, 4), (3, 2, 2)), ((2, 4, 4),)])
def test_images_that_torchdeq_flattens_keep_their_layout(no_stat, shapes):
    model, x = Resolutions(no_stat, shapes), torch.randn(30, 2, 4, 4)
    f = FixedPointMap(model)
    z0 = f.initial_state(x)
    parts = z0 if len(shapes) > 1 else (z0,)
    assert tuple(tuple(part.shape[1:]) for part in parts) == shapes
    solver = fitted(model, x, steps=2)
    kind, shape = ("pyramid", shapes) if len(shapes) > 1 else ("image", shapes[0])
    assert (solver.config.layout, solver.config.shape) == (kind, shape)
    found = {}
    for name, chosen in (("ours", solver), ("theirs", mb.Broyden())):
        model.deq.f_solver, model.deq.f_tol = register("test", chosen), 1e-5
        found[name] = model.eval()(x)
    torch.testing.assert_close(found["ours"], found["theirs"], rtol=0, atol=1e-3)
    model.layout = "vector"
    assert FixedPointMap(model).initial_state(x).dim() == 2, "as the model says"


@pytest.mark.usefixtures("quick_fits")
def test_fit_solver_takes_an_unmodified_model_and_makes_it_faster():
    model = Model().eval()
    model.cell.conv.weight.data.mul_(1.2)
    before = copy.deepcopy(model)
    assert holds_deq(model)
    assert not holds_deq(FixedPointMap(model))
    assert not holds_deq(ConvTanh())
    solver = fitted(model, images(100), layout="image", steps=60, seconds=100)
    held_out = solver.summary["held_out"]
    assert held_out["mean_evaluations"] < 0.9 * held_out["mean_evaluations_broyden"]
    assert same_parameters(model, before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert solver.fingerprint == fingerprint(model) == fitted(FixedPointMap(model), images(20)).fingerprint
    x, spent, logits = images(40, 9), [], []
    model.deq.f_stop_mode, model.deq.f_tol = "rel", 1e-3
    model.deq.register_forward_hook(lambda _m, _i, out: spent.append(out[1]["nfe"].float().mean()))
    for chosen in (solver, mb.Broyden()):
        model.deq.f_solver = register("test", chosen)
        with torch.no_grad():
            logits.append(model(x))
    assert spent[0] < 0.9 * spent[1]
    torch.testing.assert_close(*logits, rtol=0, atol=2e-2)


@pytest.mark.usefixtures("quick_fits")
def test_fit_solver_starts_where_a_cell_says():
    cell, asked = ConvTanh(), []
    cell.initial_state = lambda x: asked.append(1) or torch.ones_like(x)
    assert fitted(cell, 0.5 * torch.randn(20, 3, 4, 4)).fingerprint == fingerprint(cell)
    assert asked
    cell.initial_state = lambda x: torch.zeros(len(x), 3, 4, 4)
    cell.forward = lambda z, x: torch.tanh(cell.conv(z) + x.reshape(-1, 3, 1, 1))
    assert fitted(cell, torch.randint(0, 9, (20, 3))).summary["skipped_steps"] == 0


@pytest.mark.usefixtures("quick_fits")
def test_an_interrupted_fit_goes_on_where_it_stopped(tmp_path, monkeypatch):
    cell, x, path, original = ConvTanh(), 0.5 * torch.randn(30, 3, 4, 4), tmp_path / "fit.safetensors", MetaTrainer.run
    whole = fitted(cell, x, steps=4)

    def interrupted(self, progress=None, until=None):
        original(self, progress, until=2)
        raise KeyboardInterrupt

    monkeypatch.setattr(MetaTrainer, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fitted(cell, x, steps=4, checkpoint=path)
    monkeypatch.setattr(MetaTrainer, "run", original)
    assert same_parameters(whole, fitted(cell, x, steps=4, checkpoint=path))


# --- what a registered solver says once


def fitted_model(rtol: float = 1e-3, **options):
    """(model, a solver that says it was fitted to it, to this tolerance)."""
    model = Model(f_stop_mode="rel", f_tol=1e-2, **options).eval()
    solver = make_learned("meta-broyden", Layout("image", (3, 4, 4)), conditioning="initial_value").eval()
    solver.fingerprint, solver.summary = fingerprint(model), {"held_out": {"rtol": rtol}}
    return model, solver


def warned(model, solver, **options) -> list[str]:
    """What is said in two calls of the model with this solver in its DEQ."""
    model.deq.f_solver = register("learned", solver)
    for name, value in options.items():
        setattr(model.deq, name, value)
    with warnings.catch_warnings(record=True) as found, torch.no_grad():
        warnings.simplefilter("always")
        model(images(3))
        model(images(3))
    return [str(one.message) for one in found]


def test_a_registered_solver_warns_once_when_the_weights_have_moved():
    model, solver = fitted_model()
    assert warned(model, solver) == []
    with torch.no_grad():
        model.cell.conv.weight.add_(1e-3)
    (words,) = warned(model, solver)
    assert "MetaBroyden was fitted to other weights of f" in words
    retrained, _ = fitted_model()
    retrained.head.bias.data.add_(1)
    assert len(warned(retrained, solver)) == 1, "from the first call on"


def test_weights_that_move_between_two_calls_are_noticed():
    model, solver = fitted_model()
    model.deq.f_solver = register("learned", solver)
    model(images(3))
    with torch.no_grad():
        model.cell.conv.weight.mul_(1.01)
    with pytest.warns(UserWarning, match="fitted to other weights"):
        model(images(3))


def test_a_solver_of_the_cell_alone_or_of_another_model_brings_no_false_alarm():
    model, solver = fitted_model()
    solver.fingerprint = fingerprint(model.cell)
    assert warned(model, solver) == []
    solver.fingerprint = fingerprint(nn.Linear(3, 2))
    assert warned(model, solver) == []
    assert warned(model, mb.Broyden(), f_stop_mode="abs") == []


def test_a_registered_solver_warns_once_of_absolute_residuals_and_of_a_much_smaller_tolerance():
    model, solver = fitted_model()
    (words,) = warned(model, solver, f_stop_mode="abs")
    assert "'learned' was fitted to relative residuals of 0.001" in words
    assert words.endswith("build it with f_stop_mode='rel', f_tol=0.001 (said once)")
    (words,) = warned(model, solver, f_stop_mode="rel", f_tol=1e-5)
    assert "fitted to a tolerance of 0.001, and this DEQ asks for 1e-05" in words
    for tol in (1e-4, 1e-1):
        assert warned(model, solver, f_tol=tol) == []
