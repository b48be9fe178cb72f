"""Across DEQs: the trainer, the two experiments on a tiny budget, and the universal solver that is shipped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import metabroyden as mb
from experiments import generalise, specialise
from experiments.bench.runner import digest, read_rows
from experiments.generalise import BROYDEN
from metabroyden.checkpoint import CheckpointError
from metabroyden.comparison.statistics import Field
from metabroyden.learned.layout import Layout
from metabroyden.meta import MetaConfig, TaskSet
from metabroyden.meta.fit import make_learned
from metabroyden.meta.orthogonal import OrthogonalAdam, orthogonal
from metabroyden.meta.specialise import SpecialiseConfig
from metabroyden.meta.specialise import specialise as adapt
from metabroyden.meta.trainer import MultiTaskTrainer
from metabroyden.storage import atomic_write
from metabroyden.zoo.random_cells import RandomCells
from metabroyden.zoo.testbed import cells


def ring(gain, n=6):
    """A DEQ on vectors, with disjoint contexts."""
    x = torch.randn(60, n, generator=torch.Generator().manual_seed(n))
    return TaskSet(lambda z, x: torch.tanh(gain * z.roll(1, 1) + x), x[:40], x[40:50], x[50:])


def across(path=None, steps=6):
    config = MetaConfig(steps=steps, unroll=4, batch=4, backend="native", validate_every=2, validation_size=8)
    solver = make_learned("universal", Layout("vector", (1,)), hidden=4)
    sources = [(1.0, ring(0.8)), (1.0, ring(0.9, 9)), (2.0, RandomCells())]
    return MultiTaskTrainer(solver, sources, [ring(0.8), ring(0.9, 9)], config, checkpoint=path)


def test_training_across_deqs_resumes_bit_for_bit(tmp_path, monkeypatch):
    whole = across()
    whole.run()
    path, update = tmp_path / "training.safetensors", MultiTaskTrainer._update

    def cut(self):
        if self.step == 4:
            raise KeyboardInterrupt
        return update(self)

    monkeypatch.setattr(MultiTaskTrainer, "_update", cut)
    with pytest.raises(KeyboardInterrupt):
        across(path).run()
    monkeypatch.setattr(MultiTaskTrainer, "_update", update)
    resumed = across(path)
    assert resumed.step == 4
    resumed.run()
    for one, other in zip(whole.solver.parameters(), resumed.solver.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [entry["score"] for entry in whole.history] == [entry["score"] for entry in resumed.history]
    with pytest.raises(CheckpointError, match="another meta-training"):
        across(path, steps=7)


def test_orthogonal_momentum_moves_all_directions_alike():
    value = torch.randn(10, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    found = torch.linalg.svdvals(orthogonal(value).flatten(1))
    assert ((found > 0.6) & (found < 1.3)).all(), "singular values of about one"
    parameter, other = (torch.nn.Parameter(torch.zeros(16, 8)) for _ in range(2))
    optimizer = OrthogonalAdam([parameter, other], [parameter], lr=1.0, orthogonal_rate=0.2)
    optimizer.set_rates(0.5)
    parameter.grad = torch.outer(torch.ones(16), torch.arange(8.0)) + 1e-3 * torch.eye(16, 8)
    other.grad = parameter.grad.clone()
    optimizer.step()
    torch.testing.assert_close(other.detach(), -0.5 * other.grad.sign(), rtol=1e-3, atol=1e-3)
    assert float((parameter.detach() * parameter.grad).sum()) < 0
    assert torch.linalg.matrix_norm(parameter.detach(), 2) < 0.1 * 2**0.5 * 1.3


def test_twenty_steps_make_a_solver_for_one_deq():
    w = 0.95 * torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(0))).Q
    x = 0.3 * torch.randn(400, 24, generator=torch.Generator().manual_seed(1))
    tasks = TaskSet(lambda z, x: torch.tanh(z @ w + x), x[:300], x[300:350], x[350:])
    untrained = make_learned("universal", Layout("vector", (1,)))
    kept = [parameter.clone() for parameter in untrained.parameters()]
    adapted = adapt(untrained, tasks, SpecialiseConfig(unroll=6))
    z0, x = tasks.problems("test")
    nfe = {
        name: float(mb.solve(tasks.f, z0, x, solver=solver, rtol=1e-2, max_nfe=60).nfe.double().mean())
        for name, solver in (("adapted", adapted), ("Broyden", mb.Broyden(60)))
    }
    assert nfe["adapted"] < 0.6 * nfe["Broyden"], nfe
    assert all(torch.equal(one, other) for one, other in zip(kept, untrained.parameters(), strict=True))


@pytest.mark.parametrize("norm", [0.9, 1.5, 2.0])
@pytest.mark.parametrize("n", [20, 200])
def test_the_shipped_universal_solver_needs_no_more_than_broyden_on_cells_it_never_saw(n, norm):
    assert "universal" in mb.list_pretrained()
    problem = cells.blas(64, n, norm, seed=11, x_seed=3)
    found = {
        name: mb.solve(problem.f, problem.z0, problem.context, solver=solver, rtol=1e-2, max_nfe=80, throw=False)
        for name, solver in (("universal", mb.load_solver("universal")), ("Broyden", mb.Broyden(80)))
    }
    assert found["universal"].converged.sum() >= found["Broyden"].converged.sum()
    assert np.median(found["universal"].nfe) <= np.median(found["Broyden"].nfe)


def test_generalise_writes_what_it_promises_and_goes_on(tmp_path, monkeypatch, capsys):
    config = generalise.Generalise(
        steps=2, coordinatewise_steps=1, weights_steps=2, weights=("conv-digits",), trained=("dense-digits",),
        unseen=("multiscale-digits",), samples=4, budget=25, batch=2, progress=False,
        results=tmp_path / "results", runs=tmp_path / "runs",
    )  # fmt: skip
    original = generalise.seeds

    def interrupted(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(generalise, "seeds", interrupted)
    monkeypatch.setattr(generalise, "widths", lambda job: [])
    monkeypatch.setattr(generalise, "KINDS", ("dense",))
    monkeypatch.setattr(generalise.solvers, "tuned", lambda held, budget: {"tuned Anderson": mb.Anderson()})
    with pytest.raises(KeyboardInterrupt):
        generalise.run(config)
    assert not config.results.exists()
    kept = {path: path.stat().st_mtime_ns for path in config.runs.rglob("*.jsonl")}
    assert len(kept) == 3
    monkeypatch.setattr(generalise, "seeds", original)
    generalise.run(config)
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items()), "finished work was done again"
    (trial,) = config.results.iterdir()
    assert trial.name.startswith("trial-"), "other settings than the usual ones"
    names = {path.name for path in trial.iterdir()}
    assert names == {
        "rows.jsonl.gz", "config.json", "report.md", "transfer.png", "transfer.pdf",
        "universal.safetensors", "coordinatewise.safetensors",
        "grouped-conv-digits.safetensors", "meta-broyden-conv-digits.safetensors", "grouped-seeds.safetensors",
    }  # fmt: skip
    rows = read_rows(trial / "rows.jsonl")
    unseen = Field(rows, "families unseen")
    assert unseen.families == ["multiscale-digits"]
    assert unseen.over("multiscale-digits", BROYDEN, BROYDEN, 1e-2).value == 1
    assert {row["family"] for row in rows if row["part"] == "seeds unseen"} == {"digits, seed 2"}
    assert "Families never seen" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="experiments models --family dense-digits"):
        generalise.run(replace(config, models=tmp_path, overwrite=True))


@pytest.mark.usefixtures("few_candidates")
@pytest.mark.parametrize("family", ["conv-digits", "mlp-digits"])
def test_specialise_measures_before_and_after(tmp_path, family):
    config = specialise.Specialise(
        family=family, steps=2, batch=4, unroll=3, rank=4, initializer_width=8, samples=6, budget=20, progress=False,
        results=tmp_path / "results", runs=tmp_path / "runs",
    )  # fmt: skip
    specialise.run(config)
    (trial,) = config.results.iterdir()
    folder = trial / family / "seed0"
    solves = [row for row in read_rows(folder / "rows.jsonl") if row["row"] == "solve"]
    tuned = ["tuned Picard", "tuned Anderson", "tuned Broyden"]
    assert [row["solver"] for row in solves] == [BROYDEN, *tuned, "before", "after"]
    assert all(len(row["evaluations"]) == 6 for row in solves)
    assert mb.load_solver(folder / "solver.safetensors").summary["specialised"]["steps"] == 2
    assert "2 steps from universal" in (trial / "report.md").read_text()
    assert (trial / "specialise.png").exists()
    if family == "mlp-digits":
        specialise.run(replace(config, seed=1))
        assert len(list(trial.glob("*/*/rows.jsonl.gz"))) == 2
        specialise.run(replace(config, start=str(folder / "solver.safetensors")))
        assert len(list(config.results.glob("trial-*"))) == 2


def test_other_models_are_other_work(tmp_path):
    """What was measured on other weights must not be taken for what these would give."""
    config = generalise.Generalise(
        trained=("dense-digits",), unseen=("mlp-digits",), weights=(), seeds=False, runs=tmp_path / "runs",
        models=tmp_path / "models",
    )  # fmt: skip
    found = []
    for content in (b"these", b"others"):
        for name in ("dense-digits", "mlp-digits"):
            atomic_write(tmp_path / "models" / name / "model.safetensors", content)
        found.append(digest(*generalise.model_files(config)))
    assert found[0] != found[1]
