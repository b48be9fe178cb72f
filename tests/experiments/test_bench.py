"""The bench: statistics are right where the answer is known, solvers are measured alike, pages hold what they are given."""

from __future__ import annotations

import base64
import sys
from dataclasses import dataclass, replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import metabroyden as mb
from experiments.bench import batch, check_page, measure, report, runner, solvers
from experiments.bench.measure import Rules
from experiments.bench.options import Options
from experiments.bench.peers import ScipySolver, TorchDEQSolver, XitorchSolver, solve_state
from experiments.bench.problems import HeldOut, double_equilibria, of_known
from experiments.bench.solvers import contestant
from metabroyden.comparison.clock import Stopwatch
from metabroyden.comparison.figures import axes
from metabroyden.comparison.measure import residual_after, residual_by_time
from metabroyden.comparison.statistics import Field, against, paired
from metabroyden.comparison.tables import Table
from metabroyden.learned.layout import Layout
from metabroyden.learned.safeguard import Safeguard
from metabroyden.meta.fit import make_learned
from metabroyden.solver import Phase
from metabroyden.zoo.testbed import cells
from tests.conftest import tanh

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


def test_a_table_of_ratios_has_none_where_the_rival_solves_less_than_half():
    spent = {"easy": ((10, 10), (20, 20), "CC"), "hard": ((10, 10), (60, 60), "BB")}
    rows = [
        solve_row(name, evaluations, letters, family=family, kind=kind)
        for family, (ours, theirs, status) in spent.items()
        for name, evaluations, letters, kind in (("one", ours, "CC", "learned"), ("rival", theirs, status, "classical"))
    ]
    table = against(Field(rows), "", ["one"], "rival", 1e-2, "against")
    assert table.body == [
        ["easy", "10 (100%), 0.50 (0.50–0.50)", "20 (100%) rival"],
        ["hard", "10 (100%)", "60 (0%) rival"],
        ["geometric mean", "0.50 (0.50–0.50)", ""],
    ]


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
    assert field.named("one", "best classical", 1e-2) == "Picard", "as few evaluations, and one sample more"
    difference, won, lost = paired(ours, field.must("one", "Broyden", 1e-2))
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
    assert field.mean_ratio(field.headline(1e-2), "meta-broyden", "best classical", 1e-2).value == 0.25
    assert np.isnan(field.mean_ratio([], "meta-broyden", "Broyden", 1e-2).value)


def test_intervals_of_times_and_differences_see_that_seeds_differ():
    def field(*means):
        rows = [solve_row("Broyden", (40,) * 30, 30 * "C", seconds=(1.0, 1.0, 1.0))]
        for seed, mean in enumerate(means):
            row = solve_row("meta-broyden", (mean,) * 30, 30 * "C", seconds=3 * (mean / 40,), kind="learned", seed=seed)
            rows.append(row)
        return Field(rows)

    alike, apart = field(12, 12, 12), field(8, 8, 20)
    for found in (alike, apart):
        assert paired(*(found.must("one", name, 1e-2) for name in ("meta-broyden", "Broyden")))[0].value == -28
    assert paired(*(alike.must("one", name, 1e-2) for name in ("meta-broyden", "Broyden")))[0][1:] == (-28, -28)
    assert paired(*(apart.must("one", name, 1e-2) for name in ("meta-broyden", "Broyden")))[0].high > -24
    assert alike.ratio("one", "meta-broyden", "Broyden", 1e-2, time=True) == pytest.approx((0.3, 0.3, 0.3))
    assert apart.ratio("one", "meta-broyden", "Broyden", 1e-2, time=True).high == pytest.approx(0.5)


def test_times_are_compared_within_a_round():
    """The machine is ten times slower in the second round: no ratio sees it."""
    rows = [
        solve_row("Broyden", seconds=(2.0, 20.0, 2.0)),
        solve_row("meta-broyden", seconds=(1.0, 10.0, 1.0), kind="learned", seed=0),
    ]
    found = Field(rows).ratio("one", "meta-broyden", "Broyden", 1e-2, time=True)
    assert found == (0.5, 0.5, 0.5)


NAN = float("nan")


def trace() -> mb.Trace:
    """Three samples: one goes down, one up again and stops, one never arrives."""
    residual = torch.tensor([[0.5, 0.5, 0.9], [0.05, 0.08, 0.9], [0.2, NAN, 0.8]])
    nfe = torch.tensor([[1, 1, 1], [2, 2, 2], [3, 0, 5]])
    phase = torch.tensor([[0, 0, 0], [0, 0, 0], [0, -1, 0]], dtype=torch.int8)
    return mb.Trace(residual, nfe, torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64), phase)


def test_evaluations_to_a_tolerance():
    spent, reached = trace().evaluations_to(0.1, 10)
    assert spent.tolist() == [2, 2, 10]
    assert reached.tolist() == [True, True, False]
    assert trace().evaluations_to(0.85, 4)[0].tolist() == [1, 1, 4]  # five evaluations are over that budget


def test_seconds_to_a_tolerance_are_those_of_the_first_time():
    assert batch.seconds_to(trace(), 0.1).tolist() == [0.2, 0.2, np.inf]


def test_whole_batches_are_clocked_against_a_reference_and_parts_against_f():
    problem = tanh(batch=20, n=10, gain=1.2)
    held = HeldOut(problem.f, problem.z0, problem.x, lambda z, index: torch.zeros(len(index)), name="tanh")
    lstm = make_learned("grouped", Layout("vector", (10,))).double()
    racers = solvers.contestants(lstm=lstm, Broyden=mb.Broyden()) + solvers.torchdeq("Broyden")
    options = {"tolerance": 1e-2, "budget": 30, "repeats": 2, "reference": "Broyden"}
    rows = {row["solver"]: row for row in batch.clock_rows(held, racers, measure.stamp_of(held), **options)}
    assert set(rows) == {"lstm", "Broyden", "torchdeq Broyden"}
    assert rows["Broyden"]["ratios"] == [1, 1, 1]
    assert all(row["seconds"] == sorted(row["seconds"]) and 0 < row["outside_f"] < 1 for row in rows.values())
    parts = {(row["solver"], row["part"]): row["f_equivalents"] for row in batch.part_rows(held, racers[:1], repeats=2)}
    assert parts["f", "f"] == 1
    assert set(parts) == {("f", "f"), *(("lstm", part) for part in ("start", "init", "step"))}


def test_residual_after_so_many_evaluations_is_the_best_so_far():
    best = residual_after(trace(), 5)
    np.testing.assert_allclose(best[:, 0], [0.5, 0.05, 0.05, 0.05, 0.05], rtol=1e-6)
    np.testing.assert_allclose(best[:, 2], [0.9, 0.9, 0.9, 0.9, 0.8], rtol=1e-6)
    seconds, median = residual_by_time(trace())
    np.testing.assert_allclose(median, [0.5, 0.08, 0.08], rtol=1e-6)
    assert seconds.tolist() == [0.1, 0.2, 0.4]


@pytest.mark.parametrize("solver", [mb.Anderson(), mb.Broyden()], ids=str)
def test_evaluations_read_off_one_long_solve_are_those_of_a_solve_to_that_tolerance(solver):
    problem = tanh(batch=9, n=10, gain=1.3)
    long = mb.solve(problem.f, problem.z0, problem.x, solver=solver, rtol=1e-9, max_nfe=60, throw=False)
    for tolerance in (1e-1, 1e-3, 1e-6):
        short = mb.solve(problem.f, problem.z0, problem.x, solver=solver, rtol=tolerance, max_nfe=60, throw=False)
        spent, _ = long.trace.evaluations_to(tolerance, 60)
        assert spent.tolist() == short.nfe.tolist()


def held_linear() -> tuple[HeldOut, torch.nn.Module, torch.Tensor]:
    """z = Wz + x in float32, a module, and its float64 solution."""
    cell = torch.nn.Linear(6, 6, bias=False)
    matrix = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).Q
    cell.weight.data = 0.7 * matrix

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

    return HeldOut(module, torch.zeros(10, 6), x, judge, name="linear"), module, star


def test_double_equilibria_are_found_in_float64_and_what_is_not_found_is_not_known():
    held, cell, wanted = held_linear()
    star, known = double_equilibria(cell, held)
    assert known.all()
    torch.testing.assert_close(star, wanted, rtol=1e-7, atol=1e-7)
    assert next(cell.parameters()).dtype == torch.float32, "the cell itself stays as it is"
    _, known = double_equilibria(cell, held, (mb.Picard(),), max_nfe=3)
    assert not known.any()


def test_rows_count_as_solve_does_and_measure_what_a_tolerance_gives():
    held, cell, star = held_linear()
    held = replace(held, star=star, known=torch.arange(10) < 8)
    rows = measure.measure(held, [contestant("Picard", mb.Picard())], Rules((1e-1, 1e-3, 1e-9), 30))
    loose, tight, never, curve = rows
    with torch.no_grad():
        for row in (loose, tight):
            solution = mb.solve(cell, held.z0, held.x, solver=mb.Picard(), rtol=row["tolerance"], max_nfe=30)
            assert row["evaluations"] == solution.nfe.tolist()
            apart = (solution.z.double() - star).norm(dim=1) / star.norm(dim=1)
            np.testing.assert_allclose(row["distance"][:8], apart[:8], rtol=1e-2)
            assert row["distance"][8:] == [None, None], "where z* is not known there is no distance"
            assert row["score"] == held.judge(solution.z, torch.arange(10)).tolist()
    assert np.mean(loose["score"]) < np.mean(tight["score"]) == 1
    assert (never["evaluations"], never["status"], never["seconds"]) == ([30] * 10, 10 * "B", [])
    assert curve["evaluations"] == list(range(1, 31))
    assert curve["median"][0] == pytest.approx(1.0), "f(0) − 0 over f(0)"


class Broken(Safeguard):
    """Hands over to something that leads nowhere, and promises Broyden."""

    def phases(self, solver, initial=None):
        return [super().phases(solver, initial)[0], Phase(mb.Picard(1e-6))]


def test_horizon_rows_count_what_the_fallback_would_have_solved():
    """Steps that lead nowhere are handed over after `patience`: samples are lost, but none given what those steps cost."""
    held, _, _ = held_linear()
    options = {
        "safeguard": Safeguard(horizon=None, patience=8, progress=0.5),
        "initializer_width": 0,
        "learned_steps": 10_000,
    }
    solver = make_learned("meta-broyden", Layout("vector", (6,)), conditioning="initial_value", **options)
    fallback = solver.config.safeguard.fallback()
    needed = int(mb.solve(held.f, held.z0, held.x, solver=fallback, rtol=1e-3).nfe.max())
    with torch.no_grad():
        solver.coefficients.step_size.fill_(0)

    def counted():
        one = contestant("meta-broyden", solver)
        return measure.horizon_rows(held, one, measure.stamp_of(held), steps=needed, tolerances=(1e-3,))

    (row,) = counted()
    assert row["samples"] == row["fallback"] == row["triggered"] == 10
    assert row["lost"] > 0 == row["broken"]
    assert row["lost"] + row["learned"] == 10
    solver.config = replace(solver.config, safeguard=Broken(horizon=None, patience=8, progress=0.5))
    (row,) = counted()
    assert row["broken"] == 10


@pytest.mark.parametrize("name", ["anderson", "broyden", "fixed_point_iter"])
def test_what_a_peer_measured_is_not_lost_when_it_writes_over_its_points(name):
    p = tanh(batch=20, n=10, gain=1.2)
    points: list[torch.Tensor] = []

    def f(z, x):
        points.append(z.clone())
        return p.f(z, x)

    trace = solve_state(TorchDEQSolver(name), f, p.z0, p.x, 1e-6, 30)[1].trace()
    truth = torch.stack([mb.relative_residual(z, p.f(z, p.x)) for z in points])
    torch.testing.assert_close(trace.residual, truth)
    assert (trace.seconds.diff() > 0).all()


@pytest.mark.parametrize(
    "peer",
    [XitorchSolver("broyden1", (("alpha", -1.0),)), *map(ScipySolver, ("broyden1", "anderson", "krylov", "hybr"))],
    ids=str,
)
def test_other_peers_stop_by_our_rule_and_within_our_budget(peer):
    p = tanh(batch=20, n=10, gain=1.2)
    one = isinstance(peer, ScipySolver)
    z0, x = (p.z0[:1], p.x[:1]) if one else (p.z0, p.x)
    count = 0

    def f(z):
        nonlocal count
        count += 1
        return p.f(z, x)

    _, recorder = peer.solve(f, z0, 1e-6, 80)
    trace = recorder.trace()
    assert count == recorder.count == len(trace.residual) <= 80
    reached = (trace.residual <= 1e-6).all(dim=1)
    assert reached[-1]
    assert not reached[:-1].any()
    _, short = peer.solve(f, z0, 1e-12, 5)
    assert short.count == 5


def held_out():
    problem = cells.blas(12, 16, 0.8)
    return replace(of_known(problem, "cell"), judge=lambda z, index: z.sum(dim=1)), problem


def test_contestants_are_measured_alike_and_times_add_up():
    held, problem = held_out()
    star = mb.solve(problem.f, problem.z0, problem.context, solver=mb.Broyden(60), rtol=1e-6, max_nfe=60).z.double()  # type: ignore[union-attr]
    held = replace(held, star=star, known=torch.ones(12, dtype=torch.bool))
    entries = [
        contestant("Broyden", mb.Broyden()),
        contestant("torchdeq Broyden", TorchDEQSolver("broyden")),
        contestant("universal", mb.load_solver("universal"), 0),
    ]
    assert [one.kind for one in entries] == ["classical", "peer", "learned"]
    rules = Rules((1e-1, 1e-3), 30, 5, 2, (1e-3,), weighed=True)
    rows = measure.measure(held, entries, rules)
    solves = [row for row in rows if row["row"] == "solve"]
    assert len(solves) == 3 * 2 * 3, "solvers, tolerances, blocks of five, five and two"
    assert [len(row["seconds"]) for row in solves] == 3 * (3 * [1] + 3 * [2])
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
    paces = measure.pace_rows(held, [(entries[0], 4, True), (entries[0], 8, False)], rules, measure.stamp_of(held))
    assert [len(row["seconds"]) for row in paces] == [2, 2]


def test_a_peer_that_breaks_a_state_fails_on_that_sample_alone():
    held, _ = held_out()

    class Breaking(TorchDEQSolver):
        def solve(self, *arguments, **options):
            z, recorder = super().solve(*arguments, **options)
            z[3] = torch.nan
            return z, recorder

    held = replace(held, star=torch.ones(12, 16).double(), known=torch.ones(12, dtype=torch.bool))
    row, _ = measure.measure(held, [contestant("torchdeq Broyden", Breaking("broyden"))], Rules((1e-3,), 30))
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
    found = {one.name: one for one in solvers.peers(held, 30)}
    assert set(found) == {"torchdeq Broyden", "tuned torchdeq Broyden", "torchdeq Anderson", "tuned torchdeq Anderson"}
    scores = {name: solvers.peer_score(one.solver, held, 30) for name, one in found.items()}
    assert scores["tuned torchdeq Anderson"] <= scores["torchdeq Anderson"] + 1e-9
    assert scores["tuned torchdeq Broyden"] <= scores["torchdeq Broyden"] + 1e-9


def test_their_broyden_needs_what_ours_does_within_one_evaluation():
    known = tanh(batch=8, dtype=torch.float32)
    z, recorder = solve_state(TorchDEQSolver("broyden"), known.f, known.z0, known.x, 1e-4, 40)
    theirs, reached = recorder.trace().evaluations_to(1e-4, 40)
    assert reached.all()
    assert (mb.relative_residual(z, known.f(z, known.x)) <= 1e-4).all()
    ours = mb.solve(known.f, known.z0, known.x, solver=mb.Broyden(memory=40), rtol=1e-4, max_nfe=40)
    assert np.abs(theirs - ours.trace.evaluations_to(1e-4, 40)[0]).max() <= 1


def test_there_are_no_statistics_without_rows():
    with pytest.raises(ValueError, match="no solves among the rows of part 'race'"):
        Field([], "race")


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
    figure, place = axes()
    place.plot([1, 2])
    figure.savefig(picture)
    body = [["b", "10 (100%)"], ["a", "9"], ["<c>", ""], ["**d**", "1e-3"]]
    table = Table("A table", ["name", "count"], body)
    path = report.write_page(tmp_path, "Race", ["Made by `x < y`.", picture, table])
    text = path.read_text()
    assert "http" not in text.replace("http-equiv", ""), "nothing is loaded from elsewhere"
    assert "&lt;c&gt;" in text
    assert "<strong>d</strong>" in text
    tags = Tags(text)
    assert not tags.open
    assert tags.names("table", "th", "button", "td") == ["table", *2 * ["th", "button"], *8 * ["td"]]
    shown = next(attributes["src"] for tag, attributes in tags.found if tag == "img" and "src" in attributes)
    assert base64.b64decode(shown.removeprefix("data:image/png;base64,")) == picture.read_bytes()
    ids = {attributes["id"] for _, attributes in tags.found if "id" in attributes}
    assert ids == {"zoom", "section-1"}, "what the script looks for, and the table's heading"


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


def test_a_report_holds_its_sections_and_what_a_person_concluded(tmp_path):
    (tmp_path / "conclusion.md").write_text("It is faster.\n")
    table = Table("A table", ["name"], [["a"]])
    text = report.write(
        tmp_path, "Title", ["Words.", "", table, Table("None", ["x"], []), tmp_path / "f" / "a.png"]
    ).read_text()
    assert text == "# Title\n\nIt is faster.\n\nWords.\n\n## A table\n\n| name |\n| --- |\n| a |\n\n![a](f/a.png)\n"


@dataclass(frozen=True)
class Counted(Options, command="count"):
    """Options of an experiment."""

    count: int = 3
    family: str = "one"
    some_names: tuple[str, ...] = ("a",)
    widths: bool = True


def test_a_run_keeps_units_sends_trials_aside_and_starts_anew_where_asked(tmp_path):
    config = Counted(results=tmp_path / "results", runs=tmp_path / "runs", progress=False)
    made: list[int] = []

    def rows(config, **options):
        job = runner.Run(config, free=("family",), shared=(), **options)
        job.publish(job.unit("one", lambda: made.append(1) or [{"row": "solve", "value": 0.1}]))
        return job

    first = rows(config)
    assert first.folder == tmp_path / "results"
    assert runner.read_rows(first.folder / "rows.jsonl") == [{"row": "solve", "value": 0.1}], "found though compressed"
    assert report.read_config(first.folder)["command"] == "python -m experiments count"
    assert rows(config).work == first.work
    assert len(made) == 1, "what is there is read"
    other = rows(replace(config, family="two"))
    assert other.folder == first.folder, "a free option makes no trial"
    assert other.work != first.work, "but other work"
    trial = rows(replace(config, count=4))
    assert trial.folder.name.startswith("trial-")
    command = rows(replace(config, some_names=("a", "b c"), widths=False), always="--family one").described()["command"]
    assert command == "python -m experiments count --family one --some-names a 'b c' --no-widths"
    assert [path.name for path in runner.row_files(tmp_path / "results", "*/rows.jsonl")] == []
    rows(config, inputs=["another model"])
    rows(replace(config, overwrite=True))
    assert len(made) == 6
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        runner.at_least_one(replace(config, count=0), "count")
