"""Metrics read traces truthfully; benchmarks make rows; figures and reports come from rows alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import metabroyden as mb
from experiments.bench.peers import ScipySolver, TorchDEQSolver
from experiments.legacy import benchmark, meta_report, meta_rows, metrics, report, solver_rows
from experiments.legacy.equilibria import HeldOut
from experiments.legacy.provenance import write_results
from metabroyden.learned.layout import Layout
from metabroyden.meta.fit import make_learned
from metabroyden.solvers.tuning import tune
from metabroyden.zoo.testbed.cells import blas
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


def test_the_race_of_classical_solvers_tells_what_happened():
    cell = blas(6, 12, 1.2)
    other = blas(6, 12, 1.2, x_seed=2)
    contestants = {"Broyden": {"ours": mb.Broyden(), "torchdeq": TorchDEQSolver("broyden")}}
    rows = solver_rows.race_rows("tiny", [cell, other], contestants, rtol=1e-4, budget=30, repeats=2)
    ours, theirs = rows
    assert ours["samples"] == 12
    assert ours["success"] == theirs["success"] == 1
    assert abs(ours["median"] - theirs["median"]) <= 1
    assert theirs["ratio_overhead"] == theirs["ratio_total"] == 1
    assert 0 < ours["overhead"] < ours["total"]
    expected = mb.solve(cell.f, cell.z0, cell.context, solver=mb.Broyden(), rtol=1e-4, max_nfe=30)
    assert ours["calls"] == int(expected.nfe.max())
    anatomy = solver_rows.anatomy_rows("tiny", cell, rtol=1e-4, budget=30, repeats=1)
    assert all(min(row["f"], row["step"], row["driver"]) > 0 for row in anatomy)
    gaps = solver_rows.gap_rows((2,), (2,), repeats=1, steps=8)
    assert {row["by"] for row in gaps} == {"step", "batch", "memory"}
    samples = solver_rows.registry_rows(
        ["two_tensors", "logistic"],
        {"ours": mb.Anderson(), "hybr": ScipySolver("hybr")},
        tolerances=(1e-2, 1e-5),
        budget=60,
        batch=2,
    )
    assert len(samples) == 2 * 2 * 2
    assert all(row["reached"]["1e-05"] for row in samples)


def held_linear(scale: float = 1.0) -> tuple[HeldOut, torch.nn.Module, torch.Tensor]:
    """z = Wz + x in float32, a module, and its float64 solution."""
    cell = torch.nn.Linear(6, 6, bias=False)
    matrix = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).Q
    cell.weight.data = 0.7 * scale * matrix

    class Cell(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = cell

        def forward(self, z, x):
            return self.inner(z) + x

    module = Cell()
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
    star = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - cell.weight.detach().double(), x.double().T).T

    def judge(z, index):
        return ((z - star[index].float()).norm(dim=1) < 1e-2 * star[index].norm(dim=1)).float()

    return HeldOut(module, torch.zeros(10, 6), x, judge), module, star


def test_solve_rows_count_as_solve_does_and_measure_what_a_tolerance_gives():
    held, cell, star = held_linear()
    known = torch.arange(10) < 8
    rows = meta_rows.solve_rows("Picard", mb.Picard(), held, star, known, budget=30, tolerances=(1e-1, 1e-3, 1e-9))
    loose, tight, never = (row for row in rows if row["row"] == "solve")
    with torch.no_grad():
        for row in (loose, tight):
            solution = mb.solve(cell, held.z0, held.x, solver=mb.Picard(), rtol=row["tolerance"], max_nfe=30)
            assert row["nfe"] == solution.nfe.tolist()
            assert all(row["reached"])
            apart = (solution.z.double() - star).norm(dim=1) / star.norm(dim=1)
            np.testing.assert_allclose(row["distance"][:8], apart[:8], rtol=1e-2)
            assert row["distance"][8:] == [None, None], "where z* is not known there is no distance"
            assert row["score"] == pytest.approx(float(held.judge(solution.z, torch.arange(10)).mean()))
    assert loose["score"] < tight["score"] == 1
    assert never["nfe"] == [30] * 10
    assert not any(never["reached"])
    (curve,) = (row for row in rows if row["row"] == "curve")
    assert curve["first"] == 1
    assert len(curve["residual"]) == 30
    assert curve["residual"][0][1] == pytest.approx(1.0), "f(0) − 0 over f(0)"


def test_clock_rows_take_turns_and_count_calls(tmp_path):
    held, _, _ = held_linear()
    solvers = {"meta-broyden": mb.Picard(), "tuned Picard": mb.Picard(0.5)}
    rows = meta_rows.clock_rows(solvers, held, tolerances=(1e-2, 1e-3), budget=40, batch=6, repeats=3)
    assert [(row["solver"], row["tolerance"]) for row in rows[:2]] == [("meta-broyden", 1e-2), ("tuned Picard", 1e-2)]
    for row in rows:
        assert row["batch"] == 6
        assert len(row["total"]) == len(row["in_f"]) == len(row["calls"]) == 3
        assert all(total > part > 0 for total, part in zip(row["total"], row["in_f"], strict=True))
    assert rows[0]["calls"][0] < rows[1]["calls"][0]


def test_the_report_holds_a_learned_solver_against_the_best_classical_one(tmp_path):
    """From rows alone: medians of 6 and 10 against 8 (not against 20), seeds apart, failures counted."""

    def put(name: str, solver: str, seed: int, rows: list[dict], family: str = "fam") -> None:
        described = {"config": {"solver": solver, "seed": seed}}
        if solver != "classical":
            described |= {
                "recipe": {"steps": 1, "segments": 1, "unroll": 1, "batch": 1}, "parameters": 5, "model_parameters": 50,
                "summary": {"seconds": 2.0, "skipped_steps": 0}, "provenance": {"commit": "abc"},
            }  # fmt: skip
        meta_rows_folder = tmp_path / family / name
        write_results(meta_rows_folder, [{"row": "star", "known": 1.0, "score": 0.9, "samples": 4}, *rows], described)

    def solved(solver: str, nfe: list[int], reached: list[bool]) -> list[dict]:
        return [
            {"row": "solve", "solver": solver, "config": "", "budget": 40, "tolerance": t, "nfe": nfe, "reached": reached,
             "distance": [0.1, None, 0.3, 0.2], "score": 0.8, "handed_over": 0.5}
            for t in (1e-1, 1e-2)
        ] + [{"row": "curve", "solver": solver, "first": 1, "residual": [[0.1, 0.2, 0.3], [0.01, 0.02, 0.03]]}]  # fmt: skip

    for seed, median in ((0, 6), (1, 10)):
        clock = [
            {"row": "clock", "solver": solver, "tolerance": 1e-2, "batch": 4, "total": total, "in_f": [1.0, 1.0],
             "calls": [1, 1], "reached": 0.0 if solver == "tuned Picard" and seed else 1.0}
            for solver, total in (("meta-broyden", [2.0, 2.0]), ("tuned Picard", [4.0, 8.0]), ("tuned Broyden", [9.0, 9.0]))
        ]  # fmt: skip
        spent = solved("meta-broyden", [median] * 3 + [40], [True] * 3 + [False])
        spent[1] |= {"nfe": [median, median, 40, 40], "reached": [True, True, False, False]}
        put(f"meta-broyden-seed{seed}", "meta-broyden", seed, [*spent, *clock])
    put(
        "classical",
        "classical",
        0,
        solved("tuned Picard", [20] * 4, [True] * 4) + solved("tuned Broyden", [8] * 4, [True] * 4),
    )
    text = meta_report.write(tmp_path).read_text()
    assert "| meta-broyden | the best classical | 5.00× (1: 5.00–5.00) |" in text, "a failed median is the budget of 40"
    line = next(line for line in text.split("## fam")[1].splitlines() if line.startswith("| meta-broyden |"))
    assert "| 6 10 (75%) 1.00× | — — (50%) |" in line, "(6 + 10)/2 over Broyden's 8; half failed: no median, no ratio"
    assert "0.38× tuned Picard's (100%), 0.22× tuned Broyden's (100%)" in text, (
        "paired ratios; a rival that fails is none"
    )
    assert "| 1.00 f |" in text
    assert (tmp_path / "fam" / "residual.png").exists()
    split = solved("Peaceman-Rachford", [4] * 4, [True] * 4) + solved("tuned Broyden", [16] * 4, [True] * 4)
    put("classical", "classical", 0, split, "mono")
    put("meta-broyden-seed0", "meta-broyden", 0, solved("meta-broyden", [8] * 4, [True] * 4), "mono")
    text = meta_report.write(tmp_path).read_text()
    assert "| meta-broyden | the best classical | 3.16× (2: 2.00–5.00) |" in text, "√(2 · 5)"
    assert "| meta-broyden | the best that calls f alone | 1.58× (2: 0.50–5.00) |" in text, (
        "Broyden's 16 for its parts' 4"
    )
    assert "| meta-broyden | the same, where it needs 12 or more |" not in text
    assert "| mono | 8 (100%) | 4 (100%) Peaceman-Rachford | **2.00×** |" in text
    assert "of the families (how many): 0.30× to 0.01 (1)." in text, "(0.375 + 0.222)/2, timed on one of two families"
    assert "| fam | 1.00 f / — | 0.9000 |  |  |  | 50% |  |" in text
    put(
        "grouped-seed0",
        "grouped",
        0,
        [row | {"budget": 20} if row["row"] == "solve" else row for row in solved("grouped", [9] * 4, [True] * 4)],
    )
    with pytest.raises(ValueError, match=r"runs of fam cannot stand beside one another: .*budget 20, 4 problems"):
        meta_report.write(tmp_path)
