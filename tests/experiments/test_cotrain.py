"""The experiment on co-training: every way is measured, goes on where it stopped, and is reported."""

from __future__ import annotations

import json

import pytest

from experiments import cotrain
from experiments.bench.runner import read_rows
from experiments.cotrain import report, rows, variants
from metabroyden.comparison.tables import chosen
from metabroyden.meta import defaults
from tests.helpers import refused


@pytest.mark.usefixtures("few_candidates")
def test_every_way_is_measured_and_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "SOLVER_STEPS", (30, 30))
    monkeypatch.setattr(rows, "ROUNDS", 1)
    monkeypatch.setattr(rows, "SCORED", 24)
    monkeypatch.setattr(variants, "HELD", 24)
    places = {"results": tmp_path / "results", "runs": tmp_path / "runs", "progress": False}
    config = cotrain.Cotrain(seeds=1, steps=6, samples=12, penalties=(1.0,), weights=(0.5,), **places)
    original, made = variants.trained, []

    def interrupted(family, variant):
        made.append(variant.key)
        if len(made) == 3:
            raise KeyboardInterrupt
        return original(family, variant)

    monkeypatch.setattr(rows, "trained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cotrain.run(config)
    cotrain.run(config)
    keys = ["original-seed0", "co-trained-seed0", "continued-seed0", "Jacobian-penalty-1-seed0", "co-trained-0.5-seed0"]
    assert made == [*keys[:3], *keys[2:]]
    (trial,) = config.results.iterdir()
    command = json.loads((trial / "conv-digits" / "config.json").read_text())["command"]
    assert command.endswith("cotrain --family conv-digits --seeds 1 --penalties 1 --weights 0.5 --samples 12 --steps 6")
    found = read_rows(trial / "conv-digits" / "rows.jsonl")
    models = chosen(found, "model")
    assert [(row["way"], row["weight"]) for row in models] == [
        ("original", None), ("co-trained", None), ("continued", None), ("Jacobian penalty", 1.0), ("co-trained", 0.5)
    ]  # fmt: skip
    assert models[0]["difference"] == 0.0
    assert [look["step"] for look in models[4]["looks"]] == [1, 2, 3, 4, 5, 6]
    assert {look["residual_weight"] for look in models[4]["looks"]} == {0.5}, "held fast"
    solved = chosen(found, "solver")
    assert {row["kind"] for row in solved if row["way"] == "co-trained"} == {"classical", "started", "learned"}
    assert {row["kind"] for row in solved if row["way"] == "continued"} == {"classical"}
    assert all(1 <= row["median"] <= row["p90"] <= 60 for row in solved)
    assert {row["model"] for row in chosen(found, "time")} == {"original", "co-trained"}
    assert {row["start"] for row in chosen(found, "start")} == {"learned", "random", "random, ten times as large"}
    text = (trial / "report.md").read_text()
    for words in (
        "## To 0.01",
        "## What it costs",
        "## conv-digits",
        "co-trained 0.5, held fast",
        "| conv-digits | learned |",
    ):
        assert words in text
    assert all((trial / f"{name}.png").exists() for name in ("evaluations", "front", "depth"))
    assert "nan" not in text


def test_the_best_is_chosen_among_those_that_solve_as_many_as_any():
    def row(name, median, solved, kind="classical"):
        figures = {"median": median, "mean": median, "solved": solved, "samples": 100}
        return {"row": "solver", "tolerance": 1e-2, "solver": name, "kind": kind, **figures}

    found = [row("quick", 5, 0.8), row("sure", 9, 1.0), row("surer", 8, 1.0), row("ours", 2, 1.0, "learned")]
    assert report.best(found, 1e-2)["solver"] == "surer"
    assert report.best(found, 1e-2, "learned")["solver"] == "ours"


def test_an_unknown_family_is_refused():
    refused(
        "unknown family 'dense-digits': known are conv-digits",
        lambda: cotrain.run(cotrain.Cotrain(family="dense-digits")),
    )
