"""The classical solvers against their peers."""

from __future__ import annotations

import pytest

import metabroyden as mb
from experiments.bench import faithful
from experiments.bench.peers import ScipySolver, TorchDEQSolver
from experiments.solvers import overhead
from experiments.solvers.rows import anatomy_rows, registry_rows
from metabroyden.comparison.statistics import Field
from metabroyden.zoo.testbed.cells import blas


def test_the_race_of_classical_solvers_tells_what_happened():
    cell = blas(6, 12, 1.2)
    other = blas(6, 12, 1.2, x_seed=2)
    racers = {"ours": mb.Anderson(), "hybr": ScipySolver("hybr")}
    contestants = {"Broyden": {"ours": mb.Broyden(), "torchdeq": TorchDEQSolver("broyden")}}
    ours, theirs = overhead.race_rows("tiny", [cell, other], contestants, rtol=1e-4, budget=30, repeats=2)
    assert ours["samples"] == 12
    assert ours["success"] == theirs["success"] == 1
    assert abs(ours["median"] - theirs["median"]) <= 1
    assert theirs["ratio_overhead"] == theirs["ratio_total"] == 1
    assert 0 < ours["overhead"] < ours["total"]
    expected = mb.solve(cell.f, cell.z0, cell.context, solver=mb.Broyden(), rtol=1e-4, max_nfe=30)
    assert ours["calls"] == int(expected.nfe.max())
    anatomy = anatomy_rows("tiny", cell, rtol=1e-4, budget=30, repeats=1)
    assert all(min(row["f"], row["step"], row["driver"]) > 0 for row in anatomy)
    gaps = overhead.gap_rows((2,), (2,), repeats=1, steps=8)
    assert {row["by"] for row in gaps} == {"step", "batch", "memory"}
    prices = list(overhead.price_rows(repeats=1, batch=2, budget=4))
    assert {(row["solver"], row["how"]) for row in prices} >= {("Picard", "fixed"), ("learned", "solve, trace")}
    assert all(row["f"] > 0 < row["outside"] for row in prices)
    field = Field(registry_rows("two_tensors", racers, budget=60, batch=2))
    for name in racers:
        found = field.must("two_tensors", name, 1e-5)
        assert found.evaluations.shape == (1, 2)
        assert found.success == 1


@pytest.mark.parametrize("name", ["solvers", "gradients", "memory", "meta/pes", "torchdeq"])
def test_reports_are_remade_from_the_published_rows_cell_for_cell(tmp_path, name):
    with faithful.undrawn():
        count, differ = faithful.compared(name, tmp_path / "folder")
    assert count > 50
    assert differ == []
