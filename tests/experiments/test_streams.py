"""The experiment on streams: frames follow from one another, a warm solve begins at the last solution, all is reported."""

from __future__ import annotations

import pytest
import torch

import metabroyden as mb
from experiments import streams
from experiments.bench.runner import read_rows
from experiments.streams import COLD, WARM, Frame, followed, grown
from metabroyden.comparison.tables import chosen, grouped
from tests.helpers import normal, refused


@pytest.mark.usefixtures("few_candidates")
def test_images_texts_and_networks_are_followed_and_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "ROUNDS", 1)
    names = ("conv-digits", "trellisnet-words", "power_flow_30")
    config = streams.Streams(
        families=names, frames=4, samples=6, results=tmp_path / "results", runs=tmp_path / "runs", progress=False
    )
    streams.run(config)
    (trial,) = config.results.iterdir()
    found = read_rows(trial / "rows.jsonl")
    assert {row["family"] for row in found} == set(names)
    for of in grouped(chosen(found, "frame"), "family", "solver", "tolerance"):
        by_start = {start: chosen(of, "frame", start=start) for start in (COLD, WARM)}
        assert [row["frame"] for row in by_start[WARM]] == [0, 1, 2, 3]
        assert by_start[COLD][0]["mean"] == by_start[WARM][0]["mean"], "the first frame is cold for all"
    networks = streams.summary(found, 1e-3)["power_flow_30"]
    assert networks["tuned Broyden", WARM]["mean"] < networks["tuned Broyden", COLD]["mean"]
    for (solver, _), way in streams.summary(found, 1e-2)["conv-digits"].items():
        assert 1 <= way["mean"] <= 60
        assert (way["seconds"] or 0) > 0 or solver not in ("tuned Anderson", "meta-broyden")
    text = (trial / "report.md").read_text()
    assert "## To 0.01" in text
    assert "| trellisnet-words | MetaBroyden |" in text
    assert (trial / "frames.png").exists()


def test_a_warm_solve_begins_at_the_last_solution():
    def f(z, x):
        return 0.9 * z + x

    x = normal(3, 4)
    frames = [Frame(f, torch.zeros(3, 4), x), Frame(f, torch.zeros(3, 4), x + 1e-4)]
    options = {"rtol": 1e-3, "max_nfe": 100, "throw": False}
    warm, cold = (followed(frames, mb.Picard(), warm=warm, **options) for warm in (True, False))
    assert warm[0].nfe.tolist() == cold[0].nfe.tolist()
    assert warm[1].nfe.max() < cold[1].nfe.min() / 4


def test_what_is_new_of_a_text_begins_where_it_usually_does():
    z, z0 = torch.ones(2, 3, 4), torch.full((2, 3, 6), 7.0)
    start = grown(z, z0)
    assert start[..., :4].unique().tolist() == [1.0]
    assert start[..., 4:].unique().tolist() == [7.0]
    assert z0.unique().tolist() == [7.0], "a copy"


def test_unknown_families_and_no_frames_are_refused(tmp_path):
    places = {"results": tmp_path / "results", "runs": tmp_path / "runs"}
    refused("famil", lambda: streams.run(streams.Streams(families=("conv-cats",), **places)))
    refused("frames must be at least 1", lambda: streams.run(streams.Streams(frames=0, **places)))
