"""`mb.compare`: one's own DEQ, a table, figures, files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict

import matplotlib as mpl
import numpy as np
import pytest
import torch

import metabroyden as mb
from metabroyden.comparison.figures import LOOKS, assign
from metabroyden.comparison.tables import text_table

mpl.use("Agg")
WIDTH = 6
W = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) / 3
X = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(1))


def cell(z, x):
    return torch.tanh(z @ W + x)


def near_zero(z, x):
    return -z.norm(dim=1)


@pytest.fixture(scope="module")
def found() -> mb.Comparison:
    solvers = {"mine": mb.load_solver("universal"), "damped": mb.Picard(damping=0.3)}
    return mb.compare(cell, X, solvers=solvers, metric=near_zero, rounds=2, title="Ours", progress=False)


CLASSICAL = ["Broyden", "tuned Picard", "tuned Anderson", "tuned Broyden"]


def test_classical_solvers_run_too_and_what_they_are_tuned_on_is_not_measured(found):
    assert found.names == ["mine", "damped", *CLASSICAL]
    assert found.samples == 32, "of 40, eight are for tuning"
    told = mb.compare(cell, X, solvers="broyden", tune_on=X[:12], rounds=0, progress=False)
    assert (told.names, told.samples) == (CLASSICAL, 40)
    few = mb.compare(cell, X[:6], solvers=mb.Newton(), rounds=0, progress=False)
    assert (few.names, few.samples) == (["Newton", "Broyden", "Picard", "Anderson"], 6)
    assert "default options" in few.about


def test_the_figures_are_those_of_solves(found):
    for rtol in (1e-2, 1e-3):
        solution = mb.solve(cell, 0 * X[:32], X[:32], solver=mb.Picard(damping=0.3), rtol=rtol, max_nfe=60, throw=False)
        spent = np.where(solution.converged, solution.nfe, 60)
        (row,) = (row for row in found.numbers(rtol) if row["solver"] == "damped")
        assert row["median"] == np.median(spent)
        assert row["mean"] == pytest.approx(spent.mean())
        assert row["solved"] == pytest.approx(float(solution.converged.float().mean()))
        assert row["metric"] == pytest.approx(float(-solution.z.norm(dim=1).mean()), rel=1e-3)
        best, fastest = found.outcome(found.best_classical(rtol), rtol), found.fastest_classical(rtol)
        assert row["evaluations_over_best"] == np.median(spent) / best.median
        assert row["milliseconds"] > 0
        assert [row["time_over_fastest"] for row in found.numbers(rtol) if row["solver"] == fastest] == [1]
    assert found.outcome("damped").evaluations.shape == (1, 32)


def test_the_best_is_the_best_of_those_that_solve_most(found):
    rates = {name: found.outcome(name) for name in CLASSICAL}
    best = found.best_classical()
    assert all(rates[best].median <= one.median for one in rates.values() if one.success >= rates[best].success)


def test_the_printed_tables_fit_100_columns_and_end_with_what_they_are_of(found):
    assert max(map(len, str(found).splitlines())) <= 100
    assert "vs best" in str(found)
    told = " ".join(str(found).split())
    assert found.about in told
    assert "torch" in found.about
    for at in (1e-2, 1e-3):
        rows = {row[0]: row for row in found.table(at).body}
        assert rows[found.best_classical(at)][6] == "1 (best)"
        assert rows[found.fastest_classical(at)][7] == "1 (fastest)"


def test_without_rounds_nothing_is_said_about_time(tmp_path, recwarn):
    untimed = mb.compare(cell, X, solvers=mb.Newton(), rounds=0, progress=False)
    assert untimed.table().head == ["solver", "median", "90%", "mean", "solved", "vs best", "elsewhere"]
    assert untimed.numbers()[0]["fastest_classical"] is None
    with pytest.raises(ValueError, match="nothing was timed"):
        untimed.fastest_classical()
    words = {text.get_text() for text in untimed.plot_reduction().texts}
    assert not any("fastest" in word or word == "time" for word in words)
    untimed.save(tmp_path)
    assert not (tmp_path / "time.png").exists()
    assert not [str(one.message) for one in recwarn if "script" not in str(one.message)]


def test_it_prints_and_is_shown_as_a_table(found):
    lines = str(found).splitlines()
    assert lines[0] == "32 problems to 0.01, at most 60 evaluations each"
    assert lines[1].startswith("solver")
    assert [line.split("  ")[0] for line in lines[2:8]] == found.names
    assert found._repr_html_().count("<table>") == 2
    assert text_table(found.table(1e-2)) in str(found)


def test_files_hold_all_of_it_and_can_be_read_again(found, tmp_path):
    page = found.save(tmp_path / "out")
    names = {path.name for path in page.parent.iterdir()}
    drawn = {f"{name}.{kind}" for name in ("reduction", "residual", "time", "metric") for kind in ("png", "pdf")}
    assert names == drawn | {"report.md", "report.html", "table.csv", "comparison.json"}
    text = page.read_text(encoding="utf-8")
    assert "<title>Ours</title>" in text
    assert text.count("data:image/png;base64") == 4
    assert "http" not in text, "it loads nothing from elsewhere"
    assert "(reduction.png)" in (page.parent / "report.md").read_text(encoding="utf-8")
    again = mb.Comparison.from_json(page.parent / "comparison.json")
    assert again.numbers() == found.numbers()
    assert (str(again), again.title) == (str(found), "Ours")
    assert mb.Comparison.from_json(found.to_json()).names == found.names
    lines = (page.parent / "table.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("solver,kind,options,rtol,budget,samples,median,p90,mean,solved,milliseconds")
    assert len(lines) == 1 + 2 * len(found.names)


def test_a_folder_that_is_a_file_is_refused_and_one_with_spaces_is_written_twice(found, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(NotADirectoryError, match="file is a file: give a folder"):
        found.save(tmp_path / "file")
    spaced = tmp_path / "my results" / "é"
    assert found.save(spaced) == found.save(str(spaced))


def test_without_matplotlib_all_but_the_figures_is_written(found, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(UserWarning, match="there are no figures: matplotlib is not installed"):
        found.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.html", "table.csv", "comparison.json"}
    assert "Figures" not in (tmp_path / "report.md").read_text(encoding="utf-8")
    with pytest.raises(ImportError, match="figures need matplotlib, which is not installed"):
        found.plot_reduction()


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        '{"schema": 1, "rows": [{"a": 1}], "methods": {}, "title": "", "about": ""}',
        "{",
        '{"rows": []}',
        '{"schema": 9, "rows": [], "methods": {}, "title": "", "about": ""}',
    ],
)
def test_a_file_of_something_else_is_refused_with_a_sentence(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"is no comparison as Comparison.to_json of this version writes it"):
        mb.Comparison.from_json(path)


def test_each_plot_draws_on_the_axes_it_is_given_or_on_its_own_and_returns_them(found):
    import matplotlib.pyplot as plt

    for draw in (found.plot_reduction, found.plot_residual, found.plot_time, found.plot_metric):
        given = plt.subplots()[1]
        assert draw(ax=given) is given
        own = draw()
        assert own is not given
        assert own.get_title() == "Ours"
        plt.close(own.figure)
    assert found.plot_residual(by="time").get_xlabel().startswith("milliseconds")
    plt.close("all")


def test_curves_end_where_the_samples_have_converged(found):
    place = found.plot_residual()
    ended = {line.get_label(): line for line in place.get_lines()}
    rates = found.outcome("tuned Broyden", 1e-3)
    assert rates.success == 1
    curve = ended["tuned Broyden"]
    assert curve.get_ydata()[-1] <= 1e-3 < curve.get_ydata()[-2]
    assert curve.get_xdata()[-1] <= rates.median + 0.5
    marks = [ended[name].get_marker() for name in found.names]
    assert len(set(marks)) == len(marks), "told apart in grey"


def test_what_is_worse_is_red(found):
    place = found.plot_reduction(rtol=1e-3)
    shown = [text for text in place.texts if text.get_text() not in ("median (solved)", "time")][1:]
    inks = {
        name: (note.get_color(), time.get_color())
        for name, note, time in zip(found.names, shown[::2], shown[1::2], strict=True)
    }
    for row in found.numbers(1e-3):
        name, best = row["solver"], found.outcome(row["best_classical"], 1e-3)
        one = found.outcome(name, 1e-3)
        worse = row["evaluations_over_best"] > 1 or one.success < best.success - one.error
        assert (inks[name][0] == "#B00020") == worse, name
        assert (inks[name][1] == "#B00020") == (row["time_over_fastest"] > 1), name
    assert inks["damped"][0] == "#B00020"
    assert place.get_xscale() == "log", "half and double are as far from one"


def test_who_finds_other_solutions_more_often_than_any_classical_solver_is_red(found):
    def notes(**shares):
        rows = json.loads(found.to_json())["rows"]
        for row in rows:
            if row["row"] == "solve":
                row["elsewhere"] = [int(number < 32 * shares.get(row["solver"], 0)) for number in range(32)]
        place = mb.Comparison(rows, methods=found.methods).plot_reduction(rtol=1e-3)
        return {text.get_text(): text.get_color() for text in place.texts if "elsewhere" in text.get_text()}

    mine = found.outcome("mine", 1e-3)
    assert notes() == {}
    assert notes(mine=0.5) == {f"{mine.median:g} ({mine.success:.0%}, 50% elsewhere)": "#B00020"}
    both = notes(mine=0.5, **{"tuned Anderson": 0.5, "Broyden": 0.5})
    assert both == {}, "where classical solvers find as many others, it is the problem"


def test_where_every_solver_fails_the_table_and_the_figures_say_so(tmp_path):
    lost = mb.compare(
        lambda z, x: z * torch.nan, X, solvers=mb.Picard(damping=0.4), metric=near_zero, rounds=1, progress=False
    )
    assert [row["solved"] for row in lost.numbers(1e-3)] == [0] * 5
    assert all(row["median"] == 60 for row in lost.numbers())
    assert {row["evaluations_over_best"] for row in lost.numbers()} == {None}, "not one: the medians are the budget"
    lost.save(tmp_path)
    again = mb.Comparison.from_json(tmp_path / "comparison.json")
    assert str(again) == str(lost)
    assert "NaN" not in (tmp_path / "comparison.json").read_text(encoding="utf-8"), "which is no JSON"


def test_names_and_titles_are_shown_as_they_are_written():
    import matplotlib.pyplot as plt

    solvers = {"_mine": mb.Newton(), "costs $5_a": mb.Picard(damping=0.5), "a|b": mb.Picard(damping=0.4)}
    odd = mb.compare(cell, X, solvers=solvers, rounds=0, rtol=1e-2, progress=False)
    for odd.title in ("$\\frac{1}$ <b>", "two\nlines", "$\\beta = 0.1$", "long " * 30):
        place = odd.plot_residual()
        place.figure.canvas.draw()
        legend = [text.get_text() for text in place.get_legend().get_texts()]
        assert legend[:3] == [" _mine", r"costs \$5_a", "a|b"]
        shown = place.get_title()
        assert max(map(len, shown.splitlines())) < 90
        assert ("\\$" in shown) == ("frac" in odd.title), "a formula that is right is set as one"
        plt.close(place.figure)
    assert r"| a\|b |" in str(odd.table()), "a row of Markdown stays one"


def test_many_solvers_have_their_legend_beside_the_axes():
    many = {f"mine {number}": mb.Picard(damping=0.3 + number / 20) for number in range(9)}
    for solvers, outside in ((many, True), ({"mine": mb.Newton()}, False)):
        place = mb.compare(cell, X, solvers=solvers, rounds=0, rtol=1e-2, progress=False).plot_residual()
        place.figure.canvas.draw()
        assert (place.get_legend().get_window_extent().x0 >= place.get_window_extent().x1) == outside
        assert bool(place.collections) != outside, "bands of many curves hide each other"


def test_the_backend_stays_what_it_is():
    code = """
import matplotlib, torch, metabroyden as mb
matplotlib.use("svg")
f = lambda z, x: torch.tanh(0.5 * z + x)
found = mb.compare(f, torch.randn(12, 3), solvers=mb.Broyden(), rounds=0, progress=False)
assert "matplotlib.pyplot" not in __import__("sys").modules
found.plot_reduction()
assert matplotlib.get_backend() == "svg", matplotlib.get_backend()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def lightness(colour: str, kind: str) -> np.ndarray:
    """A colour as somebody sees it who lacks one kind of cones (Machado et al. 2009, severity 1), in CIE Lab."""
    seen = {
        "none": np.eye(3),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    }[kind]
    srgb = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ (
        np.array(seen) @ linear
    ).clip(0, 1)
    x, y, z = np.cbrt(np.maximum(xyz / [0.9505, 1, 1.089], 1e-6))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", ["none", "protan", "deutan"])
def test_the_solvers_of_a_comparison_are_told_apart_by_the_colour_blind(kind):
    names = [*CLASSICAL, "Peaceman-Rachford", "forward-backward"]
    looks = assign({"mine": "meta-broyden", **dict.fromkeys(names)})
    colours = [lightness(look[0], kind) for look in looks.values()]
    apart = [np.linalg.norm(one - other) for at, one in enumerate(colours) for other in colours[:at]]
    assert min(apart) > 20, "a just noticeable difference is about 2"


def test_no_two_solvers_look_alike():
    shown = [look for name, look in LOOKS.items()]
    assert len({repr(look) for look in shown}) == len(shown)
    many = {f"mine {number}": "meta-broyden" for number in range(12)} | dict.fromkeys(CLASSICAL)
    looks = assign(many)
    assert list(looks) == list(many)
    assert len({repr(look) for look in looks.values()}) == len(many)
    assert len({repr(look) for look in assign({f"mine {number}": None for number in range(60)}).values()}) == 60
    assert looks["mine 0"] == LOOKS["meta-broyden"]
    assert looks["tuned Broyden"] == LOOKS["tuned Broyden"], "whoever else runs"


class Layer(torch.nn.Module):
    """A model with one DEQ in it."""

    def __init__(self):
        super().__init__()
        self.inject = torch.nn.Linear(3, WIDTH)
        self.deq = mb.DEQ(cell, solver=mb.Broyden())

    def forward(self, x):
        return self.deq(self.inject(x))


def test_models_and_layers_are_taken_as_by_fit_solver():
    model = Layer().train()
    found = mb.compare(model, X[:, :3], solvers={"slow": mb.Picard(damping=0.5)}, rounds=0, rtol=1e-3, progress=False)
    with torch.no_grad():
        x = model.inject(X[:32, :3])
    spent = mb.solve(cell, 0 * x, x, solver=mb.Picard(damping=0.5), rtol=1e-3, max_nfe=60).nfe
    assert found.outcome("slow").median == np.median(spent)
    assert model.training
    alone = mb.compare(model.deq, X, solvers=mb.Newton(), rounds=0, rtol=1e-3, progress=False)
    assert alone.samples == 32


def test_starts_contexts_and_states_of_several_tensors():
    x = OrderedDict(a=X, b=[None, X.roll(1, 0)], flag=True)
    f = lambda z, x: (torch.tanh(0.5 * z[1] + x["a"]), torch.tanh(0.4 * z[0] + x["b"][1]))  # noqa: E731
    start = lambda x: (torch.zeros_like(x["a"]), torch.ones_like(x["a"]))  # noqa: E731
    found = mb.compare(f, x, solvers=mb.Picard(), z0=start, rtol=1e-4, rounds=0, progress=False)
    assert found.samples == 32
    assert found.outcome("Picard").success == 1


def test_what_cannot_be_compared_is_refused_with_a_sentence():
    def refused(words, kind=ValueError, f=cell, x=X, **options):
        with pytest.raises(kind, match=words):
            mb.compare(f, x, **{"solvers": mb.Broyden(), "progress": False, **options})

    refused("f must be callable, .* got int", TypeError, f=3)
    refused("solvers is empty", solvers={})
    refused("rtol is empty", rtol=())
    refused("rounds must be a whole number from 0, got -1", rounds=-1)
    refused("rounds must be a whole number from 0, got 2.5", rounds=2.5)
    refused("metric must be a function, got str", TypeError, metric="accuracy")
    refused("z0 must be a function, got Tensor", TypeError, z0=X)
    refused("nosuch", Exception, solvers="nosuch")
    found = mb.compare(cell, X[:6], solvers=mb.Broyden(), rounds=0, progress=False)
    with pytest.raises(ValueError, match="nothing was timed: compare with rounds=1 or more"):
        found.plot_time()
    with pytest.raises(ValueError, match="no metric was measured"):
        found.plot_metric()
    with pytest.raises(ValueError, match=r"nothing was solved to 1e-06: there are 0.01, 0.001"):
        found.table(1e-6)
    assert found.table(np.float32(1e-3)) == found.table(0.1 * 0.01) == found.table(1e-3)
    for no_axes in (3, found.plot_residual().figure):
        with pytest.raises(TypeError, match=r"ax must be matplotlib axes, got (int|Figure)"):
            found.plot_reduction(ax=no_axes)
    with pytest.raises(ValueError, match="no solver 'ours' in this comparison: there are Broyden"):
        found.outcome("ours")
    assert json.loads(found.to_json())["schema"] == 1


def test_contexts_are_one_batch_where_they_are_few_and_blocks_where_they_are_many(monkeypatch):
    monkeypatch.setattr(sys.modules["metabroyden.compare"], "ROOM", 16 * WIDTH)
    blocks = mb.compare(cell, X, solvers=mb.Picard(), rounds=1, rtol=1e-3, progress=False)
    assert blocks.outcome("Picard").seconds.shape == (1, 2, 1)
    whole = mb.solve(cell, 0 * X[:32], X[:32], solver=mb.Picard(), rtol=1e-3, max_nfe=60)
    assert blocks.outcome("Picard").median == np.median(whole.nfe)


def test_a_solver_is_called_what_the_caller_calls_it_and_looks_as_its_kind_does():
    looks = assign({"grouped": "meta-broyden", "coordinatewise": "picard"})
    assert looks["grouped"] == LOOKS["meta-broyden"]
    found = mb.compare(cell, X, solvers={"grouped": mb.Picard(0.4)}, rounds=0, rtol=1e-2, progress=False)
    assert str(found).splitlines()[2].startswith("grouped ")
    assert looks["coordinatewise"] == LOOKS["coordinatewise"]


def test_a_quick_classical_solver_that_solves_fewer_is_marked():
    rows = []
    for name, kind, status in (
        ("ours", "learned", "C" * 80),
        ("sure", "classical", "C" * 80),
        ("quick", "classical", "B" * 9 + "C" * 71),
    ):
        laps = [{"total": 1.0 if name == "quick" else 2.0, "f": 0.5}]
        same = {"row": "solve", "family": "", "seed": None, "tolerance": 1e-3, "budget": 60, "block": 0, "options": ""}
        spent = [9 if letter == "C" else 60 for letter in status]
        row = {"solver": name, "kind": kind, "evaluations": spent, "status": status, "seconds": laps}
        rows.append({**same, **row})
    found = mb.Comparison(rows)
    assert found.fastest_classical() == "sure"
    solved = {line.split()[0]: "†" in line for line in str(found).splitlines()[2:5]}
    assert solved == {"ours": False, "sure": False, "quick": True}


def test_the_colours_of_a_saved_figure_are_those_of_the_solvers(found, tmp_path):
    from PIL import Image

    found.save(tmp_path)
    seen = np.array(Image.open(tmp_path / "reduction.png").convert("RGB")).reshape(-1, 3).astype(int)
    shown = {}
    for name, look in found._looks.items():
        wanted = np.array([int(look[0][at : at + 2], 16) for at in (1, 3, 5)])
        nearest = seen[np.abs(seen - wanted).sum(axis=1).argmin()]
        assert np.abs(nearest - wanted).sum() < 30, name
        shown[name] = tuple(nearest)
    assert len(set(shown.values())) == len(shown)
