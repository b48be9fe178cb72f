"""Tasks and the outer loop."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import metabroyden as mb
from metabroyden.learned.layout import Layout
from metabroyden.meta import MetaConfig, MetaTrainer, TaskSet, schedule
from metabroyden.meta.episodes import as_learn2learn
from metabroyden.meta.fit import make_learned
from metabroyden.meta.objectives import HyperObjective, ResidualObjective
from metabroyden.meta.progress import tensorboard
from metabroyden.meta.schedule import StepGuard, cosine, in_words, reason_to_stop, share
from metabroyden.meta.trainer import mean_evaluations
from metabroyden.meta.unroll import Rollout


class Cell(torch.nn.Module):
    """A small convolutional cell that plain Picard fails on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.25)

    def forward(self, z, x):
        return torch.tanh(self.conv(z) + x)


def contexts(count: int, seed: int = 0) -> torch.Tensor:
    return 0.5 * torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def tasks(f=None) -> TaskSet:
    return TaskSet(f or Cell(), contexts(60), contexts(16, 1), contexts(16, 2))


def grouped(seed: int = 0):
    return make_learned("grouped", Layout("image", (3, 4, 4)), seed=seed, hidden=6, rank=8, initializer_width=8)


SMALL = MetaConfig(steps=12, unroll=4, batch=8, validate_every=4, validation_nfe=40)


def test_meta_training_beats_broyden_on_held_out_contexts():
    task_set, solver = tasks(), grouped()
    trained = MetaTrainer(solver, task_set, MetaConfig(steps=80, unroll=8, batch=16, validate_every=20)).run()
    ours = mean_evaluations(trained, task_set, split="test")
    assert ours < 0.75 * mean_evaluations(mb.Broyden(memory=60), task_set, split="test")
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
    config = replace(SMALL, **options)
    whole = MetaTrainer(grouped(), tasks(), config).run()
    path = tmp_path / "training.safetensors"
    MetaTrainer(grouped(), tasks(), config, checkpoint=path).run(until=5)
    resumed = MetaTrainer(grouped(seed=9), tasks(), config, checkpoint=path)
    assert resumed.step == 5
    assert bool(resumed.optimizer.matrices) == ("orthogonal_rate" in options)
    again = resumed.run()
    assert MetaTrainer(grouped(), tasks(), config, checkpoint=path).stopped == "steps"
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    scores = [[entry["score"] for entry in solver.summary["validation"]] for solver in (whole, again)]
    assert scores[0] == scores[1]


def test_another_runs_training_file_is_refused(tmp_path):
    path = tmp_path / "training.safetensors"
    MetaTrainer(grouped(), tasks(), SMALL, checkpoint=path).run(until=4)
    other = MetaConfig(**{**vars(SMALL), "unroll": 5})
    with pytest.raises(mb.CheckpointError, match="written by another meta-training"):
        MetaTrainer(grouped(), tasks(), other, checkpoint=path)


def test_the_weights_kept_are_those_that_did_best_on_validation():
    solver = grouped()
    trainer = MetaTrainer(solver, tasks(), SMALL)
    trainer.run()
    scores = [entry["score"] for entry in trainer.history]
    assert mean_evaluations(solver, trainer.tasks, max_nfe=40) == min(scores)


def test_training_leaves_f_as_it_was():
    cell = Cell()
    before = {name: value.clone() for name, value in cell.state_dict().items()}
    MetaTrainer(grouped(), tasks(cell), SMALL).run()
    assert all(torch.equal(value, before[name]) for name, value in cell.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in cell.parameters())


def test_what_f_closes_over_collects_no_gradients():
    cell = Cell()
    MetaTrainer(grouped(), tasks(lambda z, x: cell(z, x)), SMALL).run(until=1)
    assert all(parameter.grad is None for parameter in cell.parameters())


def test_a_training_that_no_longer_improves_stops_early(monkeypatch):
    scores = iter([9.0, 7.0, 8.0, 7.0, 7.5, 1.0])
    monkeypatch.setattr(MetaTrainer, "_score", lambda self: next(scores))
    solver = MetaTrainer(grouped(), tasks(), replace(SMALL, steps=100, validate_every=1, patience=3)).run()
    assert solver.summary["stopped"] == "patience"
    assert solver.summary["steps"] == 4
    assert [entry["score"] for entry in solver.summary["validation"]] == [9.0, 7.0, 8.0, 7.0, 7.5]


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
    trainer = MetaTrainer(grouped(), tasks(), config, checkpoint=path)
    trainer.run(until=3)
    assert share(config, trainer.step, trainer.clock.read()) == 0.375
    resumed = MetaTrainer(grouped(), tasks(), config, checkpoint=path)
    assert resumed.clock.read()[1] == 0.375
    assert 0 < resumed.clock.read()[0] <= trainer.clock.read()[0]
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


class Blows(torch.nn.Module):
    """As `Cell`, but not finite in the unrolls of these outer steps."""

    def __init__(self, steps) -> None:
        super().__init__()
        self.cell, self.steps, self.trainer = Cell(), steps, None

    def forward(self, z, x):
        bad = z.requires_grad and self.trainer.step in self.steps
        return self.cell(z, x) * (torch.nan if bad else 1.0)


def test_steps_that_are_not_finite_are_skipped_and_named():
    said = []
    f = Blows({1, 2, 7})
    f.trainer = trainer = MetaTrainer(grouped(), tasks(f), SMALL)
    trainer.run(lambda step, words: said.append(words))
    assert trainer.solver.summary["incidents"]["skipped"] == {"loss not finite": [1, 2, 7]}
    assert trainer.solver.summary["stopped"] == "steps"
    assert trainer.skipped == 3
    assert said[-1].endswith(", 3 skipped")
    assert "skipped" not in said[0]
    last, best = trainer.history[-1]["score"], trainer.best_score
    assert f"validation {last:.1f} evaluations at step 12, best {best:.1f}" in said[-1]
    assert in_words(trainer.incidents.describe()) == "steps 1, 2, 7 skipped (loss not finite)"
    assert all(torch.isfinite(value).all() for value in trainer.solver.state_dict().values())


def test_after_many_of_them_training_returns_to_the_best_weights_with_half_the_rate():
    rates = {}
    f = Blows({5, 6, 7})
    f.trainer = trainer = MetaTrainer(grouped(), tasks(f), replace(SMALL, rollback_after=3))
    trainer.curves = lambda step, values: rates.update({step: values.get("learning rate", rates.get(step))})
    trainer.run(until=8)
    assert trainer.incidents.returned == [7]
    for name, value in trainer.solver.state_dict().items():
        assert torch.equal(value, trainer.best[name]), name
    trainer.run()
    assert rates[9] == pytest.approx(SMALL.learning_rate * cosine(8 / 12) / 2)
    assert "back to the best weights with half the learning rate after step 7" in in_words(trainer.incidents.describe())


def test_a_training_that_leaves_what_works_goes_back_to_it(monkeypatch):
    scores = iter([9.0, 7.0, 13.0, 15.0, 6.0, 30.0])
    monkeypatch.setattr(MetaTrainer, "_score", lambda self: next(scores))
    trainer = MetaTrainer(grouped(), tasks(), replace(SMALL, validate_every=1))
    trainer.run(until=3)
    assert trainer.incidents.returned == [3]
    assert all(torch.equal(value, trainer.best[name]) for name, value in trainer.solver.state_dict().items())
    trainer.run(until=5)
    assert trainer.incidents.returned == [3, 5]
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(SMALL.learning_rate * cosine(4 / 12) / 2)


def test_a_training_that_cannot_be_helped_is_given_up():
    f = Blows(range(3, 1000))
    f.trainer = trainer = MetaTrainer(
        grouped(), tasks(f), replace(SMALL, steps=1000, rollback_after=4, max_rollbacks=2)
    )
    trainer.run()
    assert trainer.stopped == "non-finite"
    assert trainer.incidents.returned == [6, 10]
    assert trainer.step == 15
    assert trainer.best_score == min(entry["score"] for entry in trainer.history)


def test_gradients_that_explode_are_clipped_and_named():
    trainer = MetaTrainer(grouped(), tasks(), replace(SMALL, clip=1e-9))
    trainer.run(until=3)
    assert trainer.incidents.exploded == [0, 1, 2]
    assert "steps 0, 1, 2 taken with a gradient 1000 times" in in_words(trainer.incidents.describe())


_KILLED = """
import sys
from tests.meta.test_meta import ENDLESS, MetaTrainer, grouped, tasks
from pathlib import Path
trainer = MetaTrainer(grouped(), tasks(), ENDLESS, checkpoint=Path(sys.argv[1]), save_every=2)
trainer.run(lambda step, words: print(step, flush=True))
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
    resumed = MetaTrainer(grouped(seed=9), tasks(), ENDLESS, checkpoint=path)
    assert 6 <= resumed.step < 400
    until = resumed.step + 6
    resumed.run(until=until)
    whole = MetaTrainer(grouped(), tasks(), ENDLESS)
    whole.run(until=until)
    for one, other in ((whole.solver.state_dict(), resumed.solver.state_dict()), (whole.best, resumed.best)):
        for name, value in one.items():
            assert torch.equal(value, other[name]), name
    assert [look["score"] for look in whole.history] == [look["score"] for look in resumed.history]


@pytest.mark.filterwarnings("ignore")
def test_curves_are_written_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = MetaTrainer(grouped(), tasks(), SMALL)
    with tensorboard(tmp_path) as trainer.curves:
        trainer.run(until=4)
    time.sleep(1.1)  # files are read in the order of their names, which tell the second
    with tensorboard(tmp_path, trainer.step) as trainer.curves:
        trainer.run()
    log = EventAccumulator(str(tmp_path)).Reload()
    assert set(log.Tags()["scalars"]) == {"loss", "gradient norm", "learning rate", "evaluations on validation"}
    assert [event.step for event in log.Scalars("loss")] == list(range(1, 13))
    scores = [event.value for event in log.Scalars("evaluations on validation")]
    assert scores == pytest.approx([look["score"] for look in trainer.history])


def test_splits_that_overlap_are_refused():
    train = contexts(10)
    with pytest.raises(ValueError, match="validation split is in the train split"):
        TaskSet(Cell(), train, train[3:5])
    with pytest.raises(ValueError, match="test split is empty"):
        TaskSet(Cell(), train, contexts(3, 1), train[:0])


def test_the_test_split_is_not_drawn_from():
    task_set = tasks()
    train = {row.numpy().tobytes() for row in task_set.split("train")}
    _, x = task_set.draw(64, torch.Generator().manual_seed(0))
    assert {row.numpy().tobytes() for row in x} <= train


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"unroll": 2.0},
        {"unroll": (8, 4)},
        {"segments": True},
        {"half": 1},
        {"start_noise": -0.1},
        {"learning_rate": -1.0},
        {"clip": float("nan")},
        {"backend": "jax"},
        {"patience": 0},
        {"rollback_after": 0},
        {"estimator": "adam"},
        {"particles": 0},
        {"seconds": 0.0},
        {"budget_clock": "sun"},
    ],
)
def test_bad_meta_configs_are_refused(options):
    with pytest.raises(ValueError, match=f"MetaConfig: {next(iter(options))} must be"):
        MetaConfig(**options)


@pytest.mark.learn2learn
@pytest.mark.filterwarnings("ignore")
def test_task_sets_are_learn2learn_task_sets():
    sets = [tasks(), TaskSet(Cell(), contexts(40, 7), contexts(8, 8))]
    episodes = as_learn2learn(sets, "train", shots=5, num_tasks=8)
    seen = set()
    for raw, labels in episodes:
        assert raw.shape == (5, 3, 4, 4)
        assert len(labels.unique()) == 1
        owner = {row.numpy().tobytes() for row in sets[int(labels[0])].split("train")}
        assert {row.numpy().tobytes() for row in raw} <= owner
        seen.add(int(labels[0]))
    assert len(episodes) == 8
    assert seen == {0, 1}


def test_contexts_made_beforehand_are_the_same_problems():
    made = []

    def encode(raw):
        made.append(len(raw))
        return 2 * raw

    def split(seed, count):
        return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))

    tasks = TaskSet(lambda z, x: 0.5 * z + x, split(0, 9), split(1, 5), split(2, 4), encode=encode, z0=torch.ones_like)
    ready = tasks.prepared(6, torch.Generator().manual_seed(0), 3)
    assert made == [6, 3]
    z0, x = ready.problems("validation")
    assert torch.equal(x, 2 * tasks.split("validation")[:3])
    assert torch.equal(z0, torch.ones(3, 3))
    _, drawn = ready.draw(50, torch.Generator().manual_seed(1))
    known = {tuple(row) for row in (2 * tasks.split("train")).tolist()}
    assert {tuple(row) for row in drawn.tolist()} <= known
    assert len({tuple(row) for row in drawn.tolist()}) == 6
    assert made == [6, 3], "no context is made twice"
    with pytest.raises(ValueError, match="no split 'test'"):
        ready.split("test")
    shifted = TaskSet(lambda z, x: z, split(0, 9), split(1, 5), augment=lambda raw, generator: raw + 1)
    with pytest.raises(ValueError, match="augmented"):
        shifted.prepared(6, torch.Generator(), 3)


@pytest.mark.parametrize("what", ["weights", "contexts"])
def test_a_checkpoint_of_other_problems_is_refused(tmp_path, what):
    path = tmp_path / "training.safetensors"
    MetaTrainer(grouped(), tasks(), SMALL, checkpoint=path).run(until=4)
    MetaTrainer(grouped(), tasks(), SMALL, checkpoint=path)  # the same ones: it goes on
    other, f = contexts(60), Cell()
    if what == "weights":
        f.conv.weight.data.mul_(0.9)
    else:
        other[0, 0, 0, 0] += 1
    changed = TaskSet(f, other, contexts(16, 1), contexts(16, 2))
    with pytest.raises(mb.CheckpointError, match="on other problems: other weights of f, or other contexts"):
        MetaTrainer(grouped(), changed, SMALL, checkpoint=path)


# --- objectives


def test_a_worse_start_does_not_lower_the_gradient_of_the_normalised_objective():
    """ρ₀ is what residuals are measured by: a constant, so that nothing is gained by making it larger."""
    residuals = torch.tensor([[4.0, 2.0], [1.0, 1.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(ResidualObjective("normalised", "last")(residuals), residuals)
    assert torch.equal(grad, torch.tensor([[0.0, 0.0], [0.125, 0.25]]))


@pytest.mark.parametrize("done", [0.0, 0.25, 0.5, 1.0])
def test_the_remainders_weight_falls_linearly_to_zero_over_a_training(done):
    star, z = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.0]])
    rollout = Rollout(torch.zeros(2, 1), (z, z), (torch.tensor([10.0]), torch.tensor([20.0])), None)
    objective = HyperObjective(remainder=0.5)
    assert float(objective.loss(rollout, star, done)) == pytest.approx((1 - done) * 0.5 * 15 / 5)
