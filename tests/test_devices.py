"""Meta-training and its measurements run where the model is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import metabroyden as mb
from experiments.bench import measure, problems
from experiments.bench.solvers import Contestant
from metabroyden.learned.layout import Layout
from metabroyden.meta import MetaConfig, MetaTrainer, TaskSet
from metabroyden.meta.fit import make_learned
from metabroyden.meta.objectives import DistanceObjective
from metabroyden.meta.trainer import mean_evaluations
from tests.helpers import ConvTanh, contexts

GPU = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
CONFIG = MetaConfig(steps=4, unroll=3, batch=4, validate_every=2, validation_nfe=20, start_noise=0.2)


def setting(device: str):
    """Raw contexts on the host, the model and the solver on the device."""
    cell = ConvTanh().to(device)
    encode, z0 = (lambda raw: 2 * raw.to(device)), torch.zeros_like
    tasks = TaskSet(cell, contexts(30), contexts(8, 1), contexts(8, 2), encode=encode, z0=z0)
    solver = make_learned(
        "meta-broyden", Layout("image", (3, 4, 4)), hidden=4, rank=4, initializer_width=4, learned_steps=2
    )
    return tasks, solver.to(device)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"segments": 2, "checkpoint_steps": True, "half": True},
        {"objective": DistanceObjective()},
        {"estimator": "pes", "segments": 2, "particles": 2},
    ],
    ids=["whole", "segments", "distance", "pes"],
)
@pytest.mark.parametrize("device", DEVICES)
def test_training_stays_on_its_device_and_resumes_there(device, options, tmp_path):
    config, path = replace(CONFIG, **options), tmp_path / "training.safetensors"
    tasks, solver = setting(device)
    MetaTrainer(solver, tasks, config, checkpoint=path).run(until=2)
    tasks, solver = setting(device)
    trainer = MetaTrainer(solver, tasks, config, checkpoint=path)
    assert trainer.step == 2
    trainer.run()
    assert trainer.skipped == 0
    assert {value.device.type for value in solver.parameters()} == {device}
    assert trainer.history[-1]["score"] > 0


@pytest.mark.parametrize("device", DEVICES)
def test_contexts_made_beforehand_are_on_the_device(device):
    tasks, solver = setting(device)
    ready = tasks.prepared(12, torch.Generator().manual_seed(0), 5)
    z0, x = ready.draw(6, torch.Generator().manual_seed(1))
    assert z0.device.type == x.device.type == device
    assert mean_evaluations(solver, ready, limit=3) > 0
    MetaTrainer(solver, ready, replace(CONFIG, steps=1)).run()


@pytest.mark.parametrize("device", DEVICES)
def test_measurements_are_made_on_the_device(device):
    tasks, solver = setting(device)
    z0, x = tasks.problems("test")
    held = problems.HeldOut(tasks.f, z0, x, lambda z, index: torch.ones(len(index), device=z.device))
    star, known = problems.double_equilibria(tasks.f, held)
    assert star.device.type == device
    assert star.dtype == torch.float64
    assert known.all()
    contestants = [Contestant("ours", "learned", solver), Contestant("Broyden", "classical", mb.Broyden())]
    rules = measure.Rules((1e-2, 1e-3), budget=30, block=8, rounds=2, weighed=True)
    rows = measure.measure(replace(held, star=star, known=known), contestants, rules)
    solves = [row for row in rows if row["row"] == "solve"]
    assert len(solves) == 4
    assert max(solves[-2]["distance"]) < 0.1
    for row in solves:
        for seconds in row["seconds"]:
            assert seconds["total"] > 0
            assert device != "cpu" or 0 < seconds["f"] < seconds["total"]  # a GPU is not asked within a solve
    assert all(row["peak_bytes"] > 0 for row in solves[-2:])
    rows = measure.depth_rows(held, solver, (1, 4))
    assert rows[1]["residual"][1] < rows[0]["residual"][1]


@pytest.mark.parametrize("device", DEVICES)
def test_batches_of_a_loader_on_the_host_are_taken_to_where_the_model_is(device, quick_fits):
    cell, loader = ConvTanh().to(device), DataLoader(TensorDataset(contexts(40)), batch_size=16)
    solver = mb.fit_solver(cell, loader, steps=1, fallback=False, progress=False)
    assert {value.device.type for value in solver.parameters()} == {device}
    x = contexts(8, 3).to(device)
    assert mb.solve(cell, 0 * x, x, solver=solver).converged.all()
