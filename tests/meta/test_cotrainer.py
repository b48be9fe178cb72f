"""A DEQ in training whose solvers learn on the way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import metabroyden as mb
from metabroyden.learned.layout import Layout
from metabroyden.meta.fit import make_learned
from metabroyden.zoo.models import ConvCell
from tests.helpers import normal, refused, same_parameters

GRADIENTS = mb.Implicit(rtol=1e-2, max_nfe=60)


def solvers(layout: Layout, **sizes: int):
    """(forward, backward)."""
    return tuple(make_learned(kind, layout, **sizes) for kind in ("grouped", "adjoint"))


def made(gain: float = 3.0):
    """(layer, forward solver, backward solver)."""
    torch.manual_seed(0)
    cell = ConvCell(4, 8, 2)
    for convolution in (cell.conv1, cell.conv2):
        convolution.weight.data *= gain
    deq = mb.DEQ(cell, rtol=1e-2, max_nfe=60, backward=copy.copy(GRADIENTS), warn=False)
    return deq, *solvers(Layout("image", (4, 5, 5)), hidden=6, rank=12)


def kept_up(deq, *arguments, **options) -> mb.CoTrainer:
    own = {name: options.pop(name) for name in ("forward", "backward") if name in options}
    return mb.CoTrainer(deq, *arguments, **own, config=mb.CoTrainConfig(**options))


class Rotating(nn.Module):
    """tanh(zW + x), W nearly a rotation: a slow iteration with an inverse Jacobian that can be learned."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.w = nn.Parameter(0.97 * torch.linalg.qr(torch.randn(n, n)).Q)

    def forward(self, z, x):
        return torch.tanh(z @ self.w + x)


def train(deq, keep_up, steps: int, seed: int = 1, shape: tuple[int, ...] = (4, 5, 5)) -> list[float]:
    """A few training steps on a random regression; mean evaluations of each, forward and backward in sum."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(deq.parameters(), lr=1e-4)
    spent = []
    for _ in range(steps):
        x, y = (0.3 * torch.randn(16, *shape, generator=generator) for _ in range(2))
        optimizer.zero_grad()
        (deq(x) - y).square().mean().backward()
        optimizer.step()
        keep_up.step()
        spent.append(float((deq.last_solution.nfe + deq.last_backward_solution.nfe).double().mean()))
    return spent


def test_the_solvers_take_over_after_the_burst_and_need_fewer_evaluations():
    torch.manual_seed(0)
    deq = mb.DEQ(Rotating(16), rtol=1e-2, max_nfe=60, backward=copy.copy(GRADIENTS), warn=False)
    forward, backward = solvers(Layout("vector", (16,)), hidden=6, rank=16)
    keep_up = kept_up(deq, forward, backward, warmup_steps=40, every=5, unroll=4, learning_rate=5e-3)
    before = train(deq, keep_up, 39, shape=(16,))
    assert isinstance(deq.solver, mb.Broyden)
    assert keep_up.steps == 39
    after = train(deq, keep_up, 21, seed=2, shape=(16,))
    assert deq.solver is forward
    assert deq.backward_mode.solver is backward
    assert keep_up.steps == 39 + 1 + 4, "one that ended the warmup_steps, then every fifth"
    assert sum(after[1:]) / 20 < 0.9 * sum(before[-20:]) / 20
    assert set(keep_up.losses) == {"forward", "backward"}


def test_training_with_it_does_to_the_model_what_training_without_it_does():
    """While classical solvers still solve, meta-steps leave no trace: no gradients, no draws, no weights."""
    found = []
    for watched in (False, True):
        deq, forward, backward = made()
        state = torch.random.get_rng_state()
        keep_up = kept_up(deq, forward, backward, warmup_steps=50) if watched else None
        optimizer = torch.optim.Adam(deq.parameters(), lr=1e-3)
        for seed in range(4):
            optimizer.zero_grad()
            deq(normal(6, 4, 5, 5, seed=seed)).pow(3).mean().backward()
            optimizer.step()
            if keep_up is not None:
                before = [p.grad.clone() for p in deq.parameters()]
                assert keep_up.step()
                assert all(torch.equal(p.grad, g) for p, g in zip(deq.parameters(), before, strict=True))
        assert torch.equal(torch.random.get_rng_state(), state)
        found.append(deq)
    assert same_parameters(*found)


def test_meta_steps_lower_the_loss_of_both_directions_on_the_same_problem():
    deq, forward, backward = made(gain=8.0)
    keep_up = kept_up(deq, forward, backward, batch=16, unroll=5, learning_rate=3e-3)
    deq(torch.randn(16, 4, 5, 5)).pow(3).sum().backward()
    keep_up.meta_step()
    first = dict(keep_up.losses)
    for _ in range(40):
        keep_up.meta_step()
    assert all(keep_up.losses[name] < first[name] - 0.1 for name in ("forward", "backward"))


def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path):
    options = {"warmup_steps": 2, "every": 2, "unroll": 2, "batch": 4}

    def steps(deq, keep_up, *seeds):
        for seed in seeds:
            train(deq, keep_up, 1, seed=seed)  # an optimizer of its own each time

    whole, again = made(), made()
    keep_up, resumed = kept_up(*whole, **options), kept_up(*again, **options)
    steps(whole[0], keep_up, 1, 2, 3)
    torch.save({"deq": whole[0].state_dict(), "keep_up": keep_up.state_dict()}, tmp_path / "state")
    steps(whole[0], keep_up, 4, 5, 6)
    saved = torch.load(tmp_path / "state")
    again[0].load_state_dict(saved["deq"])
    resumed.load_state_dict(saved["keep_up"])
    assert again[0].solver is again[1]
    steps(again[0], resumed, 4, 5, 6)
    assert all(map(same_parameters, whole, again))
    refused("not the state of a CoTrainer", lambda: resumed.load_state_dict({"solvers": {}}))


def test_evaluation_between_steps_is_not_taken_for_training():
    deq, forward, backward = made()
    keep_up = kept_up(deq, forward, backward, warmup_steps=1)
    with torch.no_grad():
        deq(torch.randn(3, 4, 5, 5))
    assert not keep_up.step(), "nothing was seen yet"
    refused("has seen no training step of its DEQ yet", keep_up.meta_step, RuntimeError)
    deq(torch.randn(5, 4, 5, 5)).sum().backward()
    with torch.no_grad():
        deq(torch.randn(3, 4, 5, 5))
    assert keep_up.step(), "the warmup_steps is over, but nothing has been learned yet"
    assert deq.backward_mode.solver is backward
    assert not any(keep_up.step() for _ in range(20)), "no problem is trained on twice"


def test_a_problem_is_kept_with_its_own_cotangent():
    """A second call of the layer that no gradient comes to does not take the place of the first."""
    deq, forward, backward = made()
    keep_up = kept_up(deq, forward, backward, warmup_steps=3)
    z = deq(x=torch.randn(5, 4, 5, 5))
    deq(torch.randn(7, 4, 5, 5))
    z.sum().backward()
    assert keep_up.step()
    assert set(keep_up.losses) == {"forward", "backward"}
    deq.states(torch.randn(5, 4, 5, 5), after=(2,))[-1].sum().backward()
    assert keep_up.step()


class Dropping(nn.Module):
    """A normalised cell that notes its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.map = mb.normalise(nn.Linear(6, 6), max_norm=0.9)
        self.drop, self.seen = mb.VariationalDropout(0.4, (6,)), []

    def forward(self, z, x):
        if self.drop.mask is not None:
            self.seen.append(self.drop.mask)
        return torch.tanh(self.map(self.drop(z)) + x)


def test_meta_steps_leave_a_cells_normalisation_and_its_masks_alone():
    deq, ordered = mb.DEQ(Dropping(), warn=False), lambda mask: torch.stack(sorted(mask.float(), key=str))
    keep_up = kept_up(deq, *solvers(Layout("vector", (6,)), hidden=4, rank=6), unroll=3, batch=16)
    deq(torch.randn(16, 6)).sum().backward()
    before = {name: buffer.clone() for name, buffer in deq.named_buffers()}
    drawn = ordered(deq.cell.seen[0])
    deq.cell.seen.clear()
    state = torch.random.get_rng_state()
    keep_up.meta_step()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(buffer, before[name]) for name, buffer in deq.named_buffers())
    assert all(torch.equal(ordered(mask), drawn) for mask in deq.cell.seen)
    assert len(deq.cell.seen) >= 4


def test_one_direction_alone():
    deq, forward, backward = made()
    keep_up = kept_up(deq, forward, warmup_steps=0)
    assert deq.solver is forward
    train(deq, keep_up, 8)
    assert list(keep_up.losses) == ["forward"]
    assert isinstance(deq.backward_mode.solver, mb.Broyden)
    keep_up.close()
    assert not any(p.requires_grad for p in forward.parameters())
    deq, _, backward = made()
    train(deq, kept_up(deq, backward=backward, warmup_steps=2), 3)
    assert isinstance(deq.solver, mb.Broyden)
    assert deq.backward_mode.solver is backward


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
    deq, forward, _ = made()
    keep_up = kept_up(deq, forward, warmup_steps=5)
    deq(torch.randn(6, 4, 5, 5)).sum().backward()
    before = copy.deepcopy(forward)
    deq.cell.norm3.weight.data.fill_(float("nan"))
    keep_up.meta_step()
    assert keep_up.skipped == 1
    assert same_parameters(forward, before)


def unrolled() -> mb.DEQ:
    return mb.DEQ(nn.Linear(2, 2), backward=mb.Unroll())


@pytest.mark.parametrize(
    ("words", "build", "error"),
    [
        ("needs a learned solver, forward or backward", lambda deq, f, b: kept_up(deq), ValueError),
        ("must be a learned solver such as MetaBroyden", lambda deq, f, b: kept_up(deq, mb.Broyden()), TypeError),
        ("such as MetaBroyden, got AdjointLSTM", lambda deq, f, b: kept_up(deq, b), TypeError),
        ("backward must be an AdjointLSTM, got GroupedLSTM", lambda deq, f, b: kept_up(deq, backward=f), TypeError),
        ("with Implicit gradients, got Unroll", lambda deq, f, b: kept_up(unrolled(), backward=b), TypeError),
        (
            "be the DEQ that is trained, or a model with one in it, got ConvCell",
            lambda deq, f, b: kept_up(deq.cell, backward=b),
            TypeError,
        ),
        ("every must be an integer of at least 1, got 0", lambda *_: mb.CoTrainConfig(every=0), ValueError),
        ("must be an integer of at least 0, got -1", lambda *_: mb.CoTrainConfig(warmup_steps=-1), ValueError),
    ],
)
def test_bad_arguments_are_refused(words, build, error):
    refused(words, lambda: build(*made()), error)


class Pair(nn.Module):
    """States of two tensors that pull at one another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 3)

    def initial_state(self, x):
        return torch.zeros_like(x), x.new_zeros(len(x), 3)

    def forward(self, z, x):
        return torch.tanh(self.first(z[1]) + x), torch.tanh(self.second(z[0]))


def co_trainer(deq, solver, **options) -> mb.CoTrainer:
    return mb.CoTrainer(deq, solver, config=mb.CoTrainConfig(**{"warmup_steps": 3, "unroll": 3, **options}))


def flagship(shape, kind: str = "image", **options):
    settings = {"rank": 6, "learned_steps": 6, "conditioning": "input", "initializer_width": 6, **options}
    return make_learned("meta-broyden", Layout(kind, shape), **settings)


@pytest.mark.parametrize("backend", ["native", "higher"])
@pytest.mark.parametrize("coefficients", ["schedule", "lstm"])
def test_the_loss_is_its_formula_and_reaches_cell_context_and_solver(backend, coefficients):
    torch.manual_seed(0)
    deq, solver = (
        mb.DEQ(ConvCell(4, 8, 2), rtol=1e-4, max_nfe=60, warn=False),
        flagship((4, 5, 5), coefficients=coefficients),
    )
    for weight in solver.parameters():
        weight.data += 0.05 * torch.randn(weight.shape)
    stem = nn.Conv2d(1, 4, 3, padding=1)
    co = co_trainer(deq, solver, residual_weight=0.3, start_weight=2.0, residual_steps=2, backend=backend)
    x = stem(normal(6, 1, 5, 5))
    star = deq(x)
    task = star.square().mean()
    found = co.loss(task)
    rollout = mb.meta.unroll(solver, deq.cell, torch.zeros_like(x), x, steps=2, backend="native")
    away = (rollout.iterates[0] - star.detach().flatten(1)).square().sum(1) / star.detach().flatten(1).square().sum(1)
    wanted = task + 2.0 * away.mean() + 0.3 * (rollout.residuals + 1e-4).log().mean()
    torch.testing.assert_close(found, wanted)
    weights = [*deq.cell.parameters(), *stem.parameters(), *solver.parameters()]
    ours, theirs = (
        torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True) for value in (found, wanted)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    by_task = torch.autograd.grad(task, weights, allow_unused=True)
    assert all(gradient is None for gradient in by_task[-len(list(solver.parameters())) :])
    assert any(not torch.allclose(a, b) for a, b in zip(ours[:2], by_task[:2], strict=True))


def co_train(deq, co, steps: int, seed: int = 1, shape=(4, 5, 5)) -> list[float]:
    """Training steps with the loss of a co-trainer; mean evaluations of each forward solve."""
    generator = torch.Generator().manual_seed(seed)
    optimizer, spent = torch.optim.Adam(deq.parameters(), lr=3e-3), []
    for _ in range(steps):
        x, y = (0.5 * torch.randn(16, *shape, generator=generator) for _ in range(2))
        optimizer.zero_grad()
        co.loss((deq(x) - y).square().mean()).backward()
        optimizer.step()
        co.step()
        spent.append(float(deq.last_solution.nfe.double().mean()))
    return spent


def test_solves_begin_at_the_learned_start_and_need_fewer_evaluations_with_training():
    torch.manual_seed(0)
    deq = mb.DEQ(Rotating(16), rtol=1e-3, max_nfe=60, backward=mb.Phantom(steps=4), warn=False)
    forward = flagship((16,), "vector", rank=16, learned_steps=10)
    co = co_trainer(deq, forward, warmup_steps=20, unroll=6, residual_weight=0.3, learning_rate=5e-3)
    before = co_train(deq, co, 1, shape=(16,))
    assert isinstance(deq.solver, mb.LearnedStart)
    assert deq.solver.initializer is forward.initializer, "it is trained while it serves"
    co_train(deq, co, 79, seed=2, shape=(16,))
    assert deq.solver is forward
    after = co_train(deq, co, 5, seed=3, shape=(16,))
    assert sum(after) / 5 < 0.5 * before[0]
    assert {"start", "residual", "forward"} == set(co.losses)


def test_states_of_several_tensors():
    torch.manual_seed(0)
    deq = mb.DEQ(Pair(), rtol=1e-3, backward=mb.Phantom(steps=3), warn=False)
    solver = make_learned("meta-broyden", Layout("vector", (8,)), conditioning="initial_value", learned_steps=6, rank=4)
    co = co_trainer(deq, solver, warmup_steps=1, every=1)
    for seed in range(3):
        x = normal(8, 5, seed=seed)
        z, w = deq(x)
        co.loss(z.square().mean() + w.square().mean()).backward()
        assert co.step()
        deq.zero_grad()
    assert deq.solver is solver
    refused("states of one tensor", lambda: _backward_of_pair(), TypeError)


def _backward_of_pair() -> None:
    deq = mb.DEQ(Pair(), rtol=1e-3, warn=False)
    mb.CoTrainer(deq, backward=make_learned("adjoint", Layout("vector", (8,))))
    deq(normal(4, 5))


def test_a_co_training_goes_on_bit_for_bit():
    def made_anew():
        torch.manual_seed(0)
        deq = mb.DEQ(Rotating(8), rtol=1e-2, backward=mb.Phantom(steps=3), warn=False)
        solver = flagship((8,), "vector")
        return deq, co_trainer(deq, solver, warmup_steps=5, every=2, balance=0.5, orthogonal_rate=0.01)

    (deq, co), (other, again) = made_anew(), made_anew()
    for seed in range(3):
        co_train(deq, co, 1, seed=seed, shape=(8,))
    co.judge(used=2.0)
    other.load_state_dict(deq.state_dict())
    again.load_state_dict(copy.deepcopy(co.state_dict()))
    assert isinstance(other.solver, mb.LearnedStart)
    assert again.residual_weight == co.residual_weight
    for seed in range(3, 9):
        spent = [co_train(one, by, 1, seed=seed, shape=(8,)) for one, by in ((deq, co), (other, again))]
        assert spent[0] == spent[1]
    assert same_parameters(deq, other)
    assert same_parameters(co.solvers["forward"], again.solvers["forward"])


def test_weights_are_judged_and_balanced():
    deq, *_ = made()
    co = co_trainer(deq, flagship((4, 5, 5)), residual_weight=0.1)
    for used, wanted in ((0.0, 0.2), (0.7, 0.2), (1.0, 0.14), (7.0, 0.07), (0.1, 0.14)):
        co.judge(used)
        assert co.residual_weight == pytest.approx(wanted)
    for _ in range(20):
        co.judge(used=2.0)
    assert co.residual_weight == pytest.approx(0.1 / 8)
    deq, *_ = made()
    co = co_trainer(deq, flagship((4, 5, 5)), residual_weight=0.1, balance=1e-3)
    x = normal(6, 4, 5, 5)
    z = deq(x)
    task = z.square().mean()
    co.loss(task)
    norms = []
    weights = list(deq.cell.parameters())
    rollout = mb.meta.unroll(co.solvers["forward"], deq.cell, torch.zeros_like(x), x, steps=4, backend="native")
    for value in (task, (rollout.residuals + 1e-4).log().mean()):
        found = torch.autograd.grad(value, weights, retain_graph=True)
        norms.append(float(torch.cat([part.flatten() for part in found]).norm()))
    assert co.residual_weight == pytest.approx((0.1 * 1e-3 * norms[0] / norms[1]) ** 0.5, rel=1e-3)


def test_without_an_equilibrium_or_with_an_infinite_residual_the_task_is_alone():
    deq, *_ = made()
    co = co_trainer(deq, flagship((4, 5, 5)))
    task = torch.tensor(1.0, requires_grad=True)
    assert co.loss(task) is task, "nothing was solved"
    z = deq(normal(3, 4, 5, 5))
    for weight in co.solvers["forward"].preconditioner.outward.parameters():
        weight.data.fill_(torch.inf)
    task = z.square().mean()
    assert co.loss(task) is task
    assert co.skipped == 1


def test_a_model_may_be_given_for_its_layer():
    deq, *_ = made()
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), deq)
    assert co_trainer(model, flagship((4, 5, 5))).deq is deq
    refused(
        "a model with one in it, got Sequential with 2",
        lambda: co_trainer(nn.Sequential(deq, made()[0]), None),
        TypeError,
    )


def test_terms_are_added_once_for_each_equilibrium():
    deq, *_ = made()
    co = co_trainer(deq, flagship((4, 5, 5)))
    task = deq(normal(6, 4, 5, 5)).square().mean()
    assert co.watching
    assert co.loss(task) is not task
    assert co.loss(task) is task
    task.backward()
    co.step()
    assert not co.watching


def test_a_state_takes_a_trainer_that_has_gone_further_back():
    torch.manual_seed(0)
    deq = mb.DEQ(Rotating(8), rtol=1e-2, backward=mb.Phantom(steps=3), warn=False)
    usual, forward = deq.solver, flagship((8,), "vector")
    co = co_trainer(deq, forward, warmup_steps=2)
    begun = copy.deepcopy(co.state_dict())
    co_train(deq, co, 1, shape=(8,))
    warm = copy.deepcopy(co.state_dict())
    co_train(deq, co, 3, shape=(8,))
    assert deq.solver is forward
    co.load_state_dict(warm)
    assert isinstance(deq.solver, mb.LearnedStart)
    co.load_state_dict(begun)
    assert deq.solver is usual


def test_closing_in_the_warm_up_gives_the_solver_back_for_good():
    torch.manual_seed(0)
    deq = mb.DEQ(Rotating(8), rtol=1e-2, backward=mb.Phantom(steps=3), warn=False)
    usual, co = deq.solver, None
    co = co_trainer(deq, flagship((8,), "vector"), warmup_steps=5)
    co_train(deq, co, 2, shape=(8,))
    co.close()
    assert deq.solver is usual
    co_train(deq, co, 8, shape=(8,))
    assert deq.solver is usual
    assert co.steps == 2


def test_autocast_and_a_start_that_the_model_gives():
    torch.manual_seed(0)
    deq = mb.DEQ(Rotating(8), rtol=1e-2, backward=mb.Phantom(steps=3), warn=False)
    stem = nn.Linear(3, 8)
    co = co_trainer(deq, flagship((8,), "vector", conditioning="initial_value"))
    with torch.autocast("cpu", torch.bfloat16):
        task = deq(stem(normal(6, 3))).float().square().mean()
    co.loss(task).backward()
    assert co.step()
    wide = mb.DEQ(
        lambda z, x: torch.tanh(0.5 * z + x.repeat(1, 2)), rtol=1e-2, backward=mb.Phantom(steps=3), warn=False
    )
    co = co_trainer(wide, flagship((8,), "vector", conditioning="initial_value"), balance=0.5)
    x = normal(6, 4).requires_grad_()
    co.loss(wide(x, torch.zeros(6, 8)).square().mean()).backward()
    assert co.step()
    assert co.residual_weight == co.config.residual_weight, "a function has no weights to balance the terms on"


def test_it_says_that_it_sees_nothing():
    deq, *_ = made()
    co = co_trainer(deq, flagship((4, 5, 5)))
    assert not any(co.step() for _ in range(9))
    with pytest.warns(UserWarning, match="found no equilibrium with gradients in 10 steps"):
        co.step()
    co.step()


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("finds none: use Implicit or Phantom", lambda deq, solver: mb.CoTrainer(unrolled(), solver)),
        ("config must be a CoTrainConfig, got dict", lambda deq, solver: mb.CoTrainer(deq, solver, config={})),
        ("used must be a number", lambda deq, solver: mb.CoTrainer(deq, solver).judge(True)),
    ],
)
def test_what_cannot_be_co_trained_is_refused(words, call):
    refused(words, lambda: call(made()[0], flagship((4, 5, 5))), TypeError)
