"""The race: its rows are what the schema says, its statistics are right where the answer is known, a tiny one runs."""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import metabroyden as mb
from experiments import meta, race
from experiments.bench import check_page
from experiments.bench.peers import TorchDEQSolver
from experiments.legacy.equilibria import HeldOut
from experiments.legacy.plots import plt
from experiments.legacy.race import (
    ablation,
    contestants,
    hyper_deq,
    measure,
    page,
    report,
    schema,
    units,
)
from experiments.legacy.race.contestants import Contestant
from experiments.legacy.race.statistics import Field, compared
from experiments.legacy.race.units import FamilyUnit, Settings
from experiments.legacy.stopwatch import Stopwatch
from metabroyden.learned.layout import Layout
from metabroyden.meta.fit import make_learned
from metabroyden.zoo.testbed import cells

STAMP = {"part": "families", "kind": "classical", "seed": None, "config": "0123abcd", "commit": "here"}


def solve_row(solver="Picard", evaluations=(4, 8), status="CC", seconds=(1.0,), **change):
    count = len(evaluations)
    laps = [{"total": total, "f": 0.5, "solver": 0.1, "bookkeeping": total - 0.6} for total in seconds]
    return {
        "row": "solve", "family": "one", "solver": solver, **STAMP, "options": "", "tolerance": 1e-2, "budget": 60,
        "block": 0, "evaluations": list(evaluations), "residual": count * [1e-3], "status": status,
        "distance": count * [1e-3], "score": count * [1.0], "agrees": count * [None],
        "handed_over": 0, "seconds": laps, "peak_bytes": None, **change,
    }  # fmt: skip


# --- the schema


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


# --- statistics


def test_medians_count_failures_as_the_budget_and_ratios_are_of_medians():
    rows = [
        solve_row("Broyden", (20, 30, 60), "CCB"),
        solve_row("Picard", (20, 30, 60), "CCC"),
        solve_row("meta-broyden", (10, 15, 20), "CCC", kind="learned", seed=0),
        solve_row("meta-broyden", (10, 15, 60), "CCB", kind="learned", seed=1),
    ]
    field = Field(rows)
    ours = field.must("one", "meta-broyden", 1e-2)
    assert ours.evaluations.shape == (2, 3)
    assert ours.median == 15
    assert ours.success == pytest.approx(5 / 6)
    assert ours.within(15) == pytest.approx(4 / 6)
    assert field.ratio("one", "meta-broyden", "Broyden", 1e-2).value == 0.5
    assert field.best("one", 1e-2) == "Picard", "as few evaluations, and one sample more"
    difference, won, lost = field.paired("one", "meta-broyden", "Broyden", 1e-2)
    assert difference.value == pytest.approx(np.mean([10 - 20, 15 - 30, 40 - 60]))
    assert (won, lost) == (0, 0), "a sample that half of the seeds solve is not solved"


def test_intervals_hold_the_truth_as_often_as_they_should():
    """Of ratios of medians of two known distributions, samples paired: in 95% of 200 trials, less three standard errors."""
    generator, held = np.random.default_rng(0), 0
    for _ in range(200):
        hardness = generator.exponential(size=80)
        theirs = np.ceil(40 + 10 * hardness + generator.normal(size=80)).astype(int)
        ours = np.ceil(20 + 5 * hardness + generator.normal(size=80)).astype(int)
        field = Field([solve_row("Broyden", theirs.tolist(), 80 * "C"), solve_row("Picard", ours.tolist(), 80 * "C")])
        found = field.ratio("one", "Picard", "Broyden", 1e-2)
        held += found.low <= 0.5 * (1 + 0.5 / 46.9) * 1.0 <= found.high
    assert held >= 200 * (0.95 - 3 * (0.95 * 0.05 / 200) ** 0.5)
    assert found.high - found.low < 0.1, "and are no wider than that takes"


def test_means_over_families_are_geometric_and_headline_families_come_from_validation():
    rows = []
    for family, ours, theirs in (("one", 5, 20), ("two", 10, 10)):
        rows += [
            solve_row("Broyden", (theirs,) * 9, 9 * "C", family=family),
            solve_row("meta-broyden", (ours,) * 9, 9 * "C", family=family, kind="learned", seed=0),
            {"row": "tuned", **STAMP, "family": family, "solver": "Broyden", "options": "", "tolerance": 1e-2,
             "median": 13.0 if family == "one" else 11.0, "success": 1.0},
        ]  # fmt: skip
    field = Field(rows)
    assert field.headline(1e-2) == ["one"]
    assert field.mean_ratio(field.families, "meta-broyden", "Broyden", 1e-2).value == pytest.approx(0.5)
    assert field.mean_ratio(field.headline(1e-2), "meta-broyden", field_best(field), 1e-2).value == 0.25
    assert np.isnan(field.mean_ratio([], "meta-broyden", "Broyden", 1e-2).value)


def test_two_runs_are_compared_by_sample():
    spent = np.random.default_rng(1).integers(10, 60, size=50)
    before = Field([solve_row("Broyden", spent.tolist(), 50 * "C"), solve_row("Picard", (60,) * 50, 50 * "B")])
    after = Field(
        [solve_row("Broyden", (spent - 3).tolist(), 50 * "C"), solve_row("Picard", (60,) * 50, "C" + 49 * "B")]
    )
    (broyden, picard) = compared(after, before)
    assert broyden[:3] == ("one", "Broyden", 1e-2)
    assert broyden[3].high < 1, "three evaluations fewer on every sample: the pairs show it"
    assert picard[4:] == (1, 0)
    assert "| 1.00 (1.00–1.00) | 1 : 0 |" in report.comparison(after, before)
    with pytest.raises(ValueError, match="same samples; one has 50 and 2"):
        compared(after, Field([solve_row("Broyden")]))
    with pytest.raises(ValueError, match="no family"):
        compared(after, Field([solve_row("Newton")]))


# --- the page


class Tags(HTMLParser):
    """Start tags with their attributes in order; AssertionError where an end tag closes another element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def names(self, *wanted: str) -> list[str]:
        return [tag for tag, _ in self.found if tag in wanted]


def test_the_page_is_one_file_with_every_table_and_figure(tmp_path):
    picture = tmp_path / "one.png"
    figure, axes = plt.subplots()
    axes.plot([1, 2])
    figure.savefig(picture)
    plt.close(figure)
    body = [["b", "10 (100%)"], ["a", "9"], ["<c>", ""], ["**d**", "1e-3"]]
    path = page.write(tmp_path / "report.html", ["Made by `x < y`."], [picture], [("A table", ["name", "count"], body)])
    text = path.read_text()
    assert "http" not in text.replace("http-equiv", ""), "nothing is loaded from elsewhere"
    assert "&lt;c&gt;" in text
    assert "<strong>d</strong>" in text
    tags = Tags(text)
    assert not tags.open
    assert tags.names("table", "th", "button", "td") == ["table", *2 * ["th", "button"], *8 * ["td"]]
    shown = next(attributes["src"] for tag, attributes in tags.found if tag == "img" and "src" in attributes)
    assert base64.b64decode(shown.removeprefix("data:image/png;base64,")) == picture.read_bytes()
    assert {"zoom"} == {attributes["id"] for _, attributes in tags.found if "id" in attributes}, (
        "what the script looks for"
    )


@pytest.mark.parametrize(
    ("said", "code"), [("checked 1 tables, 1 figures", 0), ("failed: not sorted: count", 1), (None, None)]
)
def test_make_check_page_reports_what_the_page_found_when_it_tried_itself_in_a_browser(
    tmp_path, monkeypatch, capsys, said, code
):
    """A script stands for the browser: it shows the page asked for with the words the page would have added."""
    browser, report_page = tmp_path / "chromium", tmp_path / "report.html"
    words = "no page" if said is None else f'<pre id="checked">{said}</pre>'
    browser.write_text(
        f"#!/bin/sh\nfor last; do :; done\n[ \"$last\" = 'file://{report_page}#check' ] && echo '{words}'\n"
    )
    browser.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(sys, "argv", ["check_page", str(report_page)])
    if said is None:
        with pytest.raises(RuntimeError, match="did not get to the end"):
            check_page.main()
    else:
        assert check_page.main() == code
        assert said in capsys.readouterr().out


def test_make_check_page_says_what_to_install_where_there_is_no_browser(monkeypatch, capsys):
    monkeypatch.setattr(check_page.shutil, "which", lambda name: None)
    assert check_page.main() == 2
    assert "apt-get install chromium" in capsys.readouterr().err


def field_best(field):
    return lambda family: field.best(family, 1e-2)


def test_intervals_of_times_and_differences_see_that_seeds_differ():
    def field(*means):
        rows = [solve_row("Broyden", (40,) * 30, 30 * "C", seconds=(1.0, 1.0, 1.0))]
        for seed, mean in enumerate(means):
            row = solve_row("meta-broyden", (mean,) * 30, 30 * "C", seconds=3 * (mean / 40,), kind="learned", seed=seed)
            rows.append(row)
        return Field(rows)

    alike, apart = field(12, 12, 12), field(8, 8, 20)
    for found in (alike, apart):
        assert found.paired("one", "meta-broyden", "Broyden", 1e-2)[0].value == -28
    assert alike.paired("one", "meta-broyden", "Broyden", 1e-2)[0][1:] == (-28, -28)
    assert apart.paired("one", "meta-broyden", "Broyden", 1e-2)[0].high > -24
    assert alike.time_ratio("one", "meta-broyden", "Broyden", 1e-2) == pytest.approx((0.3, 0.3, 0.3))
    assert apart.time_ratio("one", "meta-broyden", "Broyden", 1e-2).high == pytest.approx(0.5)


def test_a_comparison_is_printed_whole_where_no_terminal_is(tmp_path, capsys):
    for name, spent in (("now", 4), ("then", 8)):
        row = solve_row("a solver of a very long name", 20 * [spent], 20 * "C", family="a family of a very long name")
        schema.write(tmp_path / name / "rows" / "one.jsonl", [row])
    race.run(race.Race(compare=(tmp_path / "now", tmp_path / "then")))
    line = "| a family of a very long name | a solver of a very long name | 0.01 | 0.50 (0.50–0.50) | 0 : 0 |"
    assert line in capsys.readouterr().out


def test_times_are_compared_within_a_round():
    """The machine is ten times slower in the second round: no ratio sees it."""
    rows = [
        solve_row("Broyden", seconds=(2.0, 20.0, 2.0)),
        solve_row("meta-broyden", seconds=(1.0, 10.0, 1.0), kind="learned", seed=0),
    ]
    found = Field(rows).time_ratio("one", "meta-broyden", "Broyden", 1e-2)
    assert found == (0.5, 0.5, 0.5)


# --- measuring


def held_out():
    problem = cells.blas(12, 16, 0.8)
    return HeldOut(problem.f, problem.z0, problem.context, lambda z, index: z.sum(dim=1)), problem


def test_contestants_are_measured_alike_and_times_add_up():
    held, problem = held_out()
    star = mb.solve(problem.f, problem.z0, problem.context, solver=mb.Broyden(60), rtol=1e-6, max_nfe=60).z.double()  # type: ignore[union-attr]
    entries = [
        Contestant("Broyden", "classical", mb.Broyden(), "Broyden()"),
        Contestant("torchdeq Broyden", "peer", TorchDEQSolver("broyden"), "torchdeq"),
        Contestant("universal", "learned", mb.load_solver("universal"), "shipped", 0),
    ]
    rules = measure.Rules((1e-1, 1e-3), (1e-3,), 30, 5, 2)
    stamps = {"family": "cell", "part": "families", "config": "0123abcd", "commit": "here"}

    def stamp(one):
        return {**stamps, "solver": one.name, "kind": one.kind, "seed": one.seed}

    rows = [
        schema.check(row)
        for row in measure.solve_rows(entries, held, star, torch.ones(12, dtype=torch.bool), rules, stamp)
    ]
    solves = [row for row in rows if row["row"] == "solve"]
    assert len(solves) == 3 * 2 * 3, "solvers, tolerances, blocks of five, five and two"
    assert {len(row["seconds"]) for row in solves if row["tolerance"] == 1e-3} == {2}
    for row in solves:
        for lap in row["seconds"]:
            assert lap["total"] > lap["f"] > 0
            assert lap["solver"] > 0
            assert lap["bookkeeping"] >= 0
        if row["tolerance"] == 1e-3:
            assert max(row["distance"]) < 0.05
            assert set(row["status"]) == {"C"}
    own = mb.solve(problem.f, problem.z0, problem.context, solver=mb.Broyden(), rtol=1e-3, max_nfe=30)
    found = Field(rows).must("cell", "Broyden", 1e-3)
    assert found.evaluations[0].tolist() == own.nfe.tolist(), "blocks do not change what a sample costs"
    assert all((row["peak_bytes"] or 0) > 0 for row in solves if row["block"] == 0 and row["tolerance"] == 1e-3)
    paces = measure.pace_rows([(entries[0], 4, True), (entries[0], 8, False)], held, rules, stamp)
    assert [len(schema.check(row)["seconds"]) for row in paces] == [2, 2]


def test_a_peer_that_breaks_a_state_fails_on_that_sample_alone():
    held, _ = held_out()
    stamps = {"family": "cell", "part": "families", "config": "0123abcd", "commit": "here"}

    class Breaking(TorchDEQSolver):
        def solve(self, *arguments, **options):
            z, recorder = super().solve(*arguments, **options)
            z[3] = torch.nan
            return z, recorder

    def stamp(one):
        return {**stamps, "solver": one.name, "kind": one.kind, "seed": one.seed}

    known = torch.ones(12, dtype=torch.bool)
    rules = measure.Rules((1e-3,), (1e-3,), 30, 12, 1, weighed=False)
    breaking = Contestant("torchdeq Broyden", "peer", Breaking("broyden"), "torchdeq")
    row, _ = measure.solve_rows([breaking], held, torch.ones(12, 16).double(), known, rules, stamp)
    schema.check(row)
    assert [number for number, value in enumerate(row["score"]) if value is None] == [3]
    assert [number for number, value in enumerate(row["distance"]) if value is None] == [3]


def test_a_stopwatch_sees_the_solvers_a_safeguard_hands_over_to():
    problem = cells.blas(4, 8, 3.0)
    solver = make_learned("grouped", Layout("vector", (8,)), seed=0)
    watch = Stopwatch(torch.device("cpu"))
    found = mb.solve(
        watch.of_f(problem.f), problem.z0, problem.context, solver=watch.of_solver(solver), rtol=1e-4, max_nfe=200,
        throw=False,
    )  # fmt: skip
    plain = mb.solve(problem.f, problem.z0, problem.context, solver=solver, rtol=1e-4, max_nfe=200, throw=False)
    assert found.nfe.tolist() == plain.nfe.tolist()
    assert (found.trace.phase > 0).any(), "the untrained solver hands this cell over"
    assert watch.calls == len(found.trace.residual)


def test_the_tuned_peer_is_the_best_of_its_grid():
    held, _ = held_out()
    found = {one.name: one for one in contestants.peers(held, 30)}
    assert set(found) == {"torchdeq Broyden", "tuned torchdeq Broyden", "torchdeq Anderson", "tuned torchdeq Anderson"}
    scores = {name: contestants.peer_score(one.solver, held, 30) for name, one in found.items()}
    assert scores["tuned torchdeq Anderson"] <= scores["torchdeq Anderson"] + 1e-9
    assert scores["tuned torchdeq Broyden"] <= scores["torchdeq Broyden"] + 1e-9


# --- the experiment


def test_a_tiny_race_runs_goes_on_and_reports(tmp_path, capsys, monkeypatch):
    config = race.Race(
        families=("dense-digits",), images=6, rounds=1, budget=30, runs=tmp_path / "runs", results=tmp_path / "results",
        progress=False,
    )  # fmt: skip
    few = {"NORMS": (1.5,), "WIDTHS": (16,), "BUSES": (14,), "CHANGES": {"noisy": units.CHANGES["noisy"]}}
    for name, value in few.items():
        monkeypatch.setattr(units, name, value)
    for name, value in {"RATES": (1e-3,), "STEPS": 4, "LOOKS": 2, "POOL": 64}.items():
        monkeypatch.setattr(hyper_deq, name, value)
    place = ("dense-digits", "meta-broyden")
    monkeypatch.setitem(meta.OWN, place, {**meta.OWN[place], "steps": 8})
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
    assert "python -m experiments race --families dense-digits --images 6 --budget 30 --rounds 1" in text
    rows = schema.read(trial / "rows")
    outside = Field(rows, "outside")
    assert outside.families == ["dense, norm 1.5", "dense, 16 wide", "power flow, 14 buses", "dense-digits, noisy"]
    assert outside.must("power flow, 14 buses", "Broyden", 1e-3).success == 1
    without = Field(rows, "ablation")
    assert {"meta-broyden", "no secants", "no safeguard", "no P", "Broyden"} == set(without.solvers("dense-digits"))
    assert set(Field(rows, "hyper-deq").solvers("dense-digits", "peer")) == {"HyperDEQ", "torchdeq Anderson"}
    assert [row["solver"] for row in rows if row["part"] == "horizon"] == ["meta-broyden", "Broyden"]
    field = Field(rows)
    assert field.families == ["dense-digits"]
    assert {
        "Picard",
        "tuned Anderson",
        "tuned Anderson + start",
        "meta-broyden",
        "universal",
        "torchdeq Broyden",
    } <= set(field.solvers("dense-digits"))
    with monkeypatch.context() as patch:  # another universal solver: other work
        before = {path.parent.name for path in config.runs.rglob("rows.jsonl.gz")}
        changed = Contestant("universal", "learned", mb.load_solver("universal"), "shipped, other", 0)
        patch.setattr(contestants, "universal", lambda: changed)
        unit = FamilyUnit(
            Settings(6, 4, 30, 1, config.models, config.meta, torch.device("cpu"), "0", False), "dense-digits"
        )
        assert unit.key not in before
    then = (trial / "rows" / "dense-digits.jsonl.gz").read_bytes()
    monkeypatch.setattr(FamilyUnit, "rows", lambda self, work: pytest.fail("finished work was done again"))
    race.run(config)
    assert (trial / "rows" / "dense-digits.jsonl.gz").read_bytes() == then
    capsys.readouterr()
    with pytest.raises(ValueError, match="unknown family 'nets'"):
        race.run(replace(config, families=("nets",)))
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        race.run(replace(config, rounds=0))


def test_solutions_that_differ_from_the_equilibrium_are_counted_among_those_solved():
    rows = [
        solve_row("meta-broyden", (4, 8, 5, 60), "CCCB", distance=[0.05, 0.2, None, 0.9], seed=0, kind="learned"),
        solve_row("Broyden", (4, 8, 5, 60), "CCCB", distance=[0.05, 0.05, 0.3, 0.9]),
    ]
    field = Field(rows)
    assert report._elsewhere(field, "one", "meta-broyden", 1e-2) == 1 / 2  # of two whose equilibrium is known
    assert report._elsewhere(field, "one", "Broyden", 1e-2) == pytest.approx(1 / 3)
    nearer = [{**row, "tolerance": 1e-3, "distance": [0.001, 0.02, None, None]} for row in rows]
    assert report._elsewhere(Field([*rows, *nearer]), "one", "meta-broyden", 1e-2) == 0, "ill-conditioned, no more"
    unknown = Field([solve_row("Broyden", distance=[None, None])])
    assert np.isnan(report._elsewhere(unknown, "one", "Broyden", 1e-2))
