"""What a fit takes of each phase where f is dear, and an f that has nothing to solve."""

from __future__ import annotations

import time

import pytest
import torch

import metabroyden as mb
from metabroyden.meta import MetaConfig, TaskSet, budget
from metabroyden.meta.budget import Budget, call_seconds, within
from metabroyden.meta.fit import make_learned
from tests.helpers import ConvTanh, contexts

pytestmark = pytest.mark.usefixtures("quick_fits")


def test_an_f_that_is_cheap_gives_every_phase_all_it_wants():
    assert Budget.of(60, 1e-6) == Budget()
    assert Budget.of(1, 0.0) == Budget()


def test_an_f_that_is_dear_gives_each_phase_its_share():
    dear = Budget.of(150, 3e-3)
    assert dear == Budget(tuned=6, anchored=100, looked=25, compared=16)
    assert Budget.of(1e-3, 1.0) == Budget(6, 16, 16, 16), "so many at least"
    spent = {"tuned": 1500 * dear.tuned, "anchored": 50 * dear.anchored, "looked": 40 * dear.looked}
    assert spent["anchored"] * 3e-3 <= 0.1 * 150
    assert spent["looked"] * 3e-3 <= 0.02 * 150
    longer = Budget.of(600, 3e-3)
    assert all(getattr(longer, name) >= getattr(dear, name) for name in spent)


def slow(z, x):
    time.sleep(2e-3 * len(z))
    return 0.5 * z + x


def test_calls_are_timed_by_sample():
    assert call_seconds(slow, torch.zeros(4, 2), torch.zeros(4, 2)) == pytest.approx(2e-3, rel=0.5)
    assert call_seconds(lambda z: slow(z, 0.0), torch.zeros(2, 2), None) == pytest.approx(2e-3, rel=0.5)


@pytest.mark.parametrize(("seconds", "batch"), [(1e6, 32), (1e-6, 4)])
def test_the_batch_is_as_large_as_some_hundred_steps_allow(seconds, batch):
    cell = ConvTanh()
    tasks = TaskSet(cell, contexts(40), contexts(8, seed=1))
    learned = make_learned("meta-broyden", mb.Layout("image", (3, 4, 4)))
    before = {name: value.clone() for name, value in learned.state_dict().items()}
    config = within(MetaConfig(unroll=4, steps=1000, validate_every=100), learned, tasks, seconds)
    assert config.batch == batch
    assert config.validate_every == (100 if seconds > 1 else 1)
    assert all(torch.equal(value, before[name]) for name, value in learned.state_dict().items()), "on a copy"
    assert all(parameter.grad is None for parameter in learned.parameters())


def test_a_fit_by_the_clock_has_smaller_batches_where_f_is_dear_and_says_what_it_does(monkeypatch, capsys):
    monkeypatch.setattr(budget, "call_seconds", lambda *_: 1.0)
    monkeypatch.setattr("metabroyden.meta.fit.call_seconds", lambda *_: 1.0)
    monkeypatch.setattr(budget, "WANTED", 10**9)
    _, verdict = mb.fit_solver(
        ConvTanh(), contexts(200), steps=3, seconds=30, fallback=False, return_report=True, progress=True
    )
    trained = verdict.fitted.summary["meta_training"]
    assert (trained["batch"], trained["validation_size"], verdict.samples) == (4, 16, 16)
    said = capsys.readouterr().err
    for phase in ("classical solvers are tuned", "training, 4 problems a step", "comparing on 16 problems"):
        assert phase in said
    _, verdict = mb.fit_solver(
        ConvTanh(), contexts(200), steps=3, seconds=30, batch_size=12, fallback=False, return_report=True,
        progress=False,
    )  # fmt: skip
    assert verdict.fitted.summary["meta_training"]["batch"] == 12, "as asked for"
    assert capsys.readouterr().err == ""


def test_an_f_without_a_usable_fixed_point_is_said_to_have_none_and_nothing_is_trained():
    def away(z, x):
        return 1.5 * z + x.abs() + 1 + z.square()  # no real fixed point

    began = time.perf_counter()
    with pytest.warns(
        UserWarning, match=r"f has no usable fixed point: within 60 .* spectral radius of its Jacobian is"
    ):
        solver, verdict = mb.fit_solver(away, 0.5 + normal_contexts(), progress=False, return_report=True)
    assert time.perf_counter() - began < 30
    assert not solver.is_learned
    assert verdict.outcome(verdict.best).success == 0.0


def normal_contexts() -> torch.Tensor:
    return torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).abs()
