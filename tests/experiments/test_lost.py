"""The measurement of what being learned costs at an equal budget."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments import lost
from experiments.bench.runner import read_rows


@pytest.mark.usefixtures("quick_fits")
def test_lost_samples_are_counted_on_cells_that_nothing_was_fitted_to(tmp_path):
    small = {"kinds": ("dense", "conv"), "seeds": 1, "contexts": 20, "steps": 1, "norms": (0.9, 3.0), "others": 1}
    config = lost.Lost(
        **small, samples=6, budgets=(20, 40), results=tmp_path / "results", runs=tmp_path / "runs", progress=False
    )
    lost.run(config)
    (trial,) = config.results.iterdir()
    assert {path.name for path in trial.iterdir()} == {"config.json", "rows.jsonl.gz", "report.md"}
    rows = read_rows(trial / "rows.jsonl")
    assert {(row["kind"], row["norm"], row["budget"]) for row in rows} == {
        (kind, norm, budget) for kind in ("dense", "conv") for norm in (0.9, 3.0) for budget in (20, 40)
    }
    for row in rows:
        assert row["fitted_solves"] == row["broyden_solves"] - row["lost"] + row["gained"] <= row["samples"] == 6
    with pytest.raises(ValueError, match="unknown kinds 'cubic': known are dense, conv"):
        lost.run(replace(config, kinds=("cubic",)))


def test_the_share_lost_is_of_what_broyden_solves():
    rows = [{"broyden_solves": 8, "lost": 2}, {"broyden_solves": 2, "lost": 0}]
    assert lost.share(rows, "lost") == 0.2
    assert lost.share([{"broyden_solves": 0, "lost": 0}], "lost") == 0
