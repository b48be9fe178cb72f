"""What each part of a fit buys: the variants differ in that part alone, and the report has a row for each."""

from __future__ import annotations

import pytest
import torch

from experiments import ablate
from experiments.bench.runner import read_rows
from experiments.strangers.frozen import load
from metabroyden.learned.safeguard import BY_PROGRESS
from tests.helpers import refused, same_parameters

EASY = "dense-digits-64-tanh"


@pytest.mark.usefixtures("quick_fits")
def test_every_variant_of_a_fit_is_measured_and_reported(tmp_path):
    places = {"results": tmp_path / "results", "runs": tmp_path / "runs", "progress": False}
    config = ablate.Ablate(only=(EASY,), seeds=1, steps=2, samples=12, **places)
    ablate.run(config)
    (folder,) = config.results.glob("trial-*")
    rows = read_rows(folder / "rows.jsonl")
    variants = {"Broyden", *ablate.TRAININGS, *ablate.WITHOUT}
    assert {row["variant"] for row in rows} == variants
    assert len(rows) == 2 * len(variants) - 1, "Broyden has no weights that could be wrong"
    assert all(1 <= row["median"] <= row["p90"] <= 60 and 0 <= row["solved"] <= 1 for row in rows)
    lines = (folder / "report.md").read_text().splitlines()
    assert all(any(line.startswith(f"| {name} ") for line in lines) for name in variants)
    refused("unknown stranger 'conv-digits-16-free'", lambda: ablate.run(ablate.Ablate(only=("conv-digits-16-free",))))


@pytest.mark.usefixtures("quick_fits")
def test_what_is_left_out_of_the_hand_over_is_left_out_and_nothing_else():
    stranger = load(EASY)
    solver = ablate._fitted(ablate.Ablate(steps=2), stranger, 1e-2, 0, {})
    assert solver.config.safeguard.envelope
    found = {name: ablate._without(solver, name) for name in ablate.WITHOUT}
    assert all(same_parameters(solver, other) for other in found.values())
    assert found["no envelope"].config.safeguard == BY_PROGRESS
    initial = {name: other.phases()[1].solver.initial for name, other in found.items()}
    assert initial["no learned inverse"] is None
    assert initial["learned inverse unjudged"].solver is found["learned inverse unjudged"]
    held = stranger.held(4)
    assert torch.equal(*(one.start(held.z0, _Problem(held.x)) for one in (solver, found["no envelope"])))


class _Problem:
    """Where a solve begins."""

    decides_on_host = True
    shape = (64,)

    def __init__(self, x: torch.Tensor) -> None:
        self.context = x
