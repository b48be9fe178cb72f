"""Tasks and the outer loop."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

import metabroyden as mb
from metabroyden.learned.layout import Layout
from metabroyden.meta import MetaConfig, MetaTrainer, TaskSet, schedule
from metabroyden.meta.episodes import as_learn2learn
from metabroyden.meta.estimators import TaskDraws
from metabroyden.meta.fit import make_learned
from metabroyden.meta.objectives import HyperObjective, ResidualObjective
from metabroyden.meta.schedule import StepGuard, cosine, in_words, reason_to_stop, share
from metabroyden.meta.trainer import mean_evaluations
from metabroyden.meta.unroll import Rollout
from metabroyden.progress import tensorboard
from tests.helpers import ConvTanh, contexts, normal, refused, same_parameters


def tasks(f=None) -> TaskSet:
    return TaskSet(f or ConvTanh(), contexts(60), contexts(16, 1), contexts(16, 2))


def grouped(seed: int = 0):
    return make_learned("grouped", Layout("image", (3, 4, 4)), seed=seed, hidden=6, rank=8, initializer_width=8)


SMALL = MetaConfig(steps=12, unroll=4, batch=8, validate_every=4, validation_nfe=40)


def trainer(config: MetaConfig = SMALL, f=None, seed: int = 0, **options) -> MetaTrainer:
    return MetaTrainer(grouped(seed), tasks(f), config, **options)


def at_best(trainer: MetaTrainer) -> bool:
    """Whether its solver has the best weights so far."""
    return all(torch.equal(value, trainer.best[name]) for name, value in trainer.solver.state_dict().items())


def test_meta_training_beats_broyden_on_held_out_contexts():
    trained = trainer(MetaConfig(steps=80, unroll=8, batch=16, validate_every=20)).run()
    ours, theirs = (mean_evaluations(one, tasks(), split="test") for one in (trained, mb.Broyden(memory=60)))
    assert ours < 0.75 * theirs
    assert trained.summary["validation"][-1]["step"] == 80


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "higher"},
        {"backend": "native"},
        {"unroll": (2, 8), "start_noise": 0.5},
        {"orthogonal_rate": 0.05},
        {"detach_features": True, "checkpoint_steps": True, "half": True, "segments": 2},
    ],
    ids=lambda options: ", ".join(options),
)
def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path, options):
    config, path = replace(SMALL, steps=8, **options), tmp_path / "training.safetensors"
    whole = trainer(config).run()
    trainer(config, checkpoint=path).run(until=5)
    resumed = trainer(config, seed=9, checkpoint=path)
    assert resumed.step == 5
    assert bool(resumed.optimizer.matrices) == ("orthogonal_rate" in options)
    again = resumed.run()
    assert trainer(config, checkpoint=path).stopped == "steps"
    assert same_parameters(whole, again)
    scores = [[entry["score"] for entry in solver.summary["validation"]] for solver in (whole, again)]
    assert scores[0] == scores[1]


def test_the_file_of_another_training_or_on_other_problems_is_refused(tmp_path):
    path = tmp_path / "training.safetensors"
    trainer(checkpoint=path).run(until=4)
    trainer(checkpoint=path)  # the same ones: it goes on
    words, error = "written by another meta-training", mb.CheckpointError
    refused(words, lambda: trainer(replace(SMALL, unroll=5), checkpoint=path), error)
    f, other = ConvTanh(), contexts(60)
    f.conv.weight.data.mul_(0.9)
    other[0, 0, 0, 0] += 1
    for changed in (tasks(f), TaskSet(ConvTanh(), other, contexts(16, 1), contexts(16, 2))):
        words = "on other problems: other weights of f, or other contexts"
        refused(words, lambda: MetaTrainer(grouped(), changed, SMALL, checkpoint=path), error)  # noqa: B023


def test_the_weights_kept_are_those_that_did_best_on_validation_and_f_stays_as_it_was():
    cell = ConvTanh()
    made = trainer(f=cell)
    solver = made.run()
    assert mean_evaluations(solver, made.tasks, max_nfe=40) == min(entry["score"] for entry in made.history)
    assert same_parameters(cell, ConvTanh())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in cell.parameters())
    trainer(f=lambda z, x: cell(z, x)).run(until=1)
    assert all(parameter.grad is None for parameter in cell.parameters()), "what f closes over collects none either"


def scored(monkeypatch, *scores: float) -> None:
    """Validation finds these."""
    left = iter(scores)
    monkeypatch.setattr(MetaTrainer, "_score", lambda self: next(left))


def test_a_training_that_no_longer_improves_stops_early(monkeypatch):
    scored(monkeypatch, 9.0, 7.0, 8.0, 7.0, 7.5, 1.0)
    summary = trainer(replace(SMALL, steps=100, validate_every=1, patience=3)).run().summary
    assert (summary["stopped"], summary["steps"]) == ("patience", 4)
    assert [entry["score"] for entry in summary["validation"]] == [9.0, 7.0, 8.0, 7.0, 7.5]


def test_a_time_budget_ends_the_training_and_is_kept_over_an_interruption(tmp_path, monkeypatch):
    """The schedule goes by time, and what is spent stays spent."""
    now, update = [0.0], MetaTrainer._update

    def slow(trainer):
        now[0] += 0.125
        return update(trainer)

    monkeypatch.setattr(MetaTrainer, "_update", slow)
    monkeypatch.setattr(schedule.time, "process_time", lambda: now[0])
    path = tmp_path / "training.safetensors"
    config = replace(SMALL, steps=100_000, seconds=1.0, budget_clock="cpu")
    begun = trainer(config, checkpoint=path)
    begun.run(until=3)
    assert share(config, begun.step, begun.clock.read()) == 0.375
    resumed = trainer(config, checkpoint=path)
    assert resumed.clock.read()[1] == 0.375
    assert 0 < resumed.clock.read()[0] <= begun.clock.read()[0]
    summary = resumed.run().summary
    assert (summary["stopped"], summary["steps"], summary["cpu_seconds"]) == ("budget", 8, 1.0)
    assert summary["seconds"] > 0
    assert resumed.optimizer.param_groups[0]["lr"] < 0.1 * config.learning_rate, "annealed by the time it stops"


def test_the_schedule_goes_by_the_larger_share():
    config = replace(SMALL, steps=10, seconds=100.0, budget_clock="cpu")
    assert share(config, 5, (99, 20)) == 0.5
    assert share(config, 5, (0, 70)) == 0.7
    assert reason_to_stop(config, 5, (0, 100), [], StepGuard()) == "budget"
    assert reason_to_stop(config, 10, (0, 0), [], StepGuard()) == "steps"
    assert reason_to_stop(config, 5, (1e9, 0), [], StepGuard()) is None


class Blows(nn.Module):
    """As `ConvTanh`, but not finite in the unrolls of these outer steps."""

    def __init__(self, steps) -> None:
        super().__init__()
        self.cell, self.steps, self.trainer = ConvTanh(), steps, None

    def forward(self, z, x):
        bad = z.requires_grad and self.trainer.step in self.steps
        return self.cell(z, x) * (torch.nan if bad else 1.0)


def blown(bad, **options) -> MetaTrainer:
    f = Blows(bad)
    f.trainer = trainer(replace(SMALL, **options), f)
    return f.trainer


def test_steps_that_are_not_finite_are_skipped_and_named():
    said, made = [], blown({1, 2, 7})
    made.run(lambda step, words: said.append(words))
    assert made.solver.summary["incidents"]["skipped"] == {"loss not finite": [1, 2, 7]}
    assert made.solver.summary["stopped"] == "steps"
    assert made.skipped == 3
    assert said[-1].endswith(", 3 skipped")
    assert "skipped" not in said[0]
    last, best = made.history[-1]["score"], made.best_score
    assert f"validation {last:.1f} evaluations at step 12, best {best:.1f}" in said[-1]
    assert in_words(made.incidents.describe()) == "steps 1, 2, 7 skipped (loss not finite)"
    assert all(torch.isfinite(value).all() for value in made.solver.state_dict().values())


def test_after_many_of_them_training_returns_to_the_best_weights_with_half_the_rate():
    rates, made = {}, blown({5, 6, 7}, rollback_after=3)
    made.curves = lambda step, values: rates.update({step: values.get("learning rate", rates.get(step))})
    made.run(until=8)
    assert made.incidents.returned == [7]
    assert at_best(made)
    made.run()
    assert rates[9] == pytest.approx(SMALL.learning_rate * cosine(8 / 12) / 2)
    assert "back to the best weights with half the learning rate after step 7" in in_words(made.incidents.describe())


def test_a_training_that_leaves_what_works_goes_back_to_it(monkeypatch):
    scored(monkeypatch, 9.0, 7.0, 13.0, 15.0, 6.0, 30.0)
    made = trainer(replace(SMALL, validate_every=1))
    made.run(until=3)
    assert made.incidents.returned == [3]
    assert at_best(made)
    made.run(until=5)
    assert made.incidents.returned == [3, 5]
    assert made.optimizer.param_groups[0]["lr"] == pytest.approx(SMALL.learning_rate * cosine(4 / 12) / 2)


def test_a_training_that_cannot_be_helped_is_given_up():
    made = blown(range(3, 1000), steps=1000, rollback_after=4, max_rollbacks=2)
    made.run()
    assert (made.stopped, made.step) == ("non-finite", 15)
    assert made.incidents.returned == [6, 10]
    assert made.best_score == min(entry["score"] for entry in made.history)


def test_gradients_that_explode_are_clipped_and_named():
    made = trainer(replace(SMALL, clip=1e-9))
    made.run(until=3)
    assert made.incidents.exploded == [0, 1, 2]
    assert "steps 0, 1, 2 taken with a gradient 1000 times" in in_words(made.incidents.describe())


_KILLED = """
import sys
from pathlib import Path
from tests.meta.test_meta import ENDLESS, trainer
trainer(ENDLESS, checkpoint=Path(sys.argv[1]), save_every=2).run(lambda step, words: print(step, flush=True))
"""
ENDLESS = replace(SMALL, steps=400, unroll=2, batch=4, validate_every=5, validation_size=4)


def test_a_training_killed_in_the_middle_goes_on_bit_for_bit(tmp_path):
    path = tmp_path / "training.safetensors"
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 7:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    resumed, whole = trainer(ENDLESS, seed=9, checkpoint=path), trainer(ENDLESS)
    assert 6 <= resumed.step < 400
    until = resumed.step + 6
    for one in (resumed, whole):
        one.run(until=until)
    assert same_parameters(whole.solver, resumed.solver)
    assert all(torch.equal(value, resumed.best[name]) for name, value in whole.best.items())
    assert [look["score"] for look in whole.history] == [look["score"] for look in resumed.history]


@pytest.mark.filterwarnings("ignore")
def test_curves_are_written_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = trainer()
    with tensorboard(tmp_path) as made.curves:
        made.run(until=4)
    time.sleep(1.1)  # files are read in the order of their names, which tell the second
    with tensorboard(tmp_path, made.step) as made.curves:
        made.run()
    log = EventAccumulator(str(tmp_path)).Reload()
    names = {"loss", "gradient norm", "learning rate", "skipped steps", "evaluations on validation"}
    assert set(log.Tags()["scalars"]) == names
    assert [event.step for event in log.Scalars("loss")] == list(range(1, 13))
    scores = [event.value for event in log.Scalars("evaluations on validation")]
    assert scores == pytest.approx([look["score"] for look in made.history])


def known(x: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in x}


def test_splits_do_not_overlap_and_the_test_split_is_not_drawn_from():
    train, cell = contexts(10), ConvTanh()
    refused("validation split is in the train split", lambda: TaskSet(cell, train, train[3:5]))
    refused("test split is empty", lambda: TaskSet(cell, train, contexts(3, 1), train[:0]))
    task_set = tasks()
    _, x = task_set.draw(64, torch.Generator().manual_seed(0))
    assert known(x) <= known(task_set.split("train"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("steps", 0), ("unroll", 2.0), ("unroll", (8, 4)), ("segments", True), ("half", 1), ("start_noise", -0.1)),
        *(("learning_rate", -1.0), ("clip", float("nan")), ("backend", "jax"), ("patience", 0), ("rollback_after", 0)),
        *(("estimator", "adam"), ("particles", 0), ("seconds", 0.0), ("budget_clock", "sun")),
    ],
)
def test_bad_meta_configs_are_refused(name, value):
    refused(f"MetaConfig: {name} must be", lambda: MetaConfig(**{name: value}))


@pytest.mark.learn2learn
@pytest.mark.filterwarnings("ignore")
def test_task_sets_are_learn2learn_task_sets():
    sets = [tasks(), TaskSet(ConvTanh(), contexts(40, 7), contexts(8, 8))]
    episodes = as_learn2learn(sets, "train", shots=5, num_tasks=8)
    seen = set()
    for raw, labels in episodes:
        assert raw.shape == (5, 3, 4, 4)
        assert len(labels.unique()) == 1
        assert known(raw) <= known(sets[int(labels[0])].split("train"))
        seen.add(int(labels[0]))
    assert len(episodes) == 8
    assert seen == {0, 1}


def test_equilibria_found_beforehand_are_those_of_the_problems_that_are_drawn():
    made = tasks()
    config = MetaConfig(batch=16, anchor=1.0)
    draws = TaskDraws(made, config)
    assert draws.star(3) is None, "none has been found"
    made.equilibria = made.find_equilibria(mb.Broyden(), rtol=1e-5, max_nfe=60)
    f, z0, x = draws.batch(3)
    star = draws.star(3)
    assert star.shape == (16, z0[0].numel())
    torch.testing.assert_close(f(star.view_as(z0), x).flatten(1), star, rtol=0, atol=1e-4)
    made.equilibria = made.equilibria[:1]
    assert draws.star(3).isnan().any(dim=1).sum() >= 12, "of most the equilibrium is not known now"
    unsolved = made.find_equilibria(mb.Picard(1e-6), rtol=1e-6, max_nfe=2)
    assert unsolved.isnan().all(), "what was not solved is not taken for an equilibrium"


def two_wells(z, x):
    """Equilibria at ±1 and 0; from a start of the sign of x a plain iteration ends on its side."""
    return z + 0.3 * (z - z**3) + 0 * x


def test_an_anchored_training_ends_where_the_classical_solver_does():
    """Starts at ±0.3 lead to ±1; an initializer that is free to choose is pulled there and not to the other side."""
    x = normal(64, 4).sign() * (0.2 + torch.rand(64, 4, generator=torch.Generator().manual_seed(1)))
    made = TaskSet(two_wells, x[:40], x[40:], z0=lambda x: 0.3 * x.sign())
    made.equilibria = made.find_equilibria(mb.Picard(), rtol=1e-4, max_nfe=60)
    assert not made.equilibria.isnan().any()
    config = MetaConfig(steps=60, unroll=5, batch=32, anchor=2.0, backend="native", learning_rate=1e-2)
    layout = mb.Layout("vector", (4,))
    solver = MetaTrainer(mb.MetaBroyden(layout=layout, conditioning="input", context_channels=4), made, config).run()
    z0, x = made.problems("validation")
    found = mb.solve(two_wells, z0, x, solver=solver, rtol=1e-3, throw=False)
    assert (found.z.sign() == x.sign())[found.converged].double().mean() > 0.95


def test_contexts_made_beforehand_are_the_same_problems():
    made, f = [], lambda z, x: 0.5 * z + x

    def encode(raw):
        made.append(len(raw))
        return 2 * raw

    splits = [normal(count, 3, seed=seed) for seed, count in enumerate((9, 5, 4))]
    tasks = TaskSet(f, *splits, encode=encode, z0=torch.ones_like)
    ready = tasks.prepared(6, torch.Generator().manual_seed(0), 3)
    z0, x = ready.problems("validation")
    assert torch.equal(x, 2 * tasks.split("validation")[:3])
    assert torch.equal(z0, torch.ones(3, 3))
    _, drawn = ready.draw(50, torch.Generator().manual_seed(1))
    assert known(drawn) <= known(2 * tasks.split("train"))
    assert len(known(drawn)) == 6
    assert made == [6, 3], "no context is made twice"
    refused("no split 'test'", lambda: ready.split("test"))
    shifted = TaskSet(f, *splits[:2], augment=lambda raw, generator: raw + 1)
    refused("augmented", lambda: shifted.prepared(6, torch.Generator(), 3))


# --- objectives


def test_a_worse_start_does_not_lower_the_gradient_of_the_normalised_objective():
    """ρ₀ is what residuals are measured by: a constant, so that nothing is gained by making it larger."""
    residuals = torch.tensor([[4.0, 2.0], [1.0, 1.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(ResidualObjective("normalised", "last")(residuals), residuals)
    assert torch.equal(grad, torch.tensor([[0.0, 0.0], [0.125, 0.25]]))


@pytest.mark.parametrize("done", [0.0, 0.25, 0.5, 1.0])
def test_the_remainders_weight_falls_linearly_to_zero_over_a_training(done):
    star = torch.tensor([[3.0, 4.0]])
    rollout = Rollout(torch.zeros(2, 1), (star, star), (torch.tensor([10.0]), torch.tensor([20.0])), None)
    loss = HyperObjective(remainder=0.5).loss(rollout, star, done)
    assert float(loss) == pytest.approx((1 - done) * 0.5 * 15 / 5)
