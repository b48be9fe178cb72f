"""The workloads: models that are trained when missing, what their owners hand over, and what is measured of them."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

import metabroyden as mb
from experiments import workloads
from experiments.bench.runner import read_rows
from experiments.workloads import graphs, imaging, puzzles, texts
from experiments.workloads.brought import Brought
from experiments.workloads.drawn import missed
from experiments.workloads.report import pictures as shown_pictures
from experiments.workloads.report import ratios
from experiments.workloads.rows import OURS, pictures
from experiments.workloads.suite import MODELS, WORKLOADS, facts_of, model_of, path_of
from metabroyden.comparison.tables import chosen
from metabroyden.deq import initial_state
from metabroyden.meta.tasks import rows
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
    found_rows = read_rows(trial / "rows.jsonl")
    (model,), (fit,) = chosen(found_rows, "model"), chosen(found_rows, "fit")
    assert 0.5 < model["equilibrium"] <= 1
    assert model["exact"] == 1
    assert fit["numbered"] == fit["renumbered"], "the numbers of the nodes mean nothing"
    for tolerance in (1e-2, 1e-3):
        (found,) = ratios(found_rows, SMALL, tolerance)
        assert found["evaluations"] == pytest.approx(found["mean"] / found["best_mean"])
    enough = {row["solver"]: row["evaluations"] for row in chosen(found_rows, "equal")}
    scores = chosen(found_rows, "depth", solver="tuned Anderson")
    wanted = [row["evaluations"] for row in scores if row["score"] >= model["equilibrium"] - 0.005]
    assert enough["tuned Anderson"] == min(wanted)
    text = (trial / "report.md").read_text()
    assert "## To 0.01" in text
    assert f"**{SMALL}**" in text
    assert (trial / "depth.png").exists()


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_trained_model_is_small_and_has_equilibria(name):
    assert path_of(name).stat().st_size < 4_000_000
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

    def train(model, path):
        trained.append(model)
        return {"steps": 0}

    monkeypatch.setitem(WORKLOADS, SMALL, WORKLOADS[SMALL]._replace(train=train))
    one, other = model_of(SMALL, tmp_path), model_of(SMALL, tmp_path)
    assert len(trained) == 1
    assert torch.equal(one.stem.weight, other.stem.weight)
    assert torch.equal(one.stem.weight, task.build().stem.weight)


def test_a_co_trained_model_comes_of_the_trained_one(tmp_path, monkeypatch):
    given = {}

    def cotrain(model, **options):
        given.update(options, trainable=all(weight.requires_grad for weight in model.parameters()))
        other = copy.deepcopy(model)
        other.head.bias.data += 1
        return other

    monkeypatch.setattr(mb, "cotrain", cotrain)
    (tmp_path / "masked-encoder.safetensors").write_bytes(path_of("masked-encoder").read_bytes())
    found, original = (model_of(name, tmp_path) for name in ("masked-encoder-cotrained", "masked-encoder"))
    torch.testing.assert_close(found.head.bias, original.head.bias + 1)
    assert given["trainable"]
    assert facts_of("masked-encoder-cotrained", tmp_path)["kept"]


@pytest.mark.parametrize("name", [name for name, work in WORKLOADS.items() if work.lesson is not None])
def test_a_lesson_is_what_cotrain_takes(name):
    lesson, model = WORKLOADS[name].lesson(), WORKLOADS[name].build()
    inputs, targets = (rows(part, slice(4)) for part in lesson["data"])
    outputs = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    assert lesson["score"](outputs, targets).shape == (4,)
    assert torch.isfinite(lesson.get("loss", missed)(outputs, targets))
    assert not {*lesson} - {"data", "loss", "score", "steps", "batch_size"}


def test_puzzles_are_of_solved_grids_and_singles_solve_them():
    clues, answers = puzzles.puzzles(40, 3)
    other, _ = puzzles.puzzles(40, 4)
    grids, digits = answers.view(-1, 9, 9), torch.arange(9)
    boxes = grids.view(-1, 3, 3, 3, 3).transpose(2, 3).reshape(-1, 9, 9)
    for lines in (grids, grids.transpose(1, 2), boxes):
        assert torch.equal(lines.sort(2).values, digits.expand_as(lines))
    shown = clues > 0
    assert torch.equal(clues[shown] - 1, answers[shown])
    assert 32 <= shown.sum(1).min() < shown.sum(1).max() <= 46
    assert not torch.equal(clues, other)
    assert puzzles.easy(clues.view(-1, 9, 9).numpy() - 1).all()
    assert not puzzles.easy(-torch.ones(1, 9, 9, dtype=torch.long).numpy()).any(), "nothing follows from nothing"


def test_a_solver_of_puzzles_sees_rows_columns_and_boxes():
    model = puzzles.Solver(12).eval()
    block, x = model.deq.cell, model.inject(*puzzles.puzzles(2, 0))
    z = torch.randn(2, 81, 12)
    changed = z.clone()
    changed[0, 40] += 1
    one = block.layers[0]
    moved = (one(changed, block.mask) - one(z, block.mask)).abs().amax(2)[0].view(9, 9) > 1e-6
    seen = torch.zeros(9, 9, dtype=torch.bool)
    seen[4] = seen[:, 4] = seen[3:6, 3:6] = True
    assert torch.equal(moved, seen)
    seen[4, 4] = False
    assert torch.equal(x.source[0][x.target[0] == 40].unique(), seen.flatten().nonzero().flatten())
    assert block(z, x).shape == z.shape


def test_lines_are_padded_and_some_of_their_characters_hidden():
    lines, vocabulary = texts.Lines(), texts.plays().vocabulary
    tokens, mask, targets = lines.draw("test", 20, torch.Generator().manual_seed(0))
    hidden = tokens == len(vocabulary)
    assert torch.equal(hidden, targets >= 0)
    assert not (hidden & ~mask).any()
    assert 12 <= mask.sum(1).min() <= mask.sum(1).max() <= 64
    assert 0.1 < hidden[mask].double().mean() < 0.35
    assert hidden.any(1).all()
    text = torch.where(hidden, targets, tokens)[mask].tolist()
    assert "\n" not in {vocabulary[token] for token in text}
    sure = torch.nn.functional.one_hot(targets.clamp_min(0), len(vocabulary)).double()
    assert texts.guessed(sure, targets).eq(1).all()
    assert texts.guessed(-sure, targets).eq(0).all()


def test_a_causal_block_sees_nothing_ahead_and_a_padded_one_no_padding():
    causal, padded = (texts.Block(8, 2, causal).eval().requires_grad_(False) for causal in (True, False))
    z, x = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    changed = z.clone()
    changed[:, 3] += 1
    moved = (causal(changed, x) - causal(z, (x, None))).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False] * 3 + [True] * 3
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    changed[0], changed[1, :4] = z[0], z[1, :4]
    changed[1, 4:] += 1
    found, same = padded(z, mb.Padded(x, mask)), padded(changed, mb.Padded(x, mask))
    torch.testing.assert_close(found[mask], same[mask])
    uniform = torch.zeros(2, 6, 4)
    torch.testing.assert_close(texts.bits(uniform, torch.zeros(2, 6, dtype=torch.long)), torch.tensor([-2.0, -2.0]))


def test_a_training_is_kept_by_epoch_and_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(puzzles, "TRAINING", replace(puzzles.TRAINING, epochs=2, pretrain=1, batch=4))
    monkeypatch.setattr(puzzles, "Puzzles", partial(puzzles.Puzzles, 1))
    path = tmp_path / "s.training"
    one = puzzles.Solver(12)
    facts = puzzles.train(one, path)
    assert facts["steps"] == 2
    assert path.exists()
    again = puzzles.Solver(12)
    assert puzzles.train(again, path)["seconds"] == facts["seconds"], "nothing is left to do"
    assert torch.equal(one.head.weight, again.head.weight)


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


def test_sensing_measures_sums_with_the_same_weights_each_time():
    one, other = imaging.Sensing(), imaging.Sensing()
    y, clear = one.problems(imaging.TEST_ON, 2, 0)
    assert y.shape == (2, round(imaging.SHARE * imaging.SIDE**2))
    torch.testing.assert_close(y, other.problems(imaging.TEST_ON, 2, 0)[0])
    noise = y - one.physics.A(clear)
    assert 0.5 * imaging.NOISE < noise.std() < 2 * imaging.NOISE
    step = clear - other.algorithm.params_algo["stepsize"][0] * one.physics.A_adjoint(one.physics.A(clear))
    assert step.norm() <= clear.norm(), "no longer than what descent bears"


def test_pictures_are_shown_side_by_side_after_equal_evaluations(tmp_path):
    true = torch.rand(2, 1, 4, 4)
    metric = lambda z, x: imaging.psnr(z, (x,))  # noqa: E731
    brought = Brought(None, None, true, metric, (None, 0), 0.0, pictures={"true": true})
    loops = {name: lambda count, by=by: true + by / count for name, by in {OURS: 0.1, "Anderson": 0.4}.items()}
    found = pictures(brought, loops)
    assert [(row["solver"], row["evaluations"]) for row in found] == [
        ("true", None), *((name, count) for name in loops for count in (2, 4, 8)),
    ]  # fmt: skip
    assert found[0]["score"] is None, "what is the same has no finite ratio of signal to noise"
    assert found[1]["score"] == pytest.approx(-20 * math.log10(0.05), abs=1e-3)
    assert found[0]["pixels"] == (255 * true[0, 0]).round().int().tolist()
    assert not pictures(replace(brought, pictures={}), loops)
    drawn = shown_pictures([{**row, "name": "sensing", "seed": 0} for row in found], "sensing", tmp_path)
    assert drawn.path.stat().st_size > 5000


def test_unknown_workloads_are_refused(tmp_path):
    places = {"results": tmp_path / "results", "runs": tmp_path / "runs", "models": MODELS}
    refused("unknown workload 'cats'", lambda: workloads.run(workloads.Workloads(only=("cats",), **places)))
    refused("seeds must be at least 1", lambda: workloads.run(workloads.Workloads(seeds=0, **places)))
