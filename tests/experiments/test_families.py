"""The experiment that trains, measures and freezes a family, and what it measures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import metabroyden as mb
from experiments import models
from experiments.bench import measure
from experiments.bench.problems import held_out
from experiments.bench.runner import read_rows
from experiments.models import rows as model_rows
from experiments.models.ngram import NGram, Recent
from experiments.models.report import Results, difficulty
from metabroyden.comparison import measure as comparison
from metabroyden.comparison.statistics import BEST
from metabroyden.zoo.data.text import TextData, TextSplit
from metabroyden.zoo.models import (
    DenseClassifier,
    DenseClassifierConfig,
    Images,
    MonotoneClassifier,
    MonotoneClassifierConfig,
    NextToken,
    Training,
    TrellisNet,
    TrellisNetConfig,
    families,
    load_episodes,
    load_model,
    train,
)
from metabroyden.zoo.models.families import Family
from tests.zoo.test_families import text, tiny_dense, trellis
from tests.zoo.test_models import small_digits

ROOT = Path(__file__).parents[2]


def tiny_language() -> Family:
    return Family(
        TrellisNet,
        TrellisNetConfig(vocabulary=len(text().vocabulary), channels=6, dilation=4, embedding=4),
        lambda: NextToken(text(), length=12, segments=3, stretches=2, limit=200),
        Training(epochs=3, batch=4, pretrain=1, depth=3),
        (TrellisNetConfig(channels=8), Training(epochs=1)),
        depth=3,
        pictures=True,
    )


def tiny_monotone() -> Family:
    return Family(
        MonotoneClassifier,
        MonotoneClassifierConfig(width=9),
        lambda: Images(small_digits()),
        Training(epochs=3, batch=32),
        (MonotoneClassifierConfig(width=11), Training(epochs=1)),
        depth=3,
        solver=mb.PeacemanRachford(),
        splitting=True,
    )


def config(tmp_path) -> models.Models:
    return models.Models(
        family="tiny",
        budget=12,
        samples=20,
        repeats=1,
        device="cpu",
        results=tmp_path / "results",
        runs=tmp_path / "runs",
        progress=False,
    )


@pytest.mark.parametrize("name", ["dense", "language", "monotone"])
def test_a_family_is_trained_measured_and_frozen_by_one_command(name, tmp_path, monkeypatch, capsys):
    family = {"dense": tiny_dense, "language": tiny_language, "monotone": tiny_monotone}[name]()
    monkeypatch.setitem(families.FAMILIES, "tiny", family)
    if name == "language":
        monkeypatch.setattr("metabroyden.checkpoint.LARGEST", 100)  # what is stored is rounded, and that is measured
    original = models.Job.trained

    def interrupted(self, way, build):
        if way == "unrolled":
            raise KeyboardInterrupt
        return original(self, way, build)

    monkeypatch.setattr(models.Job, "trained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.run(config(tmp_path))
    assert not (tmp_path / "results").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("DEQ*.training.safetensors")}
    monkeypatch.setattr(models.Job, "trained", original)
    models.run(config(tmp_path))
    for path in tmp_path.rglob("DEQ*.training.safetensors"):
        assert path.stat().st_mtime_ns == kept[path.name], "finished training was done again"
    (trial,) = (tmp_path / "results").iterdir()  # not the usual settings
    folder = trial / "tiny"
    written = {path.name for path in folder.iterdir()}
    promised = ("model.safetensors", "regularised.safetensors", "episodes.safetensors", "rows.jsonl.gz", "config.json")
    assert {*promised, "report.md", "training.png", "depth.png"} <= written
    rows = read_rows(folder / "rows.jsonl")
    kinds = {row["row"] for row in rows}
    assert {"epoch", "quality", "depth", "solve", "spectrum", "step"} <= kinds
    assert ({"units", "ngram", "recent", "leak"} <= kinds) == (name == "language")
    sure = [row for row in rows if row["row"] == "guarantee"]
    assert {row["solver"] for row in sure} == (
        {"forward-backward", "Peaceman-Rachford"} if name == "monotone" else set()
    )
    assert all(row["samples"] == len(small_digits().test.images) and row["failures"] == 0 for row in sure)
    ways = {row["way"] for row in rows if row["row"] == "quality"}
    assert ways == {"DEQ", "DEQ, Jacobian penalty", *family.twins}
    model = load_model(folder / "model.safetensors", max_nfe=40, warn=False)
    described = json.loads((folder / "config.json").read_text())
    assert described["fingerprint"]["DEQ"] == mb.learned.fingerprint.fingerprint(model.cell)
    episodes = load_episodes(folder / "episodes.safetensors")
    assert list(episodes) == [1, 2, 3]
    for ours, theirs in zip(episodes[3].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    report = (trial / "report.md").read_text()
    assert "tiny" in report
    assert "nan" not in report
    assert ("to n-gram" in report) == (name == "language")
    assert ("Peaceman–Rachford, all" in report) == (name == "monotone")
    assert "tiny" in capsys.readouterr().out
    before = (folder / "rows.jsonl.gz").read_bytes()
    models.run(config(tmp_path))
    assert (folder / "rows.jsonl.gz").read_bytes() == before


def test_the_penalty_makes_equilibria_easier_to_find():
    radius = {}
    for weight in (0.0, 5.0):
        torch.manual_seed(0)
        training = Training(epochs=8, batch=32, jacobian=weight)
        criterion = Images(small_digits())
        model = train(lambda: DenseClassifier(DenseClassifierConfig(n=16), warn=False), criterion, training)
        held = held_out(model.requires_grad_(False), criterion, "validation", 32)
        radius[weight] = np.median(model_rows.spectrum_row("DEQ", held, mb.Broyden(memory=80))["radius"])
    assert radius[5.0] < 0.8 * radius[0.0]


def test_depth_rows_tell_the_score_and_the_residual_after_each_depth():
    criterion = Images(small_digits())
    model = tiny_dense().build().requires_grad_(False)
    held = held_out(model, criterion, "test", 16)
    rows = model_rows.depth_rows("DEQ", held, depths=(1, 3, 30))
    z = held.z0
    for _ in range(3):
        z = held.f(z, held.x)
    right = model.classify(z).argmax(dim=1) == criterion.data.test.labels[:16]
    assert rows[1]["score"] == pytest.approx(float(right.float().mean()), rel=1e-4)
    residual = mb.relative_residual(z, held.f(z, held.x)).sort().values
    assert residual[7] * 0.999 <= rows[1]["residual"][1] <= residual[8] * 1.001
    assert rows[0]["residual"][1] > rows[2]["residual"][1]
    solved = model_rows.depth_rows("DEQ", held, solver=mb.Anderson(), depths=(1, 3, 30))
    assert solved[-1]["residual"][1] < 1e-3


def test_ngrams_are_scored_on_the_tokens_that_models_predict_and_orders_stop_at_63_bits():
    tokens = torch.randint(5001, (5001,), generator=torch.Generator().manual_seed(0))
    split = lambda part: TextSplit(part, ("",), (0,))  # noqa: E731
    data = TextData(
        split(tokens[:3000]), split(tokens[3000:3300]), split(tokens[3300:]), tuple(map(str, range(5001))), "word"
    )
    rows = list(model_rows.ngram_rows(NextToken(data, length=7)))
    *rows, recent = rows
    assert [row["order"] for row in rows] == [1, 2, 3, 4, 5]
    assert (recent["row"], recent["order"]) == ("recent", min(rows, key=lambda row: row["validation"])["order"])
    read = (1701 - 1) // 64 // 7 * 64 * 7
    model = NGram.fit(data.train.tokens, 2, 5001)
    wanted = -np.log2(model.probabilities(data.test.tokens)[1 : read + 1]).mean()
    assert rows[1]["score"] == pytest.approx(wanted, rel=1e-3)
    told = Recent.fit(NGram.fit(data.train.tokens, recent["order"], 5001), data.validation.tokens, recent=512)
    assert recent["weights"] == pytest.approx(told.weights[1:], rel=1e-3)
    wanted = -np.log2(told.probabilities(data.test.tokens)[1 : read + 1]).mean()
    assert recent["score"] == pytest.approx(wanted, rel=1e-3)


def test_what_a_solve_short_of_the_equilibrium_tells_of_the_future_is_measured():
    torch.manual_seed(0)
    model = trellis().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    criterion = NextToken(text(), length=12)
    loose, exact = measure.leak_rows(model, criterion, {}, tolerances=(0.1, 1e-6), windows=4, last=3)
    assert exact["most"] < 1e-5
    assert loose["most"] > 1e-3
    assert (model.deq.rtol, model.deq.max_nfe) == (trellis().deq.rtol, 30)


def test_one_sample_that_diverges_has_an_infinite_residual_alone():
    z = torch.ones(3, 2)
    z[1] = 1e38
    found = comparison._residual(lambda z, x: 10 * z, z, z)
    assert torch.isinf(found[1])
    torch.testing.assert_close(found[[0, 2]], torch.full((2,), 0.9))


def test_another_recipe_has_another_work_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "tiny", tiny_dense())
    first = models.Job(config(tmp_path))
    assert models.Job(config(tmp_path)).work == first.work
    remeasured = models.Job(replace(config(tmp_path), samples=21))
    assert (remeasured.work, remeasured.measured != first.measured) == (first.work, True)
    monkeypatch.setitem(families.FAMILIES, "tiny", replace(tiny_dense(), depth=4))
    assert models.Job(config(tmp_path)).work != first.work


def test_a_report_says_which_families_are_easy():
    easy, hard = (Results(ROOT / "results" / "models" / name) for name in ("dense-digits", "conv-digits"))
    table = difficulty([easy, hard])
    assert [row[-1] for row in table.body] == ["easy", "easy", "", ""]
    for row, one in zip(table.body[::2], (easy, hard), strict=True):
        best = one.field.named("DEQ", BEST, 1e-2)
        assert row[-3] == f"{best}: {one.field.outcome('DEQ', best, 1e-2)}"
