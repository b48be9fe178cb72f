"""Inference timed as users run it: what is measured, what is kept, what the report says."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import metabroyden as mb
from experiments import throughput
from experiments.bench import inference, problems, runner, solvers
from experiments.bench.inference import raw_inputs
from experiments.bench.runner import read_rows
from metabroyden.zoo.models import get_family, load_model
from metabroyden.zoo.models.families import trained_model


@pytest.fixture
def config(tmp_path):
    return throughput.Throughput(
        family="dense-digits",
        batches=(1, 4),
        samples=8,
        rounds=2,
        results=tmp_path / "results",
        runs=tmp_path / "runs",
        progress=False,
    )


def test_it_writes_what_it_promises_and_a_second_run_measures_nothing(config, monkeypatch, capsys):
    # compiling takes half a minute: the same code as it stands
    monkeypatch.setattr(mb, "FixedBudget", functools.partial(mb.FixedBudget, compiled=False))
    config = replace(config, compiled=True)
    throughput.run(config)
    (trial,) = config.results.iterdir()  # these are not the usual settings
    assert {path.name for path in trial.iterdir()} == {"dense-digits", "report.md", "throughput.png", "throughput.pdf"}
    rows = read_rows(trial / "dense-digits" / "rows.jsonl")
    timed = [row for row in rows if row["row"] == "throughput"]
    for batch in config.batches:
        here = {row["solver"]: row for row in timed if row["batch"] == batch}
        assert set(here) == {"meta-broyden-seed0", "tuned Picard", "tuned Anderson", "tuned Broyden"}
        assert [row["learned"] for row in here.values()].count(True) == 1
        (best,) = (row for row in here.values() if row["best"])
        assert not best["learned"]
        for row in here.values():
            assert row["samples"] == 8
            assert len(row["rate"]) >= 2
            assert min(row["rate"]) > 0
            assert row["evaluations"] <= row["most"] <= 60
    fixed = [row for row in rows if row["row"] == "fixed"]
    assert [(row["batch"], row["learned"]) for row in fixed] == [(1, True), (1, False), (4, True), (4, False)]
    for row in fixed:
        assert row["most"] == row["budget"]
        assert len(row["ordinary"]) == len(row["rate"])
    assert "With a fixed budget, compiled" in (trial / "report.md").read_text()
    described = json.loads((trial / "dense-digits" / "config.json").read_text())
    assert described["command"].startswith("python -m experiments throughput --family dense-digits")
    assert {"--batches 1 4", "--samples 8", "--rounds 2"} <= {f"--{word}" for word in described["command"].split(" --")}
    assert "Throughput of inference" in capsys.readouterr().out

    monkeypatch.setattr(solvers, "tuned", lambda *_, **options: pytest.fail("tuned again"))
    throughput.run(config)
    assert read_rows(trial / "dense-digits" / "rows.jsonl") == rows


def test_compiled_solves_are_no_other_setting(tmp_path):
    config = throughput.Throughput(compiled=True, results=tmp_path)
    assert runner.Run(replace(config, runs=tmp_path), free=throughput.FREE).folder == tmp_path


@pytest.mark.parametrize("refusal", [ValueError("decides on the way"), UserWarning("FixedBudget runs uncompiled: x")])
def test_what_cannot_be_compiled_is_said_and_gets_no_figures(monkeypatch, refusal):
    model = load_model(trained_model(throughput.Throughput.models, "dense-digits"), solver=mb.Broyden(), warn=False)
    inputs = raw_inputs(model, get_family("dense-digits").criterion(), 4)

    def refused(*given, **options):
        raise refusal

    monkeypatch.setattr(mb, "FixedBudget", refused)
    rows = list(throughput.measured({"ours": model, "rival": model}, "ours", inputs, 4, 1, compiled=True))
    assert [row["refused"] for row in rows if row["row"] == "fixed"] == [str(refusal)] * 2


def test_what_is_timed_is_the_models_own_call(monkeypatch):
    """Scores and evaluations are those of the model called by hand on all inputs; the clock ticks once a batch."""
    path, solver = trained_model(throughput.Throughput.models, "dense-digits"), mb.Broyden()
    model = load_model(path, solver=solver, rtol=1e-2, max_nfe=60, warn=False)
    inputs = raw_inputs(model, get_family("dense-digits").criterion(), 12)
    ticks = iter(range(10_000))
    monkeypatch.setattr(inference, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert inference.find_reference(model, inputs, [mb.Broyden(100)])["solved"] == 1
    with torch.no_grad():
        logits = model(*inputs.given)
    found = model.deq.last_solution
    models = {"ours": model, "rival": model}
    for row in (row for batch in (2, 4) for row in throughput.measured(models, "ours", inputs, batch, 3)):
        assert row["score"] == pytest.approx(float((logits.argmax(1) == inputs.answers).float().mean()), rel=1e-4)
        assert row["agrees"] == pytest.approx(float((logits.argmax(1) == inputs.reference).float().mean()), rel=1e-4)
        assert row["evaluations"] == pytest.approx(float(found.nfe.float().mean()), rel=1e-4)
        assert row["most"] == found.nfe.max()
        assert row["rate"] == [4.0] * len(row["rate"]), "two batches of 2 or one of 4 a round"
    assert model.deq.solver is solver
    assert (model.deq.rtol, model.deq.max_nfe) == (1e-2, 60)


def test_texts_are_read_on_from_the_memory_of_the_segment_before():
    family = get_family("trellisnet-words")
    criterion = family.criterion()
    model = load_model(trained_model(throughput.Throughput.models, "trellisnet-words"), warn=False)
    inputs, held = raw_inputs(model, criterion, 2), problems.held_out(model, criterion, "test", 2)
    with torch.no_grad():
        logits = model(*inputs.given)
        index = torch.arange(2)
        assert torch.equal(inputs.score(logits, index), held.judge(model.deq(held.x), index))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"family": "dense"}, ValueError, "unknown family 'dense'"),
        ({"batches": (4, 0)}, ValueError, r"batches must be of at least 1 sample, got \(4, 0\)"),
        ({"batches": ()}, ValueError, "batches must be of at least 1 sample"),
        ({"batches": (9,)}, ValueError, "a batch of 9 is more than the 8 test samples"),
        ({"rounds": 0}, ValueError, "rounds must be at least 1, got 0"),
        ({"solver": "best"}, ValueError, "solver must be NAME-seedNUMBER or a shipped one .*universal.*, got 'best'"),
        (
            {"solver": "grouped-seed7"},
            FileNotFoundError,
            r"dense-digits/grouped-seed7/solver.safetensors is missing: train it with `python -m experiments meta "
            "--family dense-digits --solver grouped --seed 7`",
        ),
    ],
)
def test_wrong_options_are_named(config, options, error, words):
    with pytest.raises(error, match=words):
        throughput.run(replace(config, **options))


def test_the_report_marks_where_the_learned_solver_is_faster(tmp_path):
    def rows(family, *speeds):
        figures = {"score": 0.9, "evaluations": 5.0, "most": 9, "solved": 1.0, "agrees": 1.0, "samples": 8}
        yield {"row": "reference", "score": 0.91, "solved": 1.0, "samples": 8}
        for batch, speed in speeds:
            for name, learned, rate in (("ours", True, speed), ("rival", False, 100.0), ("frail", False, 250.0)):
                who = {"solver": name, "learned": learned, "best": name == "rival"}
                yield {"row": "throughput", "batch": batch, **who, "rate": [rate, 1.1 * rate, 0.9 * rate], **figures}

    for family, speeds in {"a-family": ((1, 50.0), (32, 200.0)), "b-family": ((1, 100.0), (32, 300.0))}.items():
        throughput_rows_of = [{"family": family, **row} for row in rows(family, *speeds)]
        (tmp_path / family).mkdir()
        (tmp_path / family / "rows.jsonl").write_text("\n".join(map(json.dumps, throughput_rows_of)))
    report = throughput.write(tmp_path).read_text()
    line = "| a-family | 32 | 200 | 100 rival | **2.00×** (2.00–2.00) | 0.9000, 0.9000 | 0.9100 |"
    assert line in report
    assert "| b-family | 1 | 100 | 100 rival | 1.00× (1.00–1.00) |" in report
