"""Tasks, the outer loop and `fit_solver`."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import metabroyden as mb
from metabroyden.learned.layout import Layout
from metabroyden.meta import MetaConfig, MetaTrainer, TaskSet
from metabroyden.meta.fit import make_learned
from metabroyden.meta.tasks import as_learn2learn
from metabroyden.meta.trainer import mean_evaluations


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
    return make_learned("grouped", Layout("nchw", (3, 4, 4)), seed=seed, hidden=6, rank=8, initializer=8)


SMALL = MetaConfig(steps=12, unroll=4, batch=8, validate_every=4, validation_nfe=40)


def test_meta_training_beats_broyden_on_held_out_contexts():
    task_set, solver = tasks(), grouped()
    trained = MetaTrainer(solver, task_set, MetaConfig(steps=80, unroll=8, batch=16, validate_every=20)).run()
    ours = mean_evaluations(trained, task_set, split="test")
    assert ours < 0.75 * mean_evaluations(mb.Broyden(memory=60), task_set, split="test")
    assert trained.summary["validation"][-1]["step"] == 80


@pytest.mark.parametrize("backend", ["higher", "native"])
def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path, backend):
    config = MetaConfig(**{**vars(SMALL), "backend": backend})
    whole = MetaTrainer(grouped(), tasks(), config).run()
    path = tmp_path / "training.safetensors"
    MetaTrainer(grouped(), tasks(), config, checkpoint=path).run(until=5)
    resumed = MetaTrainer(grouped(seed=9), tasks(), config, checkpoint=path)
    assert resumed.step == 5
    again = resumed.run()
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
    "options", [{"steps": 0}, {"unroll": 2.0}, {"learning_rate": -1.0}, {"clip": float("nan")}, {"backend": "jax"}]
)
def test_bad_meta_configs_are_refused(options):
    with pytest.raises(ValueError, match=f"MetaConfig: {next(iter(options))} must be"):
        MetaConfig(**options)


def test_fit_solver_makes_a_faster_drop_in_and_says_by_how_much(tmp_path):
    cell = Cell()
    solver = mb.fit_solver(cell, contexts(80), steps=60, progress=False)
    held_out = solver.summary["held_out"]
    assert held_out["mean_evaluations"] < held_out["mean_evaluations_broyden"]
    assert held_out["samples"] == 16
    loaded = mb.load_solver(mb.save_solver(solver, tmp_path / "solver.safetensors"))
    deq = mb.DEQ(cell, solver=loaded)
    x = contexts(8, 5)
    with torch.no_grad():
        z = deq(x)
        torch.testing.assert_close(z, mb.DEQ(cell, rtol=1e-5)(x), rtol=0, atol=5e-3)
    assert deq.last_solution.nfe.float().mean() < 0.8 * mb.solve(cell, 0 * x, x, solver=mb.Broyden()).nfe.float().mean()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"f": 3}, TypeError, "callable"),
        ({"x_train": torch.zeros(4, 3, 4, 4)}, ValueError, r"at least 10 samples first, got \(4, 3, 4, 4\)"),
        ({"x_train": [1, 2]}, ValueError, "got list"),
        ({"x_train": torch.zeros(20, 3, 4, 4)}, ValueError, "two different samples"),
        (
            {"solver": "adam"},
            ValueError,
            "known are adjoint, coordinatewise, grouped, hyper-anderson, meta-broyden, metabroyden, universal",
        ),
        ({"layout": "chw"}, ValueError, "layout must be one of"),
        ({"x_train": torch.randn(20, 3, 4)}, ValueError, "layout= is needed"),
        ({"steps": 0}, ValueError, "steps"),
        ({"x_train": torch.randint(0, 9, (20, 3, 4, 4))}, ValueError, "x_train is torch.int64.*give z0="),
        ({"x_train": torch.full((20, 3), torch.nan)}, ValueError, "x_train must be finite"),
        ({"z0": lambda x: torch.zeros(3, 3, 4, 4)}, ValueError, r"row for each of 4 contexts, got 3"),
        ({"z0": lambda x: (x, x)}, ValueError, "states of one tensor"),
        ({"z0": torch.zeros(20, 3, 4, 4)}, TypeError, "z0 must be a map x → start, got Tensor"),
        ({"x_train": torch.randn(20)}, ValueError, "needs an axis besides the samples"),
        (
            {"x_train": torch.randn(20, 3).half()},
            ValueError,
            "float32, float64 or of an integer dtype, got torch.float16",
        ),
        ({"seed": "a"}, ValueError, "seed must be an integer, got 'a'"),
        ({"rtol": "1e-3"}, ValueError, "validation_rtol must be a positive number, got '1e-3'"),
        ({"f": lambda z, x: z[:, :1]}, ValueError, "f must return what z is shaped like"),
    ],
)
def test_fit_solver_refuses_bad_input(change, error, words):
    arguments = {"f": lambda z, x: 0.5 * z + x, "x_train": contexts(20), "progress": False, "steps": 2} | change
    with pytest.raises(error, match=words):
        mb.fit_solver(arguments.pop("f"), arguments.pop("x_train"), **arguments)


def test_f_may_compute_in_another_precision_and_no_grad_may_surround_the_fit():
    cell = Cell()
    with torch.no_grad():
        solver = mb.fit_solver(lambda z, x: cell(z, x).bfloat16(), contexts(20), steps=2, progress=False)
    assert solver.summary["skipped_steps"] == 0


def test_a_fit_whose_gradients_blow_up_says_so():
    with pytest.warns(UserWarning, match="6 of 6 steps were skipped because their gradient was not finite"):
        mb.fit_solver(lambda z, x: 1e30 * (z + x) ** 3, contexts(20), steps=6, progress=False)


def test_equal_contexts_stay_on_one_side_of_the_split():
    doubled = contexts(20).repeat(2, 1, 1, 1)
    solver = mb.fit_solver(Cell(), doubled, steps=1, progress=False)
    assert solver.summary["held_out"]["samples"] == 8


@pytest.mark.skipif(importlib.util.find_spec("learn2learn") is None, reason="learn2learn needs a C compiler to install")
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
