"""The search over HyperAnderson's configurations."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments import tune_hyper
from experiments.bench import measure
from experiments.bench.runner import read_rows
from metabroyden.meta.trainer import MetaTrainer


def test_at_least_twelve_configurations_spend_the_same_and_differ():
    recipes = [tune_hyper.overrides(name, 1000) for name in tune_hyper.VARIANTS]
    assert len(recipes) >= 12
    assert len({repr(recipe) for recipe in recipes}) == len(recipes)
    for recipe in recipes:
        assert abs(recipe["steps"] * recipe["unroll"] - 1000) <= recipe["unroll"] / 2
        assert "batch" not in recipe
    tried = {
        (r["objective"], r["memory"], r["gram"]) for r in recipes if r["learning_rate"] == 1e-3 and r["unroll"] == 10
    }
    assert tried >= {(loss, m, gram) for loss in ("hyper", "residual") for m in (3, 5, 8) for gram in (False, True)}


def test_an_interrupted_search_goes_on_and_its_report_is_sorted(tmp_path, monkeypatch, capsys):
    names = ("published loss, m = 3", "log residual, published initialisation")
    config = tune_hyper.TuneHyper(
        family="dense-digits", steps=2, only=names, samples=16, budget=12, backend="native", progress=False,
        results=tmp_path / "results", runs=tmp_path / "runs",
    )  # fmt: skip
    validate = MetaTrainer._validate
    monkeypatch.setattr(MetaTrainer, "_validate", lambda self, loss: self.history or validate(self, loss))
    rows_of = measure.measure

    def cut(held, everyone, rules):
        if everyone[0].name == names[1]:
            raise KeyboardInterrupt
        return rows_of(held, everyone, rules)

    monkeypatch.setattr(measure, "measure", cut)
    with pytest.raises(KeyboardInterrupt):
        tune_hyper.run(config)
    (trial,) = config.results.iterdir()
    assert trial.name.startswith("trial-"), "other settings than the usual ones"
    path = trial / "hyper-anderson-tuning" / "dense-digits" / "rows.jsonl.gz"
    assert {row["solver"] for row in read_rows(path)} == {names[0]}
    monkeypatch.setattr(measure, "measure", rows_of)
    trained = []
    run = MetaTrainer.run
    monkeypatch.setattr(MetaTrainer, "run", lambda self, *a: trained.append(self.solver.config) or run(self, *a))
    tune_hyper.run(config)
    assert not trained, "both were trained in the first sitting"
    rows = read_rows(path)
    first, second = (row for row in rows if row["row"] == "trained")
    assert [first["solver"], second["solver"]] == list(names)
    assert first["recipe"]["objective"] == "hyper"
    assert first["config"]["memory"] == 3
    assert second["config"]["zero_output"] is False
    assert all(len(row["evaluations"]) == len(row["status"]) == 16 for row in rows if row["row"] == "solve")
    report = (trial / "hyper-anderson-tuning.md").read_text()
    scores = [float(line.split("|")[2]) for line in report.splitlines() if line.startswith(("| published", "| log"))]
    assert scores == sorted(scores)
    assert len(scores) == 2
    assert "python -m experiments tune-hyper --family dense-digits --budget 12 --samples 16 --steps 2" in report
    assert "2 of 2 configurations" in capsys.readouterr().out


def test_it_names_what_it_does_not_know(tmp_path):
    config = tune_hyper.TuneHyper(results=tmp_path, runs=tmp_path)
    with pytest.raises(ValueError, match="unknown configuration 'm = 4': known are published loss, m = 3,"):
        tune_hyper.run(replace(config, only=("m = 4",)))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        tune_hyper.run(replace(config, steps=0))


def test_a_failure_counts_the_budget_in_the_report():
    trained = {"row": "trained", "solver": "one", "recipe": {"steps": 1, "unroll": 2}, "seconds": 3.0}
    solves = [
        {"row": "solve", "solver": "one", "tolerance": at, "evaluations": [spent, 16], "status": "CB"}
        for at, spent in ((1e-2, 4), (1e-3, 16))
    ]
    table = tune_hyper.table("family", [trained, *solves])
    assert table.body == [["one", f"{2**3.5:.2f}", "10 (50%), 10.0", "16 (50%), 16.0", "1 × 2", "3 s"]]
