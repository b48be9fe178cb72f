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

LAYOUT = Layout("image", (4, 5, 5))


def made(gain: float = 3.0, **options):
    """(layer, forward solver, backward solver)."""
    torch.manual_seed(0)
    cell = ConvCell(4, 8, 2)
    with torch.no_grad():
        for convolution in (cell.conv1, cell.conv2):
            convolution.weight.mul_(gain)
    deq = mb.DEQ(cell, rtol=1e-2, max_nfe=60, backward=mb.Implicit(rtol=1e-2, max_nfe=60), warn=False, **options)
    return deq, *(make_learned(kind, LAYOUT, hidden=6, rank=12) for kind in ("grouped", "adjoint"))


class Rotating(nn.Module):
    """tanh(zW + x), W nearly a rotation: a slow iteration with an inverse Jacobian that can be learned."""

    def __init__(self, n: int = 32) -> None:
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
    deq = mb.DEQ(Rotating(), rtol=1e-2, max_nfe=60, backward=mb.Implicit(rtol=1e-2, max_nfe=60), warn=False)
    forward, backward = (
        make_learned(kind, Layout("vector", (32,)), hidden=6, rank=32) for kind in ("grouped", "adjoint")
    )
    keep_up = mb.OnlineMetaTrainer(
        deq, forward, backward, config=mb.OnlineConfig(warmup_steps=80, every=5, unroll=4, learning_rate=5e-3)
    )
    before = train(deq, keep_up, 79, shape=(32,))
    assert isinstance(deq.solver, mb.Broyden)
    assert keep_up.steps == 79
    after = train(deq, keep_up, 21, seed=2, shape=(32,))
    assert deq.solver is forward
    assert deq.backward_mode.solver is backward
    assert keep_up.steps == 79 + 1 + 4, "one that ended the warmup_steps, then every fifth"
    assert sum(after[1:]) / 20 < 0.9 * sum(before[-20:]) / 20
    assert set(keep_up.losses) == {"forward", "backward"}


def test_training_with_it_does_to_the_model_what_training_without_it_does():
    """While classical solvers still solve, meta-steps leave no trace: no gradients, no draws, no weights."""
    found = []
    for watched in (False, True):
        deq, forward, backward = made()
        state = torch.random.get_rng_state()
        keep_up = (
            mb.OnlineMetaTrainer(deq, forward, backward, config=mb.OnlineConfig(warmup_steps=50)) if watched else None
        )
        optimizer = torch.optim.Adam(deq.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(3)
        for _ in range(4):
            x = torch.randn(6, 4, 5, 5, generator=generator)
            optimizer.zero_grad()
            deq(x).pow(3).mean().backward()
            optimizer.step()
            if keep_up is not None:
                before = [p.grad.clone() for p in deq.parameters()]
                assert keep_up.step()
                assert all(torch.equal(p.grad, g) for p, g in zip(deq.parameters(), before, strict=True))
        assert torch.equal(torch.random.get_rng_state(), state)
        found.append([p.detach().clone() for p in deq.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_meta_steps_lower_the_loss_of_both_directions_on_the_same_problem():
    deq, forward, backward = made(gain=8.0)
    config = mb.OnlineConfig(batch=16, unroll=5, learning_rate=3e-3)
    keep_up = mb.OnlineMetaTrainer(deq, forward, backward, config=config)
    deq(torch.randn(16, 4, 5, 5)).pow(3).sum().backward()
    keep_up.meta_step()
    first = dict(keep_up.losses)
    for _ in range(40):
        keep_up.meta_step()
    assert all(keep_up.losses[name] < first[name] - 0.1 for name in ("forward", "backward"))


def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path):
    config = mb.OnlineConfig(warmup_steps=2, every=2, unroll=2, batch=4)

    def steps(deq, keep_up, seeds):
        for seed in seeds:
            train(deq, keep_up, 1, seed=seed)  # an optimizer of its own each time

    deq, forward, backward = made()
    keep_up = mb.OnlineMetaTrainer(deq, forward, backward, config=config)
    steps(deq, keep_up, (1, 2, 3))
    torch.save({"deq": deq.state_dict(), "keep_up": keep_up.state_dict()}, tmp_path / "state")
    steps(deq, keep_up, (4, 5, 6))
    other, *solvers = made()
    resumed = mb.OnlineMetaTrainer(other, *solvers, config=config)
    saved = torch.load(tmp_path / "state")
    other.load_state_dict(saved["deq"])
    resumed.load_state_dict(saved["keep_up"])
    assert other.solver is solvers[0]
    steps(other, resumed, (4, 5, 6))
    for ours, wanted in ((other, deq), (solvers[0], forward), (solvers[1], backward)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), wanted.parameters(), strict=True))
    with pytest.raises(ValueError, match="not the state of a OnlineMetaTrainer"):
        resumed.load_state_dict({"solvers": {}})


def test_evaluation_between_steps_is_not_taken_for_training():
    deq, forward, backward = made()
    keep_up = mb.OnlineMetaTrainer(deq, forward, backward, config=mb.OnlineConfig(warmup_steps=1))
    with torch.no_grad():
        deq(torch.randn(3, 4, 5, 5))
    assert not keep_up.step(), "nothing was seen yet"
    with pytest.raises(RuntimeError, match="has seen no training step of its DEQ yet"):
        keep_up.meta_step()
    deq(torch.randn(5, 4, 5, 5)).sum().backward()
    with torch.no_grad():
        deq(torch.randn(3, 4, 5, 5))
    assert keep_up.step(), "the warmup_steps is over, but nothing has been learned yet"
    assert deq.backward_mode.solver is backward
    assert not any(keep_up.step() for _ in range(20)), "no problem is trained on twice"


def test_a_problem_is_kept_with_its_own_cotangent():
    """A second call of the layer that no gradient comes to does not take the place of the first."""
    deq, forward, backward = made()
    keep_up = mb.OnlineMetaTrainer(deq, forward, backward, config=mb.OnlineConfig(warmup_steps=3))
    z = deq(x=torch.randn(5, 4, 5, 5))
    deq(torch.randn(7, 4, 5, 5))
    z.sum().backward()
    assert keep_up.step()
    assert set(keep_up.losses) == {"forward", "backward"}
    states = deq.states(torch.randn(5, 4, 5, 5), after=(2,))
    states[-1].sum().backward()
    assert keep_up.step()


def test_meta_steps_leave_a_cells_normalisation_and_its_masks_alone():
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = mb.normalise(nn.Linear(6, 6), max_norm=0.9)
            self.drop = mb.VariationalDropout(0.4, (6,))
            self.seen = []

        def forward(self, z, x):
            if self.drop.mask is not None:
                self.seen.append(self.drop.mask)
            return torch.tanh(self.map(self.drop(z)) + x)

    deq = mb.DEQ(Cell(), warn=False)
    sizes = {"hidden": 4, "rank": 6}
    solvers = (make_learned(kind, Layout("vector", (6,)), **sizes) for kind in ("grouped", "adjoint"))
    keep_up = mb.OnlineMetaTrainer(deq, *solvers, config=mb.OnlineConfig(unroll=3, batch=16))
    deq(torch.randn(16, 6)).sum().backward()
    before = {name: buffer.clone() for name, buffer in deq.named_buffers()}
    drawn = torch.stack(sorted(deq.cell.seen[0].float(), key=str))
    deq.cell.seen.clear()
    state = torch.random.get_rng_state()
    keep_up.meta_step()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(buffer, before[name]) for name, buffer in deq.named_buffers())
    assert all(torch.equal(torch.stack(sorted(mask.float(), key=str)), drawn) for mask in deq.cell.seen)
    assert len(deq.cell.seen) >= 4


def test_one_direction_alone():
    deq, forward, backward = made()
    keep_up = mb.OnlineMetaTrainer(deq, forward, config=mb.OnlineConfig(warmup_steps=0))
    assert deq.solver is forward
    train(deq, keep_up, 8)
    assert list(keep_up.losses) == ["forward"]
    assert isinstance(deq.backward_mode.solver, mb.Broyden)
    keep_up.close()
    assert not any(p.requires_grad for p in forward.parameters())
    deq, _, backward = made()
    train(deq, mb.OnlineMetaTrainer(deq, backward=backward, config=mb.OnlineConfig(warmup_steps=2)), 3)
    assert isinstance(deq.solver, mb.Broyden)
    assert deq.backward_mode.solver is backward


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
    deq, forward, _ = made()
    keep_up = mb.OnlineMetaTrainer(deq, forward, config=mb.OnlineConfig(warmup_steps=5))
    deq(torch.randn(6, 4, 5, 5)).sum().backward()
    before = copy.deepcopy(forward.state_dict())
    with torch.no_grad():
        deq.cell.norm3.weight.fill_(float("nan"))
    keep_up.meta_step()
    assert keep_up.skipped == 1
    assert all(torch.equal(value, before[name]) for name, value in forward.state_dict().items())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda deq, f, b: mb.OnlineMetaTrainer(deq), "needs a learned solver, forward or backward"),
        (
            lambda deq, f, b: mb.OnlineMetaTrainer(deq, mb.Broyden()),
            "forward must be a learned solver such as GroupedLSTM",
        ),
        (
            lambda deq, f, b: mb.OnlineMetaTrainer(deq, b),
            "forward must be a learned solver such as GroupedLSTM, got AdjointLSTM",
        ),
        (lambda deq, f, b: mb.OnlineMetaTrainer(deq, backward=f), "backward must be an AdjointLSTM, got GroupedLSTM"),
        (
            lambda deq, f, b: mb.OnlineMetaTrainer(mb.DEQ(nn.Linear(2, 2), backward=mb.Unroll()), backward=b),
            "needs a DEQ with Implicit gradients, got Unroll",
        ),
        (lambda deq, f, b: mb.OnlineConfig(every=0), "every must be an integer of at least 1, got 0"),
        (lambda deq, f, b: mb.OnlineConfig(warmup_steps=-1), "warmup_steps must be an integer of at least 0, got -1"),
    ],
)
def test_bad_arguments_are_refused(build, words):
    with pytest.raises((ValueError, TypeError), match=words):
        build(*made())
