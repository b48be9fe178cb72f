"""Metrics read traces truthfully; benchmarks make rows; figures and reports come from rows alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import metabroyden as mb
from experiments.bench.peers import TorchDEQSolver
from experiments.legacy import benchmark, metrics, report
from metabroyden.learned.layout import Layout
from metabroyden.meta.fit import make_learned
from metabroyden.solvers.tuning import tune
from tests.conftest import tanh

NAN = float("nan")


def trace() -> mb.Trace:
    """Three samples: one goes down, one up again and stops, one never arrives."""
    residual = torch.tensor([[0.5, 0.5, 0.9], [0.05, 0.08, 0.9], [0.2, NAN, 0.8]])
    nfe = torch.tensor([[1, 1, 1], [2, 2, 2], [3, 0, 5]])
    phase = torch.tensor([[0, 0, 0], [0, 0, 0], [0, -1, 0]], dtype=torch.int8)
    return mb.Trace(residual, nfe, torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64), phase)


def test_evaluations_and_seconds_to_a_tolerance():
    spent, reached = trace().evaluations_to(0.1, 10)
    assert spent.tolist() == [2, 2, 10]
    assert reached.tolist() == [True, True, False]
    assert trace().evaluations_to(0.85, 4)[0].tolist() == [1, 1, 4]  # five evaluations are over that budget
    assert metrics.seconds_to(trace(), 0.1).tolist() == [0.2, 0.2, np.inf]
    assert metrics.summarise(spent, reached) == pytest.approx({"median": 2, "p90": 8.4, "success": 2 / 3})


def problems() -> benchmark.Problems:
    problem = tanh(batch=20, n=10, gain=1.2)
    return benchmark.Problems(problem.f, problem.z0, problem.x, lambda z: z, problem.x.argmax(dim=1))


def test_the_peer_is_counted_by_its_calls_and_judged_like_ours():
    z, trace, status = benchmark.run_solver(TorchDEQSolver("broyden"), problems(), 1e-4, 40)
    p = problems()
    _, ours, _ = benchmark.run_solver(mb.Broyden(memory=40), p, 1e-4, 40)
    assert (mb.relative_residual(z, p.f(z, p.x)) <= 1e-4).all()
    theirs, reached = trace.evaluations_to(1e-4, 40)
    assert reached.all()
    assert (status == 0).all()
    assert np.abs(theirs - ours.evaluations_to(1e-4, 40)[0]).max() <= 1


def test_float64_equilibria_are_found_and_missing_ones_admitted():
    p = problems()
    star, known = benchmark.reference_equilibrium(p.f, p.z0, p.x)
    assert known.all()
    assert float(mb.relative_residual(star, p.f(star, p.x)).max()) < 1e-9
    _, known = benchmark.reference_equilibrium(lambda z, x: z + 1 + z.square(), p.z0, p.x, max_nfe=30)
    assert not known.any()


def test_tuning_picks_the_best_of_the_grid():
    p = problems()
    tuned = benchmark.tune_classical(p, budget=40, tolerances=(1e-2, 1e-3))
    assert set(tuned) == {"picard", "anderson", "broyden"}
    for name, plain in (("picard", mb.Picard()), ("anderson", mb.Anderson()), ("broyden", mb.Broyden(60))):
        assert tuned[name][1] <= tune([plain], p.f, p.z0, p.x, tolerances=(1e-2, 1e-3), max_nfe=40)[0][1] + 1e-12


def some_rows() -> list[dict]:
    p = problems()
    learned = make_learned("grouped", Layout("vector", (10,))).double()
    solvers = {"grouped LSTM": learned, "Broyden": mb.Broyden(), "start": mb.LearnedStart.of(learned, mb.Broyden())}
    star, known = benchmark.reference_equilibrium(p.f, p.z0, p.x)
    rows: list[dict] = []
    for name, solver in solvers.items():
        rows += benchmark.sample_rows(name, solver, p, tolerances=(1e-1, 1e-2), budget=30, star=star, known=known)
        rows += benchmark.accuracy_rows(name, solver, p, budgets=(1, 4), rtol=1e-2)
    rows += benchmark.clock_rows(solvers, p, rtol=1e-2, budget=30, repeats=2, reference="Broyden")
    rows += benchmark.part_rows({"grouped LSTM": learned}, p, repeats=2)
    return [{"seed": 0, **row} for row in rows]


def test_rows_tell_what_happened_and_reports_are_made_of_rows_alone(tmp_path, monkeypatch):
    rows = some_rows()
    monkeypatch.setattr(benchmark, "solve", None)  # from here on nothing may be solved
    samples = [row for row in rows if row["row"] == "sample"]
    assert len(samples) == 3 * 20
    assert all(row["distance"] < 1 and row["status"] == "converged" for row in samples)
    clock = {row["solver"]: row for row in rows if row["row"] == "clock"}
    assert clock["Broyden"]["ratio_all"] == 1
    assert all(row["half"] <= row["most"] <= row["all"] and 0 < row["outside_f"] < 1 for row in clock.values())
    parts = {(row["solver"], row["part"]): row["f_equivalents"] for row in rows if row["row"] == "part"}
    assert parts["f", "f"] == 1
    assert set(parts) == {("f", "f"), *(("grouped LSTM", part) for part in ("start", "init", "step"))}
    results = report.Results(rows)
    spent = [row["nfe"]["0.01"] for row in samples if row["solver"] == "Broyden"]
    assert f"{np.median(spent):g} / {np.percentile(spent, 90):g} / 100.0%" in report.evaluations_table(results)
    assert "Broyden" in report.claims_table(results, "grouped LSTM", ["Broyden"], "Broyden")
    figures = report.write_figures(
        results, tmp_path, main=["grouped LSTM", "Broyden"], learned="grouped LSTM", reference="Broyden"
    )
    for figure in figures:
        assert figure.read_bytes().startswith(b"\x89PNG")
        assert figure.stat().st_size > 5_000


def test_no_rows_no_report():
    with pytest.raises(ValueError, match="no rows"):
        report.Results([])
