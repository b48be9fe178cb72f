"""The suite of DEQs that nothing was tuned on: what it holds, its frozen models, and the measurement of fits to them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils import _pytree as pytree

import metabroyden as mb
from experiments import strangers
from experiments.bench.runner import read_rows
from experiments.bench.solvers import shuffled
from experiments.strangers import report, rows
from experiments.strangers.data import SOURCES, load_data
from experiments.strangers.frozen import load
from experiments.strangers.model import KINDS
from experiments.strangers.suite import DEV, HELD, SUITE, names, spec_of, split_of
from experiments.strangers.train import MODELS, path_of, train_missing
from metabroyden.nn.spectral import spectral_radius
from tests.helpers import refused

EASY = "dense-digits-64-tanh"


def test_the_suite_has_every_kind_of_cell_and_data_with_and_without_penalty():
    assert len({spec.name for spec in SUITE}) == len(SUITE) >= 24
    assert {spec.cell for spec in SUITE} == {*KINDS, "mlp"}
    assert {spec.data for spec in SUITE} == set(SOURCES)
    assert len({spec.seed for spec in SUITE}) == len(SUITE)
    for choices in ("norm", "rtol", "solver", "width"):
        assert len({getattr(spec, choices) for spec in SUITE}) >= 2, choices
    assert 4 <= sum(spec.penalty > 0 for spec in SUITE) <= len(SUITE) - 4
    refused("unknown stranger 'x': known are conv-digits-16-free, ", lambda: spec_of("x"))


def test_a_hash_of_the_names_halves_the_suite():
    by_hash = sorted(names(), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    middle = (len(SUITE) + 1) // 2
    assert set(by_hash[:middle]) == set(names(DEV)) == {name for name in names() if split_of(name) == DEV}
    assert set(by_hash[middle:]) == set(names(HELD))


@pytest.mark.parametrize("name", names())
def test_a_frozen_stranger_maps_states_to_states_and_broyden_finds_its_fixed_points(name):
    assert path_of(name).stat().st_size < 250_000
    stranger = load(name)
    held = stranger.held(8)
    image = held.f(held.z0, held.x)
    assert pytree.tree_map(torch.Tensor.size, image) == pytree.tree_map(torch.Tensor.size, held.z0)
    assert not any(part.requires_grad for part in pytree.tree_leaves((image, stranger.x_train, stranger.x_test)))
    assert len(pytree.tree_leaves(stranger.x_train)[0]) == stranger.spec.contexts or stranger.spec.data == "fashion"
    solution = mb.solve(held.f, held.z0, held.x, solver=mb.Broyden(), rtol=1e-2, max_nfe=100, throw=False)
    assert solution.converged.float().mean() >= 0.75
    assert stranger.facts["training_seconds"] <= 120


def test_contexts_are_the_same_at_every_load_and_other_maps_and_contexts_differ():
    for name in ("multiscale-digits-8", "transformer-counts-24-padded", "graph-reach-24-layer"):
        first, again = load(name), load(name)
        assert all(map(torch.equal, *(pytree.tree_leaves((one.x_train, one.x_test)) for one in (first, again))))
        held = first.held(4)
        here, there = first.f(held.z0, held.x), first.other()(held.z0, held.x)
        assert not any(map(torch.equal, pytree.tree_leaves(here), pytree.tree_leaves(there)))
        scaled = first.scaled(2.0)
        if isinstance(scaled, dict):
            assert torch.equal(scaled["x"], 2 * first.x_test["x"])
            assert all(value is first.x_test[key] for key, value in scaled.items() if key != "x")
        else:
            assert all(map(torch.equal, scaled, (2 * part for part in first.x_test)))


def test_what_lies_under_a_padding_mask_moves_no_other_place():
    stranger = load("transformer-counts-24-padded")
    held = stranger.held(16)
    pad = held.x["pad"]
    assert pad.any()
    z = held.f(held.z0, held.x)
    moved = (held.f(z + 5.0 * pad[:, :, None], held.x) - held.f(z, held.x)).abs().amax(dim=2)
    assert moved[~pad].max() < 1e-5 < moved[pad].min()


def test_spectral_normalisation_makes_a_contraction():
    held = load("spectral-digits-80").held(16)
    solution = mb.solve(held.f, held.z0, held.x, solver=mb.Broyden(), rtol=1e-4)
    assert spectral_radius(held.f, solution.z, held.x).max() < 1


def test_training_makes_the_files_that_are_missing_and_no_other(tmp_path):
    spec = replace(spec_of("spectral-digits-80"), steps=3)
    train_missing([spec], tmp_path)
    (path,) = tmp_path.iterdir()
    made = path.stat().st_mtime_ns
    train_missing([spec], tmp_path)
    assert path.stat().st_mtime_ns == made
    stranger = load(spec.name, tmp_path)
    assert {"training_seconds", "score", "measure", "Picard", "Anderson", "Broyden"} == set(stranger.facts)
    words = "missing: train it with `python -m experiments strangers --train`"
    refused(words, lambda: load(EASY, tmp_path), FileNotFoundError)


@pytest.mark.usefixtures("quick_fits")
def test_a_run_measures_a_pair_writes_a_report_and_does_not_measure_it_again(tmp_path, monkeypatch, capsys):
    places = {"results": tmp_path / "results", "runs": tmp_path / "runs", "progress": False}
    config = strangers.Strangers(only=(EASY,), rtol=(1e-2,), steps=2, samples=12, **places)
    strangers.run(config)
    (folder,) = config.results.glob("trial-*/dev-seed0")
    (model, row, *others) = read_rows(folder / "rows.jsonl")
    assert (model["row"], model["name"], model["cell"]) == ("model", EASY, "dense")
    assert model["f_milliseconds"] > 0
    assert (row["row"], row["name"], row["part"], row["rtol"], row["samples"]) == ("fit", EASY, DEV, 1e-2, 12)
    assert row["returned"] == "fitted" or row["returned"] in (
        "Broyden",
        "tuned Picard",
        "tuned Anderson",
        "tuned Broyden",
    )
    assert (row["ours"] is not None) == row["trained"] == bool(others)
    assert (row["returned"] == "fitted") != bool(row["reasons"])
    assert 1 <= row["best"]["median"] <= row["best"]["p90"] <= 60
    assert EASY in (folder.parent / "report.md").read_text()
    monkeypatch.setattr(strangers, "measured", None)
    strangers.run(config)
    assert read_rows(folder / "rows.jsonl") == [model, row, *others]
    refused("not of part held", lambda: strangers.run(replace(config, part="held")))
    refused("unknown stranger 'mine'", lambda: strangers.run(replace(config, only=("mine",))))


@pytest.mark.usefixtures("quick_fits")
def test_a_fitted_solver_is_held_against_its_fallback_where_it_does_not_fit():
    stranger = load(EASY)
    solver = mb.fit_solver(stranger.f, stranger.x_train[:40], steps=2, fallback=False, progress=False)
    found = list(rows.robust_rows(SimpleNamespace(samples=12, budget=60, seed=0), stranger, solver, 1e-2))
    assert [row["case"] for row in found] == ["as fitted", "wrong weights", "shifted inputs", "another f"]
    for row in found:
        assert row["learned"] - row["fallback"] == pytest.approx((row["gained"] - row["lost"]) / 12)
    wrong = shuffled(solver, 0)
    pairs = list(zip(wrong.parameters(), solver.parameters(), strict=True))
    assert all(torch.equal(a.flatten().sort().values, b.flatten().sort().values) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_the_summary_counts_hard_pairs_and_the_worst_success():
    def fit(mean, returned, ours, solved=1.0):
        theirs = {"name": "Broyden", "mean": mean, "p90": 2 * mean, "solved": 1.0, "time_over_fastest": 1.0}
        own = {"mean": ours, "p90": ours, "solved": solved, "time_over_fastest": 0.5}
        return {"part": "dev", "rtol": 0.01, "returned": returned, "trained": True, "ours": own, "best": theirs,
                "fastest": theirs, "surest": 1.0, "samples": 128}  # fmt: skip

    pairs = [fit(20, "fitted", 5), fit(40, "Broyden", 40, 0.5), fit(9, "fitted", 9, 0.9)]
    (line,) = report.summary(pairs).body
    assert line[2:7] == ["2 of 3", "50%", "0.25 (0.50)", "0.13 (0.25)", "0.50 (0.50)"]
    assert float(line[7]) < -5  # of the third, whose solver was returned and solves nine in ten


def test_data_are_the_same_at_every_call_and_their_test_samples_are_others():
    for name in SOURCES:
        data = load_data(name)
        again = SOURCES[name]()
        assert all(map(torch.equal, *(pytree.tree_leaves((one.train, one.test_targets)) for one in (data, again))))
        assert len(data.test_targets) >= 256
        assert not all(
            map(torch.equal, *([leaf[:200] for leaf in pytree.tree_leaves(part)] for part in (data.train, data.test)))
        )
    assert MODELS.is_dir()
