"""Every experiment runs on a tiny budget, resumes after an interruption, and writes what it promises."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import replace
from typing import get_type_hints

import pytest
import torch

import metabroyden as mb
from experiments import __main__ as cli
from experiments import alternate, digits, gradients, meta, solvers
from experiments.bench.runner import read_rows
from experiments.configs import recipes
from experiments.registry import EXPERIMENTS
from metabroyden import template
from metabroyden.learned.fingerprint import same_weights
from metabroyden.meta.trainer import MetaTrainer
from metabroyden.zoo.data.images import ImageData, ImageSplit
from metabroyden.zoo.models import families

pytestmark = pytest.mark.usefixtures("few_candidates")


def tiny(tmp_path) -> digits.Digits:
    return digits.Digits(
        epochs=1, steps=4, budget=20, rounds=1, test_samples=24, results=tmp_path / "results", runs=tmp_path / "runs",
        progress=False,
    )  # fmt: skip


def few_images(monkeypatch, module):
    """Let an experiment train on eighty digits."""
    data = module.load_digits()
    splits = (data.train, data.validation)
    few = [ImageSplit(*(part[:80] for part in (one.images, one.labels, one.indices))) for one in splits]
    monkeypatch.setattr(module, "load_digits", lambda: ImageData(*few, data.test))


def test_digits_resumes_after_an_interruption_and_writes_what_it_promises(tmp_path, monkeypatch, capsys):
    few_images(monkeypatch, digits)
    config = tiny(tmp_path)
    original = MetaTrainer.run

    def interrupted(self, progress=None, until=None):
        if isinstance(self.solver, mb.CoordinatewiseLSTM):
            raise KeyboardInterrupt
        return original(self, progress, until)

    monkeypatch.setattr(MetaTrainer, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        digits.run(config)
    assert not config.results.exists()
    kept = {path: path.stat().st_mtime_ns for path in config.runs.rglob("*.safetensors")}
    assert {"model.safetensors", "meta-broyden.safetensors", "grouped.safetensors"} <= {path.name for path in kept}
    monkeypatch.setattr(MetaTrainer, "run", original)
    digits.run(config)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "finished work was done again"
    (trial,) = config.results.iterdir()
    folder = trial / "seed0"
    solvers = {f"{name}.safetensors" for name in digits.LEARNED}
    drawn = {f"{name}.{kind}" for name in ("reduction", "residual", "time", "metric") for kind in ("png", "pdf")}
    written = {"report.md", "report.html", "table.csv", "comparison.json"}
    assert {path.name for path in trial.iterdir()} == {"seed0", *drawn, *written}
    promised = {"rows.jsonl.gz", "config.json", "model.safetensors", *solvers, *drawn, *written}
    assert {path.name for path in folder.iterdir()} == promised
    described = json.loads((folder / "config.json").read_text())
    assert described["config"]["steps"] == 4
    assert described["provenance"]["versions"]["torch"]
    rows = read_rows(folder / "rows.jsonl")
    assert {row["row"] for row in rows} == {"solve", "curve", "depth"}
    assert {len(row["evaluations"]) for row in rows if row["row"] == "solve"} == {24}
    assert mb.load_solver(folder / "grouped.safetensors").fingerprint is not None
    shown = capsys.readouterr().out
    assert "MetaBroyden" in shown
    pasted = shown.split("```python\n")[1].split("```")[0]
    subprocess.run([sys.executable, "-c", pasted], check=True, timeout=120)  # warns where it does not belong to the DEQ
    before = (folder / "rows.jsonl.gz").read_bytes()
    digits.run(config)  # a third run has nothing left to do
    assert (folder / "rows.jsonl.gz").read_bytes() == before


def test_solvers_races_and_writes_what_it_promises(tmp_path, capsys, monkeypatch):
    few = {
        "PROBLEMS": ("cosine", "tanh_symmetric_1.5"),
        "KINDS": (("gaussian", 0.95),),
        "BATCHES": (1,),
        "MEMORIES": (2,),
    }
    for name, value in few.items():
        monkeypatch.setattr(solvers, name, value)
    config = solvers.Solvers(
        repeats=1, budget=9, batch=2, seeds=1, problems=2, compiled=False, results=tmp_path / "results",
        runs=tmp_path / "runs", progress=False,
    )  # fmt: skip
    solvers.run(config)
    (folder,) = config.results.glob("trial-*")  # other settings than the published ones
    written = {"rows.jsonl.gz", "config.json", "report.md", "overhead.png", "overhead.pdf"}
    assert {path.name for path in folder.iterdir()} == written
    rows = read_rows(folder / "rows.jsonl")
    assert {row["row"] for row in rows} == {"race", "anatomy", "gap", "price", "limited", "solve"}
    described = json.loads((folder / "config.json").read_text())
    assert described["config"]["budget"] == 9
    assert described["provenance"]["versions"]["torchdeq"] == "0.1.0"
    assert "geometric mean" in capsys.readouterr().out
    report = (folder / "report.md").read_text()
    assert "nan" not in report.lower().replace("not finite", "")


def test_help_shows_every_experiment_with_its_options(capsys):
    cli.main(["--help"])
    shown = capsys.readouterr().out
    for name, run in EXPERIMENTS.items():
        assert f"python -m experiments {name}" in shown
        for option in get_type_hints(run)["config"].__dataclass_fields__:
            assert f"--{option.replace('_', '-')}" in shown


def test_unknown_experiments_and_options_are_refused(capsys):
    with pytest.raises(SystemExit, match="unknown experiment 'digit': known are digits, solvers"):
        cli.main(["digit"])
    with pytest.raises(SystemExit):
        cli.main(["digits", "--epoch", "3"])
    assert "--epoch" in capsys.readouterr().err


def test_alternate_resumes_and_writes_what_it_promises(tmp_path, capsys, monkeypatch):
    few_images(monkeypatch, alternate)
    config = alternate.Alternate(
        seeds=2, epochs=2, batch=32, channels=4, side=8, warmup_steps=2, every=2, unroll=2, meta_batch=4, rank=4,
        results=tmp_path / "results", runs=tmp_path / "runs", progress=False,
    )  # fmt: skip
    original, seeds = alternate.trained, []

    def interrupted(config, seed, done):
        seeds.append(seed)
        if seeds == [0, 1]:
            raise KeyboardInterrupt
        return original(config, seed, done)

    monkeypatch.setattr(alternate, "trained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        alternate.run(config)
    alternate.run(config)
    assert seeds == [0, 1, 1], "the finished seed was not trained again"
    (trial,) = config.results.iterdir()
    figures = {f"{name}.{kind}" for name in ("accuracy_by_time", "evaluations_by_epoch") for kind in ("png", "pdf")}
    names = {"rows.jsonl.gz", "config.json", "report.md", *figures}
    assert {path.name for path in trial.iterdir()} == names
    rows = read_rows(trial / "rows.jsonl")
    assert {row["way"] for row in rows} == {*alternate.WAYS, *alternate.FIXED_IMAGES}
    learned = [row for row in rows if row["way"] == alternate.LEARNED]
    assert all(row["spent"]["meta"] > 0 for row in learned)
    assert "nan" not in (trial / "report.md").read_text()
    assert "Against Anderson" in (trial / "report.md").read_text()


def test_gradients_writes_what_it_promises(tmp_path, capsys, monkeypatch):
    few_images(monkeypatch, gradients)
    config = gradients.Gradients(
        seeds=(0,),
        steps=1,
        rtols=(1e-1,),
        budget=12,
        samples=12,
        repeats=1,
        results=tmp_path / "results",
        runs=tmp_path / "runs",
        progress=False,
    )
    gradients.run(config)
    (trial,) = config.results.iterdir()
    figures = {"bias_by_time.png", "bias_by_time.pdf"}
    assert {path.name for path in trial.iterdir()} == {"rows.jsonl.gz", "config.json", "report.md", *figures}
    rows = read_rows(trial / "rows.jsonl")
    error = {row["mode"]: row["error"] for row in rows if row["row"] == "mode"}
    assert error["implicit, 0.001"] < error["phantom, 5 steps"] < error["Jacobian-free"]
    assert "adjoint LSTM" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["multiscale-digits", "monotone-dense-digits", "trellisnet-words"])
def test_meta_trains_measures_and_goes_on(tmp_path, family, monkeypatch):
    """A short run on a frozen model, cut off in the middle of training, ends as one that was not."""
    told = {"unroll": 2, "segments": 2, "batch": 4, "rank": 4, "validation_size": 8}
    monkeypatch.setitem(recipes.RECIPES, "grouped", told)
    monkeypatch.setattr(recipes, "TEXT", {"": {"batch": 2}})
    monkeypatch.setattr(meta.job, "POOL", 8)
    monkeypatch.setattr(meta.job, "HELD", 4)
    monkeypatch.setattr(families, "load_shakespeare", functools.cache(families.load_shakespeare))
    monkeypatch.setattr(MetaTrainer.__init__, "__kwdefaults__", {"checkpoint": None, "save_every": 1})
    config = meta.Meta(
        family=family, solver="grouped", steps=3, samples=4, budget=12, backend="native", progress=False,
        results=tmp_path / "results", runs=tmp_path / "runs",
    )  # fmt: skip
    whole = meta.Job(replace(config, runs=tmp_path / "whole")).trained()
    update, calls = MetaTrainer._update, []

    def cut(self):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return update(self)

    monkeypatch.setattr(MetaTrainer, "_update", cut)
    with pytest.raises(KeyboardInterrupt):
        meta.run(config)
    monkeypatch.setattr(MetaTrainer, "_update", update)
    meta.run(config)
    (trial,) = config.results.iterdir()  # these are not the usual settings: they must not end up among the results
    assert trial.name.startswith("trial-")
    folder = trial / family / "grouped-seed0"
    for a, b in zip(whole.parameters(), mb.load_solver(folder / "solver.safetensors").parameters(), strict=True):
        assert torch.equal(a, b)
    rows = read_rows(folder / "rows.jsonl")
    assert {row["row"] for row in rows} == {"solve", "curve", "horizon"}
    for row in rows:
        if row["row"] == "solve":
            assert len(row["evaluations"]) == len(row["status"]) == 4
            assert all(n <= 12 if c == "C" else n == 12 for n, c in zip(row["evaluations"], row["status"], strict=True))
    described = json.loads((folder / "config.json").read_text())
    assert described["command"].endswith("--budget 12 --samples 4 --backend native --steps 3")
    if family == "monotone-dense-digits":
        meta.run(replace(config, solver="classical"))
        assert "| family | grouped | best classical |" in (trial / "report.md").read_text()
        assert list(config.results.iterdir()) == [trial]


def test_meta_names_what_it_does_not_know(tmp_path):
    for options, words in (
        ({"solver": "adam"}, "unknown solver 'adam': known are meta-broyden"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"objective": "square"}, "unknown objective 'square': known are residual"),
    ):
        with pytest.raises(ValueError, match=words):
            meta.run(meta.Meta(runs=tmp_path, results=tmp_path, **options))
    with pytest.raises(FileNotFoundError, match="python -m experiments models --family conv-digits"):
        meta.run(meta.Meta(family="conv-digits", models=tmp_path, runs=tmp_path, results=tmp_path))


@pytest.mark.parametrize(
    ("family", "coefficients", "rows", "gated", "dilations"),
    [
        ("conv-digits", "schedule", 28, 42, (1, 1)),
        ("monotone-dense-digits", "schedule", 7, 7, (1, 1)),
        ("trellisnet-words", "schedule", 12, 20, (2, 6)),
        ("trellisnet-shakespeare", "schedule", 14, 22, (4, 12)),
        ("transformer-shakespeare", "lstm", None, 12, (1, 1)),
        ("mlp-fashion", "lstm", 6, 6, (1, 1)),
    ],
)
def test_secants_take_over_some_time_after_an_unroll_or_where_the_family_says(
    tmp_path, family, coefficients, rows, gated, dilations
):
    job = meta.Job(meta.Meta(family=family, runs=tmp_path), {"damping": 1.0})
    options = job.plan(job.family.tasks(0, pool=1, held=1))[0].options
    assert options.get("coefficients", "schedule") == coefficients
    assert options.get("schedule_length") == rows
    assert options["learned_steps"] == gated
    assert options["dilations"] == dilations


def test_meta_trains_on_ones_own_deq_and_holds_it_against_the_classical_solvers(tmp_path, capsys):
    name = f"{template.__file__}:problem"
    config = meta.Meta(
        family=name, solver="grouped", steps=2, samples=8, budget=20, backend="native", progress=False, device="cpu",
        results=tmp_path / "results", runs=tmp_path / "runs",
    )  # fmt: skip
    meta.run(config)
    (trial,) = config.results.iterdir()
    assert trial.name.startswith("trial-"), "it is not among the results of this repository's families"
    (folder,) = (path for path in trial.iterdir() if path.is_dir())
    assert {path.name for path in folder.iterdir()} == {"grouped-seed0", "classical"}
    rows = [row for path in folder.iterdir() for row in read_rows(path / "rows.jsonl") if row["row"] == "solve"]
    assert {row["solver"] for row in rows} == {"grouped", "tuned Picard", "tuned Anderson", "tuned Broyden", "Broyden"}
    assert {len(row["evaluations"]) for row in rows} == {8}
    assert "best classical" in (trial / "report.md").read_text()
    solver = mb.load_solver(folder / "grouped-seed0/solver.safetensors")
    assert solver.layout.kind == "vector"
    assert same_weights(solver.fingerprint, template.problem()["f"])
