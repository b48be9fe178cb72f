"""The race: its rows are what the schema says, what is left out stays out, a tiny one runs, goes on and reports."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import metabroyden as mb
from experiments import race
from experiments.bench import measure, problems, solvers
from experiments.bench.measure import Rules
from experiments.bench.problems import of_known
from experiments.bench.runner import read_rows, write_rows
from experiments.bench.solvers import Contestant, Peer
from experiments.race import beyond, fitted, hyper_deq, report, robustness, schema, units
from metabroyden.comparison import statistics
from metabroyden.comparison.statistics import Field, ratio
from metabroyden.comparison.tables import chosen
from metabroyden.zoo.testbed import cells
from tests.experiments.test_bench import solve_row


def test_rows_are_found_again_and_reading_names_file_and_line_of_what_is_none(tmp_path):
    with pytest.raises(ValueError, match="no rows of a race"):
        schema.read(tmp_path)
    rows = [solve_row(), solve_row("Broyden", seed=2)]
    write_rows(tmp_path / "one.jsonl.gz", map(schema.check, rows), strict=True)
    assert schema.read(tmp_path) == rows
    (tmp_path / "two.jsonl").write_text('{"row": "solve"}\n{"row": "solve", "fam')
    with pytest.raises(ValueError, match=r"two\.jsonl, line 2"):
        schema.read(tmp_path)


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
def test_a_row_that_is_none_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        schema.check({**solve_row(), **change})


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
    with pytest.raises(ValueError, match="same budget, got 60 and 30"):
        report.comparison(after, Field([solve_row("Broyden", budget=30)]))


def test_a_comparison_is_printed_whole_where_no_terminal_is(tmp_path, capsys):
    for name, spent in (("now", 4), ("then", 8)):
        row = solve_row("a solver of a very long name", 20 * [spent], 20 * "C", family="a family of a very long name")
        write_rows(tmp_path / name / "rows" / "one.jsonl", [row])
    race.run(race.Race(compare=(tmp_path / "now", tmp_path / "then")))
    line = "| a family of a very long name | a solver of a very long name | 0.01 | 0.50 (0.50–0.50) | 0 : 0 |"
    assert line in capsys.readouterr().out


def test_solutions_that_differ_from_the_equilibrium_are_counted_among_those_solved():
    rows = [
        solve_row("meta-broyden", (4, 8, 5, 60), "CCCB", distance=[0.05, 0.2, None, 0.9], seed=0, kind="learned"),
        solve_row("Broyden", (4, 8, 5, 60), "CCCB", distance=[0.05, 0.05, 0.3, 0.9]),
    ]
    field = Field(rows)
    assert robustness.elsewhere(field, 1e-2, "one", "meta-broyden") == 1 / 2  # of two whose equilibrium is known
    assert robustness.elsewhere(field, 1e-2, "one", "Broyden") == pytest.approx(1 / 3)
    nearer = [{**row, "tolerance": 1e-3, "distance": [0.001, 0.02, None, None]} for row in rows]
    field = Field([*rows, *nearer])
    assert robustness.elsewhere(field, 1e-2, "one", "meta-broyden") == 0, "ill-conditioned, no more"
    unknown = Field([solve_row("Broyden", distance=[None, None])])
    assert np.isnan(robustness.elsewhere(unknown, 1e-2, "one", "Broyden"))


def test_hyper_deq_is_counted_and_stopped_as_every_peer():
    problem = cells.blas(6, 16, 0.5)
    held = replace(of_known(problem, "cell"), judge=lambda z, index: z.sum(dim=1))
    peer = hyper_deq.HyperDEQ(hyper_deq.network(16, 16), "untrained")
    one = Peer("HyperDEQ", "peer", peer, peer.options, 0)
    rows = measure.measure(held, [one], Rules((1e-2,), 40, 6, 2))
    (row,) = (row for row in rows if row["row"] == "solve")
    assert set(row["status"]) == {"C"}
    assert 1 < min(row["evaluations"]) <= max(row["evaluations"]) < 40
    assert max(row["residual"]) <= 1e-2
    assert len(row["seconds"]) == 2
    z, recorder = peer.solve(lambda z: problem.f(z, problem.context), problem.z0, 0.0, 7, condition=problem.context)
    assert recorder.count == 7, "no more calls than the budget"
    assert torch.isfinite(z).all()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A race of one family on a few images, run: its config, and the folder of its results."""
    folder = tmp_path_factory.mktemp("race")
    config = race.Race(
        families=("dense-digits",), images=4, rounds=1, budget=16, seeds=1, lanes=1, runs=folder / "runs",
        results=folder / "results", fits=folder / "fits", progress=False,
    )  # fmt: skip
    tune = solvers.grids.tune
    few = {
        problems: {"CHANGES": {"noisy": problems.noisy}},
        hyper_deq: {"RATES": (1e-3,), "STEPS": 4, "LOOKS": 2, "POOL": 64},
        statistics: {"RESAMPLES": 50},
        units: {"DEPTHS": range(1, 9), "PACES": (1, 3)},
        fitted: {"IMAGES": 60},
        mb: {"fit_solver": partial(mb.fit_solver, steps=2)},
        solvers.grids: {"tune": lambda grid, *given, **options: tune(list(grid)[::8], *given, **options)},
        solvers: {"tune": lambda grid, *given, **options: tune(list(grid)[:1], *given, **options)},
    }
    with pytest.MonkeyPatch.context() as patch:
        for module, values in few.items():
            for name, value in values.items():
                patch.setattr(module, name, value)
        race.run(config)
    (trial,) = config.results.iterdir()
    return SimpleNamespace(config=config, folder=trial)


def test_a_tiny_race_writes_rows_figures_and_reports(tiny):
    assert tiny.folder.name.startswith("trial-"), "fewer images than the usual ones"
    names = {str(path.relative_to(tiny.folder)) for path in tiny.folder.rglob("*") if path.is_file()}
    drawn = ("residual-evaluations", "residual-time", "reduction-0.01", "reduction-0.001", "profiles",
             "metric-evaluations", "metric-time")  # fmt: skip
    pictures = {f"figures/{name}.{kind}" for name in drawn for kind in ("png", "pdf")}
    pieces = ("dense-digits", "hyper-deq-dense-digits")
    files = {"config.json", "schema.json", "report.md", "report.html", *(f"rows/{name}.jsonl.gz" for name in pieces)}
    assert names >= files | pictures
    text = (tiny.folder / "report.md").read_text()
    assert "python -m experiments race --budget 16 --families dense-digits --images 4 --rounds 1 --seeds 1" in text
    assert text.index("reduction-0.01.png") < text.index("## "), "the figure comes first"
    page = (tiny.folder / "report.html").read_text()
    assert page.index("<figure>") < page.index("<nav>") < page.index("<h2")
    for opened in ("Family by family", "dense-digits"):
        assert f"<summary>{opened}</summary>" in text
        assert f"<summary>{opened}</summary>" in page


def test_every_part_of_a_tiny_race_has_its_rows(tiny):
    rows = schema.read(tiny.folder / "rows")
    assert all(map(schema.check, rows))
    outside = Field(rows, "outside")
    assert outside.families == ["dense-digits, noisy", "dense-digits, wrong weights"]
    assert outside.solvers("dense-digits, wrong weights") == ["meta-broyden", "Broyden"]
    assert set(Field(rows, "hyper-deq").solvers("dense-digits", "peer")) == {"HyperDEQ", "torchdeq Anderson"}
    field = Field(rows, "families")
    assert field.families == ["dense-digits"]
    names = {"Picard", "tuned Anderson", "tuned Anderson + start", "meta-broyden", "universal", "torchdeq Broyden"}
    assert names <= set(field.solvers("dense-digits"))
    kinds = {"tuned", "star", "solve", "curve", "depth", "pace", "training"}
    assert {row["row"] for row in field.rows} == kinds
    (told,) = (row for row in field.rows if row["row"] == "training")
    assert told["steps"] == 2
    assert told["returned"] == (not told["reasons"])


def test_robustness_is_one_table(tiny):
    rows = schema.read(tiny.folder / "rows")
    field, outside = Field(rows, "families"), Field(rows, "outside")
    found = robustness.table(field, outside, 1e-2)
    (row,) = found.body
    told = dict(zip(found.head, row, strict=True))
    ours, best = field.must("dense-digits", "meta-broyden", 1e-2), field.must("dense-digits", statistics.BEST, 1e-2)
    assert told["solved"] == f"{ours.success:.1%} / {best.success:.1%}"
    assert told["90%"] == f"{ours.p90:.0f} / {best.p90:.0f}"
    wrong = outside.must("dense-digits, wrong weights", "meta-broyden", 1e-2)
    assert told["wrong weights"].startswith(f"{wrong.mean:.1f} ({wrong.success:.1%}) / ")
    assert told["noisy"].count("%") == 2
    assert told["shifted"] == told["King James Bible"] == ""
    (row,) = robustness.table(field, None, 1e-2).body
    assert row[-4:] == [""] * 4


def test_co_trained_models_are_in_the_means_of_the_families_that_count(tiny, tmp_path):
    field = Field(schema.read(tiny.folder / "rows"), "families")
    assert report.means_table(field, tmp_path).body == report.means_table(field).body, "there are none"
    found = beyond.co_trained(Path("results/cotrain"), 1e-3)
    among = {"trellisnet-words": 3, "conv-digits": 3}
    assert {family: len(found[family]) for family in among} == among
    races = SimpleNamespace(headline=lambda at: ["conv-digits"], families=[*among, "dense-digits"])
    ((words, at, *cells),) = report._co_trained(races, Path("results"), 1e-3)
    assert (words.split(":")[0], at) == ("co-trained", "0.001")
    other, ours = (np.prod([row["evaluations"] for row in found[family]]) ** (1 / 3) for family in among)
    assert [cells[0], cells[1], cells[3], cells[4]] == ["1", f"{ours:.2f}", "2", f"{np.sqrt(ours * other):.2f}"]


@pytest.mark.parametrize("returned", [True, False])
def test_what_a_call_returns_counts_where_it_refuses(tiny, returned):
    rows = [{**row, "returned": returned} for row in schema.read(tiny.folder / "rows")]
    field = Field(rows, "families")
    ours, best, usual = (
        field.must("dense-digits", name, 1e-2) for name in ("meta-broyden", statistics.BEST, statistics.FASTEST)
    )
    _, _, *headline, number, spent, time = report._over_seeds("", field, 1e-2, report._kept(field, 1e-2))
    assert (number, spent) == ("1", f"{(ours if returned else usual).median / best.median:.2f}")
    assert time == (f"{np.median(ours.seconds / np.median(usual.seconds, axis=0)):.2f}" if returned else "1.00")
    assert headline == ["0", "", ""]


def test_the_first_figure_goes_beyond_the_families(tmp_path):
    assert beyond.groups(tmp_path, 1e-2) == []
    found = dict(beyond.groups(Path("results"), 1e-2))
    words, *others = found
    assert words.startswith("strangers")
    assert others == ["workloads", "co-trained, over the solvers of the original"]
    for lines in found.values():
        ratios = [line.evaluations.value for line in lines]
        assert ratios == sorted(ratios)
        spans = [line.evaluations for line in lines]
        assert all(span.low - 1e-9 <= span.value <= span.high + 1e-9 for span in spans)
    fits = chosen(read_rows(Path("results/strangers/held-seed0/rows.jsonl")), "fit", rtol=1e-2, trained=True)
    assert len(found[words]) == len(fits)
    for line in found[words]:
        name, mark, _ = line.label.partition(beyond.REFUSED)
        (row,) = (row for row in fits if row["name"] == name.split()[0])
        assert bool(mark) == (row["returned"] != "fitted")
        assert line.time.value == row["ours"]["time_over_fastest"]


def test_the_race_runs_what_fit_solver_makes_and_keeps_it(tiny):
    (path,) = tiny.config.fits.iterdir()
    assert path == fitted.path_of(tiny.config.fits, "dense-digits", 0)
    solver = mb.load_solver(path)
    assert set(solver.summary[fitted.VERDICT]) == {"returned", "reasons"}
    x = fitted.contexts(problems.Family("dense-digits"), 0)
    assert len(x) == 2000 or len(x) == len(problems.Family("dense-digits").criterion.data.train.images)


def test_work_is_spread_over_processes(tmp_path):
    made = [partial(Path.touch, tmp_path / name) for name in "abc"]
    race._spread(race.Race(lanes=2, progress=False), "work", made)
    assert {path.name for path in tmp_path.iterdir()} == set("abc")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        race._spread(race.Race(lanes=2, progress=False), "work", [*made, partial(Path.read_text, Path("nowhere"))])


def test_a_unit_depends_on_the_universal_solver(tiny, monkeypatch):
    setting = units.Setting(tiny.config, torch.device("cpu"), "0")
    made = {path.stem for path in tiny.config.runs.rglob("*.jsonl")}
    assert units.family(setting, "dense-digits").key in made
    changed = Contestant("universal", "learned", mb.load_solver("universal"), "shipped, other", 0)
    monkeypatch.setattr(solvers, "universal", lambda: changed)
    assert units.family(setting, "dense-digits").key not in made


def test_a_finished_race_is_not_run_again_and_its_report_is_remade_from_the_rows(tiny, monkeypatch):
    path = tiny.folder / "rows" / "dense-digits.jsonl.gz"
    then, written = path.read_bytes(), []
    monkeypatch.setattr(units, "_family_rows", lambda *arguments: pytest.fail("finished work was done again"))
    monkeypatch.setattr(fitted, "fit", lambda *arguments: pytest.fail("a solver was fitted again"))
    monkeypatch.setattr(race, "pieces", lambda setting: [units.family(setting, "dense-digits")])
    monkeypatch.setattr(
        report, "write", lambda folder, results: written.append((folder, results)) or folder / "report.md"
    )
    race.run(tiny.config)
    assert path.read_bytes() == then
    monkeypatch.setattr(race, "pieces", lambda setting: pytest.fail("the report was asked for alone"))
    race.run(replace(tiny.config, report=True))
    assert written[-1] == (tiny.folder, None), "a trial stands for itself"


def test_a_race_names_what_it_does_not_know(tmp_path):
    with pytest.raises(ValueError, match="unknown family 'nets'"):
        race.run(race.Race(families=("nets",), runs=tmp_path))
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        race.run(race.Race(rounds=0, runs=tmp_path))
