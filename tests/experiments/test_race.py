"""The race: its rows are what the schema says, what is left out stays out, a tiny one runs, goes on and reports."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import metabroyden as mb
from experiments import meta, race
from experiments.bench import measure, problems, solvers, statistics
from experiments.bench.measure import Rules
from experiments.bench.problems import of_known
from experiments.bench.solvers import Contestant
from experiments.bench.statistics import Field, ratio
from experiments.configs import recipes
from experiments.race import ablation, figures, hyper_deq, report, schema, units
from experiments.race.report import At
from metabroyden.learned.coefficients import StepLSTM, StepSchedule
from metabroyden.learned.layout import Layout
from metabroyden.learned.safeguard import BY_PROGRESS
from metabroyden.meta.fit import make_learned
from metabroyden.meta.orthogonal import make_optimizer
from metabroyden.zoo.testbed import cells
from tests.experiments.test_bench import solve_row


def test_rows_are_checked_when_they_are_written_and_found_again(tmp_path):
    rows = [solve_row(), solve_row("Broyden", seed=2)]
    schema.write(tmp_path / "one.jsonl", rows)
    assert schema.read(tmp_path) == rows


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"row": "slove"}, "one of solve, curve"),
        ({"status": "CX"}, "status"),
        ({"evaluations": [1.5, 2]}, "evaluations/0"),
        ({"status": "C"}, "as long as each other"),
        ({"kind": "other"}, "kind"),
        ({"more": 1}, "more"),
    ],
)
def test_a_row_that_is_none_is_refused_and_nothing_is_written(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        schema.write(tmp_path / "rows.jsonl", [solve_row(), {**solve_row(), **change}])
    assert not list(tmp_path.iterdir())


def test_reading_names_file_and_line_of_what_is_no_row(tmp_path):
    with pytest.raises(ValueError, match="no rows of a race"):
        schema.read(tmp_path)
    (tmp_path / "bad.jsonl").write_text(json.dumps(solve_row()) + '\n{"row": "solve", "fam')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2"):
        schema.read(tmp_path)


def test_two_runs_are_compared_by_sample():
    spent = np.random.default_rng(1).integers(10, 60, size=50)
    before = Field([solve_row("Broyden", spent.tolist(), 50 * "C"), solve_row("Picard", (60,) * 50, 50 * "B")])
    after = Field(
        [solve_row("Broyden", (spent - 3).tolist(), 50 * "C"), solve_row("Picard", (60,) * 50, "C" + 49 * "B")]
    )
    text = report.comparison(after, before)
    assert "2 pairs of a family, a solver and a tolerance; 2 differ." in text
    assert "| 1.00 (1.00–1.00) | 1 : 0 |" in text
    assert ratio(after.must("one", "Broyden", 1e-2), before.must("one", "Broyden", 1e-2)).high < 1, "the pairs show it"
    with pytest.raises(ValueError, match="same samples; one has 50 and 2"):
        report.comparison(after, Field([solve_row("Broyden")]))
    with pytest.raises(ValueError, match="no family"):
        report.comparison(after, Field([solve_row("Newton")]))


def test_a_comparison_is_printed_whole_where_no_terminal_is(tmp_path, capsys):
    for name, spent in (("now", 4), ("then", 8)):
        row = solve_row("a solver of a very long name", 20 * [spent], 20 * "C", family="a family of a very long name")
        schema.write(tmp_path / name / "rows" / "one.jsonl", [row])
    race.run(race.Race(compare=(tmp_path / "now", tmp_path / "then")))
    line = "| a family of a very long name | a solver of a very long name | 0.01 | 0.50 (0.50–0.50) | 0 : 0 |"
    assert line in capsys.readouterr().out


def test_solutions_that_differ_from_the_equilibrium_are_counted_among_those_solved():
    rows = [
        solve_row("meta-broyden", (4, 8, 5, 60), "CCCB", distance=[0.05, 0.2, None, 0.9], seed=0, kind="learned"),
        solve_row("Broyden", (4, 8, 5, 60), "CCCB", distance=[0.05, 0.05, 0.3, 0.9]),
    ]
    field = Field(rows)
    assert report._elsewhere(At(field, 1e-2), "one", "meta-broyden") == 1 / 2  # of two whose equilibrium is known
    assert report._elsewhere(At(field, 1e-2), "one", "Broyden") == pytest.approx(1 / 3)
    nearer = [{**row, "tolerance": 1e-3, "distance": [0.001, 0.02, None, None]} for row in rows]
    assert report._elsewhere(At(Field([*rows, *nearer]), 1e-2), "one", "meta-broyden") == 0, "ill-conditioned, no more"
    unknown = Field([solve_row("Broyden", distance=[None, None])])
    assert np.isnan(report._elsewhere(At(unknown, 1e-2), "one", "Broyden"))


def trained(variant, steps=3):
    """A MetaBroyden after a few steps of Muon that pull at all of its weights."""
    solver = variant.prepared(make_learned("meta-broyden", Layout("vector", (16,)), **variant.options))
    optimizer = make_optimizer(solver, 1e-2, 5e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        sum((p + 1).pow(2).sum() for p in solver.parameters()).backward()
        optimizer.step()
    return solver


@pytest.mark.parametrize("name", ablation.TRAINED)
def test_what_is_left_out_stays_out_while_the_rest_is_trained(name):
    variant = ablation.TRAINED[name]
    solver, whole = trained(variant), trained(ablation.Variant())
    assert (solver.initializer is None) == (name == "no learned start")
    (outward,) = solver.preconditioner.outward.parameters()
    assert bool(outward.any()) == (name != "no P")
    assert isinstance(solver.coefficients, StepLSTM) == (name == "LSTM for table")
    assert isinstance(whole.coefficients, StepSchedule)
    assert variant.differs(whole) == (name != "no dilations"), "a vector's maps have none"


def test_pieces_are_left_out_of_the_whole_without_training():
    problem = cells.blas(4, 16, 3.0)
    solver = make_learned(
        "meta-broyden", Layout("vector", (16,)), learned_steps=40, initializer_width=0, safeguard=BY_PROGRESS
    ).eval()

    def solved(solver):
        options = {"rtol": 1e-5, "max_nfe": 60, "throw": False}
        return mb.solve(problem.f, problem.z0, problem.context, solver=solver, **options)

    assert (solved(solver).trace.phase > 0).any(), "untrained, it hands this cell over"
    assert not (solved(ablation.without_safeguard(solver, 60)).trace.phase > 0).any()
    gated = solved(ablation.without_secants(ablation.without_safeguard(solver, 60), 60))
    picard = solved(mb.Picard())
    assert torch.allclose(gated.z, picard.z, atol=1e-4), "untrained, without secants: Picard's iteration"
    assert not torch.allclose(solved(solver).z, picard.z, atol=1e-4)


def test_hyper_deq_is_counted_and_stopped_as_every_peer():
    problem = cells.blas(6, 16, 0.5)
    held = replace(of_known(problem, "cell"), judge=lambda z, index: z.sum(dim=1))
    peer = hyper_deq.HyperDEQ(hyper_deq._network(16, 16), "untrained")
    one = Contestant("HyperDEQ", "peer", peer, peer.options, 0)
    rows = measure.measure(held, [one], Rules((1e-2,), 40, 6, 2))
    (row,) = (row for row in rows if row["row"] == "solve")
    assert set(row["status"]) == {"C"}
    assert 1 < min(row["evaluations"]) <= max(row["evaluations"]) < 40
    assert max(row["residual"]) <= 1e-2
    assert len(row["seconds"]) == 2
    z, recorder = peer.solve(lambda z: problem.f(z, problem.context), problem.z0, 0.0, 7, condition=problem.context)
    assert recorder.count == 7, "no more calls than the budget"
    assert torch.isfinite(z).all()


def beside_row(part, family, solver, evaluations, kind="classical", seed=None, tolerance=1e-2):
    count = len(evaluations)
    return {
        "row": "solve", "part": part, "family": family, "solver": solver, "kind": kind, "seed": seed, "tolerance": tolerance,
        "budget": 60, "block": 0, "evaluations": evaluations, "status": count * "C",
        "seconds": [{"total": 1.0, "f": None, "solver": 1.0, "bookkeeping": 0.0}],
    }  # fmt: skip


def test_transfer_holds_solvers_against_the_best_classical_one_of_the_family():
    rows = []
    for at in (1e-2, 1e-3):
        rows += [
            beside_row("families", "conv-digits", "tuned Anderson", [20, 20, 20], tolerance=at),
            beside_row("families", "conv-digits", "meta-broyden", [10, 10, 10], "learned", 0, at),
            beside_row("families", "conv-digits", "universal", [15, 15, 15], "learned", 0, at),
            beside_row("outside", "conv-digits, noisy", "tuned Anderson", [40, 40, 40], tolerance=at),
            beside_row("outside", "conv-digits, noisy", "meta-broyden", [10, 10, 10], "learned", 0, at),
            beside_row("outside", "conv-digits, noisy", "universal", [40, 40, 40], "learned", 0, at),
            beside_row("transfer", "conv-digits", "meta-broyden of mlp-digits", [60, 60, 60], "learned", 0, at),
            beside_row("transfer", "conv-digits", "meta-broyden of conv-fashion", [25, 25, 25], "learned", 0, at),
        ]
    parts = {part: Field(rows, part) for part in ("families", "outside", "transfer")}
    names, tested, values = figures.transferred(parts, 1e-2)
    assert names == ["own", "of the twin on other data", "universal"]
    assert tested == ["conv-digits", "conv-digits, noisy"]
    assert np.allclose(values[:, 0], [0.5, 1.25, 0.75])
    assert np.allclose(values[[0, 2], 1], [0.25, 1.0])
    assert np.isnan(values[1, 1])
    _, head, body = report._transfer(parts, 1e-2)
    assert head == ["problem", "MetaBroyden, own", "MetaBroyden, of the twin on other data", "universal"]
    assert body[1] == ["conv-digits, noisy", "0.25", "", "1.00"]


def test_an_lstm_for_the_table_has_no_last_row_that_goes_on(tmp_path):
    usual = meta.Meta(family="conv-digits", runs=tmp_path)
    variants = (ablation.TRAINED[name].options for name in ("no P", "LSTM for table"))
    jobs = [meta.Job(usual, {**options, "damping": 1.0}) for options in variants]
    table, lstm = (job.plan(job.family.tasks(0))[0].options for job in jobs)
    assert (table["schedule_length"], table["learned_steps"]) == (28, 42)
    assert (lstm["schedule_length"], lstm["learned_steps"], lstm["coefficients"]) == (28, 28, "lstm")


def test_a_tiny_race_runs_goes_on_and_reports(tmp_path, capsys, monkeypatch):
    config = race.Race(
        families=("dense-digits",), images=6, rounds=1, budget=30, runs=tmp_path / "runs", results=tmp_path / "results",
        progress=False,
    )  # fmt: skip
    few = {"NORMS": (1.5,), "WIDTHS": (16,), "BUSES": (14,), "CHANGES": {"noisy": problems.noisy}}
    for name, value in few.items():
        monkeypatch.setattr(problems, name, value)
    monkeypatch.setattr(statistics, "RESAMPLES", 50)
    for name, value in {"RATES": (1e-3,), "STEPS": 4, "LOOKS": 2, "POOL": 64}.items():
        monkeypatch.setattr(hyper_deq, name, value)
    place = ("dense-digits", "meta-broyden")
    monkeypatch.setitem(recipes.OWN, place, {**recipes.OWN[place], "steps": 8})
    monkeypatch.setattr(ablation, "TRAINED", {"no P": ablation.TRAINED["no P"]})
    race.run(config)
    (trial,) = config.results.iterdir()
    assert trial.name.startswith("trial-"), "fewer images than the usual ones"
    names = {str(path.relative_to(trial)) for path in trial.rglob("*") if path.is_file()}
    assert {"config.json", "schema.json", "report.md", "rows/dense-digits.jsonl.gz", "rows/cells.jsonl.gz"} <= names
    assert {
        "figures/residual-evaluations.png",
        "figures/residual-evaluations.pdf",
        "figures/profiles.png",
        "figures/paths.png",
    } <= names
    text = (trial / "report.md").read_text()
    assert "python -m experiments race --budget 30 --families dense-digits --images 6 --rounds 1" in text
    rows = schema.read(trial / "rows")
    outside = Field(rows, "outside")
    assert outside.families == ["dense, norm 1.5", "dense, 16 wide", "power flow, 14 buses", "dense-digits, noisy"]
    assert outside.must("power flow, 14 buses", "Broyden", 1e-3).success == 1
    without = Field(rows, "ablation")
    assert {"meta-broyden", "no secants", "no safeguard", "no P", "Broyden"} == set(without.solvers("dense-digits"))
    assert set(Field(rows, "hyper-deq").solvers("dense-digits", "peer")) == {"HyperDEQ", "torchdeq Anderson"}
    assert [row["solver"] for row in rows if row["part"] == "horizon"] == ["meta-broyden", "Broyden"]
    field = Field(rows, "families")
    assert field.families == ["dense-digits"]
    assert {
        "Picard",
        "tuned Anderson",
        "tuned Anderson + start",
        "meta-broyden",
        "universal",
        "torchdeq Broyden",
    } <= set(field.solvers("dense-digits"))
    setting = units.Setting(config, torch.device("cpu"), "0")
    assert units.family(setting, "dense-digits").key in {path.parent.name for path in config.runs.rglob("rows.jsonl")}
    with monkeypatch.context() as patch:  # another universal solver: other work
        changed = Contestant("universal", "learned", mb.load_solver("universal"), "shipped, other", 0)
        patch.setattr(solvers, "universal", lambda: changed)
        key = units.family(setting, "dense-digits").key
    assert key not in {path.parent.name for path in config.runs.rglob("rows.jsonl")}
    then = (trial / "rows" / "dense-digits.jsonl.gz").read_bytes()
    monkeypatch.setattr(units, "_family_rows", lambda *arguments: pytest.fail("finished work was done again"))
    race.run(config)
    assert (trial / "rows" / "dense-digits.jsonl.gz").read_bytes() == then
    capsys.readouterr()
    with pytest.raises(ValueError, match="unknown family 'nets'"):
        race.run(replace(config, families=("nets",)))
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        race.run(replace(config, rounds=0))
