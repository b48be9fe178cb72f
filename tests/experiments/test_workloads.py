"""The workloads: models that are trained when missing, what their owners hand over, and what is measured of them."""

from __future__ import annotations

import pytest
import torch

import metabroyden as mb
from experiments import workloads
from experiments.bench.runner import read_rows
from experiments.workloads import graphs, imaging
from experiments.workloads.report import ratios
from experiments.workloads.suite import MODELS, WORKLOADS, facts_of, model_of, path_of
from metabroyden.comparison.tables import chosen
from metabroyden.deq import initial_state
from tests.helpers import refused

SMALL = "graph-karate"


@pytest.mark.usefixtures("few_candidates")
def test_a_workload_is_fitted_measured_and_reported(tmp_path):
    config = workloads.Workloads(
        only=(SMALL,),
        seeds=1,
        steps=3,
        samples=12,
        results=tmp_path / "results",
        runs=tmp_path / "runs",
        progress=False,
    )
    workloads.run(config)
    (trial,) = config.results.iterdir()
    rows = read_rows(trial / "rows.jsonl")
    (model,), (fit,) = chosen(rows, "model"), chosen(rows, "fit")
    assert 0.5 < model["equilibrium"] <= 1
    assert model["exact"] == 1
    assert fit["numbered"] == fit["renumbered"], "the numbers of the nodes mean nothing"
    for tolerance in (1e-2, 1e-3):
        (found,) = ratios(rows, SMALL, tolerance)
        assert found["evaluations"] == pytest.approx(found["mean"] / found["best_mean"])
    enough = {row["solver"]: row["evaluations"] for row in chosen(rows, "equal")}
    scores = chosen(rows, "depth", solver="tuned Anderson")
    wanted = [row["evaluations"] for row in scores if row["score"] >= model["equilibrium"] - 0.005]
    assert enough["tuned Anderson"] == min(wanted)
    text = (trial / "report.md").read_text()
    assert "## To 0.01" in text
    assert f"**{SMALL}**" in text
    assert (trial / "depth.png").exists()


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_trained_model_is_small_and_has_equilibria(name):
    assert path_of(name).stat().st_size < 100_000
    model = model_of(name)
    assert not any(weight.requires_grad for weight in model.parameters())
    brought = WORKLOADS[name].bring(model, 4)
    f, x = brought.f, brought.x_test
    solver, budget = brought.exact
    found = mb.solve(f, initial_state(f, x), x, solver=solver, rtol=1e-4, max_nfe=budget)
    score = brought.metric(found.z, x)
    assert score.shape == (4,)
    assert torch.isfinite(score).all()
    assert facts_of(name)["steps"] > 0


def test_a_missing_model_is_trained_once(tmp_path, monkeypatch):
    task = graphs.TASKS["karate"]
    trained = []

    def train(model):
        trained.append(model)
        return {"steps": 0}

    monkeypatch.setitem(WORKLOADS, SMALL, WORKLOADS[SMALL]._replace(train=train))
    one, other = model_of(SMALL, tmp_path), model_of(SMALL, tmp_path)
    assert len(trained) == 1
    assert torch.equal(one.stem.weight, other.stem.weight)
    assert torch.equal(one.stem.weight, task.build().stem.weight)


def test_filters_are_densities_and_patches_are_of_the_pictures():
    generator = torch.Generator().manual_seed(0)
    blur = imaging.filters(5, generator)
    torch.testing.assert_close(blur.sum((2, 3)), torch.ones(5, 1))
    assert blur.min() >= 0
    clear = imaging.patches(imaging.TEST_ON, 3, generator)
    assert clear.shape == (3, 1, imaging.SIDE, imaging.SIDE)
    assert 0 <= clear.min() < clear.max() <= 1
    assert not set(imaging.TRAIN_ON) & set(imaging.TEST_ON)


def test_peers_are_deepinvs_own_loops():
    model = model_of("deblurring")
    brought = WORKLOADS["deblurring"].bring(model, 2)
    f, x = brought.f, brought.x_test
    z = initial_state(f, x)
    for _ in range(3):
        z = f(z, x)
    torch.testing.assert_close(brought.peers["deepinv"](3), z)
    assert not torch.equal(brought.peers["deepinv Anderson"](3), z)


def test_unknown_workloads_are_refused(tmp_path):
    places = {"results": tmp_path / "results", "runs": tmp_path / "runs", "models": MODELS}
    refused("unknown workload 'cats'", lambda: workloads.run(workloads.Workloads(only=("cats",), **places)))
    refused("seeds must be at least 1", lambda: workloads.run(workloads.Workloads(seeds=0, **places)))
