"""The drop-in experiment: our solvers beside torchdeq's own in a torchdeq model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import metabroyden as mb
from experiments import drop_in as experiment
from experiments.bench.peers import recorded
from experiments.bench.runner import read_rows
from experiments.drop_in import against
from metabroyden.integrations.torchdeq import register
from metabroyden.meta.trainer import MetaTrainer
from tests.experiments.test_experiments import few_images
from tests.helpers import ConvTanh


def tiny(tmp_path) -> experiment.DropIn:
    return experiment.DropIn(
        channels=4,
        epochs=1,
        steps=3,
        budget=12,
        repeats=2,
        test_samples=20,
        tune_samples=10,
        results=tmp_path / "results",
        runs=tmp_path / "runs",
        progress=False,
    )


@pytest.mark.usefixtures("few_candidates")
def test_drop_in_resumes_after_an_interruption_and_writes_what_it_promises(tmp_path, monkeypatch, capsys):
    few_images(monkeypatch, experiment)
    config, original, begun = tiny(tmp_path), MetaTrainer.run, []

    def interrupted(self, progress=None, until=None):
        original(self, progress, until=2)
        raise KeyboardInterrupt

    def noted(self, progress=None, until=None):
        begun.append(self.step)
        return original(self, progress, until)

    monkeypatch.setattr(MetaTrainer, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(config)
    assert not config.results.exists()
    (model,) = config.runs.rglob("model.safetensors")
    trained = model.stat().st_mtime_ns
    monkeypatch.setattr(MetaTrainer, "run", noted)
    experiment.run(config)
    assert begun == [2]
    assert model.stat().st_mtime_ns == trained
    (folder,) = config.results.iterdir()
    written = {path.name for path in folder.iterdir()}
    assert written == {"rows.jsonl.gz", "config.json", "report.md", "drop_in.png", "drop_in.pdf"}
    rows = read_rows(folder / "rows.jsonl")
    names = ["learned", *experiment.OWN, "our Broyden", "our tuned Anderson", "our tuned Picard"]
    assert [(row["solver"], row["rtol"]) for row in rows] == [(name, rtol) for rtol in (1e-2, 1e-3) for name in names]
    for row in rows:
        assert len(row["evaluations"]) == len(row["status"]) == 20
        assert row["rows"] == 20 * row["calls"]
        assert row["calls"] <= 12 + (row["solver"] == "torchdeq Broyden")  # theirs makes one call more than max_iter
    described = json.loads((folder / "config.json").read_text())
    assert described["config"]["steps"] == 3
    assert described["provenance"]["versions"]["torchdeq"] == "0.1.0"
    assert "nan" not in (folder / "report.md").read_text().lower()
    assert set(described["seeds"]["0"]) == {"solvers", "held_out", "fit_seconds", "parameters", "equilibria_known"}
    assert "An unmodified torchdeq model" in capsys.readouterr().out
    before = (folder / "rows.jsonl.gz").read_bytes()
    experiment.run(config)  # a third run has nothing left to do
    assert (folder / "rows.jsonl.gz").read_bytes() == before
    assert begun == [2]


def test_calls_are_counted_from_outside_and_evaluations_by_sample():
    cell, x = ConvTanh(), torch.randn(7, 3, 4, 4)
    solve = register("test", mb.Broyden())
    with torch.no_grad(), recorded(cell) as record:
        _, _, info = solve(lambda z: cell(z, x), torch.zeros_like(x), 40, 1e-3, "rel")
    assert record.count == info["nfe"].max()
    assert record.rows == 7 * record.count
    nfe, reached = record.trace().evaluations_to(1e-3, 40)
    assert reached.all()
    assert np.array_equal(nfe, info["nfe"].numpy())
    nfe, reached = record.trace().evaluations_to(1e-9, 5)
    assert (nfe == 5).all()
    assert not reached.any()
    before = record.count
    cell(x, x)
    assert record.count == before  # no longer counting


def test_the_table_says_what_the_rows_say():
    def row(solver, calls, seconds, accuracy):
        return {"row": "drop-in", "solver": solver, "rtol": 1e-2, "seed": 0, "calls": calls, "seconds": seconds,
                "accuracy": accuracy, "evaluations": [calls, calls], "status": "CC"}  # fmt: skip

    rows = [
        row("learned", 10, 0.3, 0.97),
        row("torchdeq Broyden", 40, 0.6, 0.98),
        row("torchdeq Anderson", 5, 0.1, 0.97),
        row("torchdeq fixed point", 10, 0.3, 0.9),
    ]
    (theirs, anderson, _) = against(rows).body
    assert theirs == ["torchdeq Broyden", "0.25×, 0.50×, 10 / 40, -1.00 points"]
    assert anderson[1].startswith("2.00×, 3.00×")
