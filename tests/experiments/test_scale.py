"""Scaling out: counts of small cells are those by hand, two processes train and are timed, the report is of the rows."""

from __future__ import annotations

from experiments import scale
from experiments.bench.runner import read_rows


def test_sizes_are_those_by_hand():
    width, inner, tokens = 8, 12, 5
    found = scale.sizes(*scale.wikitext(width, heads=2, inner=inner, tokens=tokens))
    assert found["state"] == tokens * width
    projections = 4 * width * width + 2 * width * inner  # queries, keys, values; out; two of the feedforward part
    by_token = 2 * tokens * projections + 2 * tokens * 2 * width * width  # keys and values of the memory
    attention = 3 * 2 * tokens * (2 * tokens) * width  # by content, by distance, of values
    positions = 2 * (2 * tokens) * width * width
    assert found["operations"] == by_token + attention + positions
    rank, taps = 16, 3
    assert found["step"] - found["operations"] == 2 * 2 * tokens * taps * rank * width, "two maps of the preconditioner"
    assert 0 < found["checkpointed"] < found["bytes"]


def test_the_expanded_cell_has_five_times_the_channels_inside():
    cell, x = scale.imagenet(widths=(8, 16), side=4)
    assert [conv[0].out_channels for conv in cell.convs] == [40, 80]
    assert [tuple(part.shape) for part in cell(cell.initial_state(x), x)] == [(1, 8, 4, 4), (1, 16, 2, 2)]


def test_two_processes_are_timed_and_told(tmp_path, monkeypatch):
    small = {"one": lambda: scale.wikitext(8, 2, 12, 5)}
    monkeypatch.setattr(scale, "MODELS", small)
    config = scale.Scale(
        families=("dense-digits",), steps=2, batch=4, repeats=1, runs=tmp_path / "runs", results=tmp_path / "results",
        progress=False,
    )  # fmt: skip
    scale.run(config)
    (folder,) = (tmp_path / "results").iterdir()
    rows = read_rows(folder / "rows.jsonl")
    timed = [row for row in rows if row["row"] == "shared"]
    assert [row["processes"] for row in timed] == [1, 2]
    assert all(row["seconds"] > 0 for row in timed)
    assert timed[0]["exchanged"] == timed[1]["exchanged"] > 0
    efficiency = timed[0]["seconds"] / (2 * timed[1]["seconds"])
    assert f"{efficiency:.0%}" in (folder / "report.md").read_text()
