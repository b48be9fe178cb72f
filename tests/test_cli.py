"""The command line: fit, compare, list, info and new, on a model of one's own; what is wrong is said in one sentence."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import metabroyden as mb
from metabroyden import cli, userfunction
from metabroyden.cli import main
from metabroyden.meta.prospect import Prospect
from metabroyden.meta.trainer import MetaTrainer

pytestmark = pytest.mark.usefixtures("quick_fits", "plain_import")

MODEL = """
import collections
import metabroyden as mb
import torch

torch.manual_seed(1)
x = torch.randn(60, 6)
Named = collections.namedtuple("Named", "f x")


def f(z, x):
    return torch.tanh(0.9 * z.flip(1) + x)


def loader():
    data = torch.utils.data.TensorDataset(x)
    return f, torch.utils.data.DataLoader(data, batch_size=20, shuffle=True)


def raising(z, x):
    raise LookupError("a mistake in f")


def pair():
    return f, x


def named():
    return Named(f, x)


def parts():
    return {"f": f, "x_train": x[:40], "x_test": x[40:], "z0": torch.zeros_like, "layout": "vector"}


def wide():
    f = lambda z, x: torch.tanh(0.3 * z + x.mean(dim=1, keepdim=True))
    return {"f": f, "x": x, "z0": lambda x: x.new_zeros(len(x), 9)}


class Model(torch.nn.Module):
    def __init__(self, nested):
        super().__init__()
        deq = mb.DEQ(f)
        self.core = torch.nn.ModuleList([deq]) if nested else deq

    def forward(self, x):
        return (self.core if isinstance(self.core, mb.DEQ) else self.core[0])(2 * x)


def layer():
    return mb.DEQ(f), x


def model():
    return Model(False), x


def nested():
    return Model(True), x


def scored():
    return {"f": f, "x": x, "metric": lambda z, x: -z.square().sum(dim=1)}


def unseeded():
    return f, torch.randn(60, 6)


def broken():
    raise RuntimeError("a mistake in FUNCTION")


def broken_map():
    return raising, x


def leaking():
    return {"f": f, "x_train": x, "x_test": x[:10]}


bad = {
    "argument": lambda a: (f, x),
    "none": lambda: None,
    "three": lambda: (f, x, x),
    "uncallable": lambda: (3, x),
    "twice": lambda: {"f": f, "x": x, "x_test": x},
    "nothing": lambda: {"f": f},
    "typo": lambda: {"f": f, "x": x, "lay_out": "vector"},
    "few": lambda: (f, x[:9]),
    "alike": lambda: (f, x[:1].expand(60, -1)),
    "train": lambda: {"f": f, "x_train": x},
    "test": lambda: {"f": f, "x_test": x},
    "narrow": lambda: (lambda z, x: z[:, :2], x),
    "integers": lambda: (f, x.long()),
    "start": lambda: (lambda z, x: z @ torch.ones(9, 9) + 0 * x.sum(), x),
    "model": lambda: (torch.nn.Linear(6, 6), x),
}
globals().update({f"bad_{name}": function for name, function in bad.items()})
"""
QUICK = ["--steps", "2", "--no-progress"]


@pytest.fixture
def plain_import(monkeypatch):
    """What the commands of a test import is forgotten after it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("mymodel", "imports", "mine"):
        sys.modules.pop(name, None)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with a model in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mymodel.py").write_text(MODEL)
    return tmp_path


def fit(*words: str, out: str = "out", name: str = "mymodel.py:pair") -> int:
    return main(["fit", name, "--out", out, *QUICK, *words])


def told(capsys) -> str:
    """The one sentence on stderr."""
    found = capsys.readouterr().err.strip().splitlines()
    assert len(found) == 1, found
    assert found[0].startswith("metabroyden: ")
    return found[0].removeprefix("metabroyden: ")


def test_help_comes_quickly_and_explains_function():
    command = [sys.executable, "-m", "metabroyden", "--help"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    for word in ("fit", "compare", "list", "info", "new", "MODULE:FUNCTION", "(f, x)", "every fifth sample"):
        assert word in shown
    code = (
        "import sys, metabroyden.cli; print([name for name in ('rich', 'matplotlib', 'higher') if name in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout
    assert loaded.strip() == "[]"


def test_fit_writes_a_solver_and_a_report_and_says_how_to_use_them(here, capsys):
    assert fit("--no-fallback", "--rtol", "1e-2") == 0
    shown = capsys.readouterr().out
    assert {path.name for path in (here / "out").iterdir()} == {"solver.safetensors", "report.json"}
    report = json.loads((here / "out/report.json").read_text())
    assert report["saved"] == "metabroyden"
    assert report["refused"] == []
    assert report["held_out"]["rtol"] == 1e-2
    assert report["steps"] == 2
    assert {"metabroyden", "tuned Picard"} <= report["held_out"]["solvers"].keys()
    assert "tuned Picard" in shown
    problem = userfunction.load_problem("mymodel.py:pair")
    names = pasted(shown, f=problem.f, x=problem.x_test)
    assert isinstance(names["solver"], mb.MetaBroyden)
    assert names["solution"].converged.all()
    assert torch.allclose(names["z"], names["solution"].z)


def pasted(shown: str, **names):
    """What there is after the lines to paste have run beside these names."""
    exec(re.search(r"In your code:\n\n(.*)", shown, re.S)[1].replace("    ", ""), names)
    return names


def test_lines_to_paste_run_for_a_map_with_a_start(here, capsys):
    assert fit("--no-fallback", name="mymodel.py:wide") == 0
    problem = userfunction.load_problem("mymodel.py:wide")
    names = pasted(capsys.readouterr().out, f=problem.f, x=problem.x_test, z0=problem.z0)
    assert names["solution"].z.shape == names["z"].shape == (12, 9)
    assert names["solution"].converged.all()


@pytest.mark.parametrize(("name", "what"), [("layer", "deq"), ("model", "model"), ("nested", "model")])
def test_lines_to_paste_run_for_a_deq_and_for_a_model(here, capsys, name, what):
    assert fit("--no-fallback", name=f"mymodel.py:{name}") == 0
    problem = userfunction.load_problem(f"mymodel.py:{name}")
    names = pasted(capsys.readouterr().out, **{what: problem.f})
    (deq,) = (module for module in problem.f.modules() if isinstance(module, mb.DEQ))
    assert deq.solver is names["solver"]
    assert problem.f(problem.x_test).shape == (12, 6)


@pytest.fixture
def hopeless(request, monkeypatch):
    """Whether `fit_solver` finds, before it trains, that there is nothing to gain."""
    monkeypatch.setattr(Prospect, "hopeless", property(lambda self: request.param))


@pytest.mark.parametrize("hopeless", [False], indirect=True)
def test_a_solver_that_is_refused_is_kept_and_the_best_classical_one_is_saved(here, capsys, hopeless):
    assert fit() == 0  # this f is so cheap that Picard's iteration is faster
    captured = capsys.readouterr()
    assert not captured.err
    assert not mb.load_solver("out/solver.safetensors").is_learned
    assert mb.load_solver("out/refused.safetensors").is_learned
    assert "The fitted solver was refused: it " in captured.out
    report = json.loads((here / "out/report.json").read_text())
    assert report["refused"]
    assert report["saved"] == report["held_out"]["best_classical"]


@pytest.mark.parametrize("hopeless", [True], indirect=True)
def test_where_nothing_can_be_gained_the_best_classical_solver_is_saved_untrained(here, capsys, hopeless):
    assert fit() == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: there is nothing to gain: ")
    assert captured.err.endswith("so nothing is trained (--no-fallback trains all the same)\n")
    assert "Saved is the best classical solver, " in captured.out
    assert {path.name for path in (here / "out").iterdir()} == {"solver.safetensors", "report.json"}
    assert main(["info", "out"]) == 0
    shown = capsys.readouterr().out
    assert "solver          median" in shown
    assert shown.splitlines()[-1].startswith("Saved is ")
    assert not mb.load_solver("out/solver.safetensors").is_learned
    assert json.loads((here / "out/report.json").read_text())["held_out"]["solvers"]


def test_a_finished_fit_is_overwritten_only_when_told_to(here, capsys):
    (here / "out").mkdir()
    (here / "out/report.json").write_text("{}")
    assert fit() == 2
    assert told(capsys) == "out holds a finished run (report.json): give another folder, or --overwrite"
    assert fit("--overwrite", "--no-fallback") == 0
    assert "held_out" in json.loads((here / "out/report.json").read_text())


def test_an_interrupted_fit_goes_on(here, capsys, monkeypatch):
    monkeypatch.setattr(MetaTrainer.__init__, "__kwdefaults__", {"checkpoint": None, "save_every": 1})
    update, calls = MetaTrainer._update, []

    def cut(self):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return update(self)

    monkeypatch.setattr(MetaTrainer, "_update", cut)
    assert fit("--steps", "4", "--no-fallback") == 130
    assert "the same command goes on where this one stopped" in capsys.readouterr().err
    assert {path.name for path in (here / "out").iterdir()} == {"training.safetensors"}
    assert fit("--steps", "5", "--no-fallback") == 2, "other options are another training"
    assert re.search("training.safetensors is .* of a fit with other options.* --overwrite", told(capsys))
    calls[:] = 3 * [1]
    assert fit("--steps", "4", "--no-fallback") == 0
    assert len(calls) == 3 + 2
    assert fit("--steps", "4", "--no-fallback", out="whole") == 0
    both = [mb.load_solver(f"{name}/solver.safetensors").state_dict() for name in ("out", "whole")]
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[1])
    assert not (here / "out/training.safetensors").exists()


def test_a_fit_that_is_interrupted_early_says_that_it_starts_anew(here, capsys, monkeypatch):
    def cut(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(MetaTrainer, "_update", cut)
    assert fit("--no-fallback") == 130
    told = "metabroyden: interrupted before the training had saved anything: the same command starts anew\n"
    assert capsys.readouterr().err == told
    (here / "out/training.safetensors").touch()
    options = cli._parser().parse_args(["fit", "mymodel.py:pair", "--out", "out", "--overwrite"])
    assert cli._again(options) == "; the same command without --overwrite goes on where this one stopped"


def test_info_tells_what_a_solver_is_and_was_fitted_to(here, capsys):
    assert fit("--no-fallback", name="mymodel:parts") == 0
    capsys.readouterr()
    assert main(["info", "out/solver.safetensors"]) == 0
    shown = capsys.readouterr().out
    for words in ("MetaBroyden, states of layout vector, (6,)", "mymodel:parts, 40 contexts", "rtol:       0.001",
                  "2 outer steps", "8 held-out problems", "tuned Anderson"):  # fmt: skip
        assert words in shown
    assert re.search("solver +median +90% +mean +solved +time +vs fastest +elsewhere\n", shown)
    assert main(["info", "out"]) == 0, "the folder that fit wrote"
    assert capsys.readouterr().out == shown
    assert main(["info", "universal"]) == 0
    assert "Universal, any state, 1,941 weights" in capsys.readouterr().out
    mb.save_solver(mb.Picard(damping=0.5), "picard.safetensors")
    assert main(["info", "picard.safetensors"]) == 0
    assert "Picard(damping=0.5)" in capsys.readouterr().out


def test_list_has_a_line_for_every_solver(capsys):
    assert main(["list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert {line[0] for line in lines} == {*mb.list_solvers(), *mb.list_pretrained()}
    assert all(len(line) > 3 for line in lines)
    words = [" ".join(line[1:]) for line in lines if line[0] in mb.list_solvers()]
    assert len(set(words)) == len(words), "each has a description of its own"


def test_help_of_fit_says_the_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    usual = {
        "rtol RTOL": "0.001",
        "patience PATIENCE": "4",
        "solver SOLVER": "metabroyden",
        "batch-size BATCH_SIZE": "32",
        "learning-rate LEARNING_RATE": "0.005 for metabroyden",
    }
    for option, default in usual.items():
        assert re.search(rf"--{option} [^(]*\(default: {default}", shown)


def test_processes_other_than_the_first_write_and_say_nothing(here, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_processes", lambda f, device: nullcontext(False))
    assert main(["fit", "mymodel.py:pair", "--out", "out", "--steps", "2", "--no-fallback"]) == 0
    assert {path.name for path in (here / "out").iterdir()} <= {"training.safetensors"}
    assert capsys.readouterr() == ("", "")


def test_the_template_runs_as_it_stands(here, capsys):
    assert main(["new", "mine.py"]) == 0
    assert "metabroyden fit mine.py:problem" in capsys.readouterr().out
    assert "metabroyden fit mine.py:problem" in (here / "mine.py").read_text()
    assert fit("--no-fallback", name="mine.py:problem") == 0
    solvers = ["out/solver.safetensors", "universal"]
    capsys.readouterr()
    assert main(["compare", "mine.py:problem", "--solver", *solvers, "--out", "compared", "--rounds", "1"]) == 0
    shown = capsys.readouterr().out
    for word in ("out", "universal", "tuned Picard", "tuned Broyden", "100 problems to 0.001"):
        assert word in shown
    written = {path.name for path in (here / "compared").iterdir()}
    assert {"report.md", "report.html"} <= written
    assert {".png", ".pdf"} <= {Path(name).suffix for name in written}
    assert "mine.py:problem" in (here / "compared/report.md").read_text()
    assert main(["compare", "mine.py:problem", "--solver", "universal", "--out", "compared"]) == 2
    assert told(capsys).startswith("compared holds a finished run (comparison.json)")


def test_compare_without_matplotlib_writes_all_but_the_figures(here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ["compare", "mymodel.py:parts", "--solver", "universal", "--out", "bare", "--rounds", "0", "--no-progress"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert err == "warning: there are no figures: matplotlib is not installed (pip install matplotlib)\n"
    assert out.endswith("Written to bare: report.html, the same as report.md, table.csv, comparison.json\n")
    written = {path.name for path in (here / "bare").iterdir()}
    assert written == {"report.html", "report.md", "table.csv", "comparison.json"}


def test_compare_measures_on_what_fit_has_not_seen(here, monkeypatch, capsys):
    assert fit("--no-fallback", name="mymodel.py:scored") == 0
    seen = {}

    def compare(f, x_test, **options):
        seen.update(options, x_test=x_test)
        raise KeyboardInterrupt

    monkeypatch.setattr(mb, "compare", compare)
    words = (
        "compare mymodel.py:scored --solver out/solver.safetensors --out compared --rtol 0.1 --max-nfe 9 --title Mine"
    )
    capsys.readouterr()
    assert main(words.split()) == 130
    x = userfunction.load_problem("mymodel.py:scored")
    assert torch.equal(seen["x_test"], x.x_test)
    assert torch.equal(seen["tune_on"], x.x_train)
    assert (seen["rtol"], seen["max_nfe"], seen["title"]) == ([0.1], 9, "Mine")
    assert callable(seen["metric"])
    assert list(seen["solvers"]) == ["out"]
    # another size, for bytecode of this second not to be taken for its own
    (here / "mymodel.py").write_text(MODEL.replace("randn(60, 6)", "randn(100, 6)"))
    assert main(words.split()) == 130
    assert "warning: mymodel.py:scored returns other contexts than when out was fitted" in capsys.readouterr().err


def test_compare_says_what_a_file_holds(here):
    (here / "mine").mkdir()
    mb.save_solver(mb.Picard(damping=0.5), "mine/solver.safetensors")
    mb.save_solver(mb.load_solver("universal"), "mine/refused.safetensors")
    mb.save_solver(mb.Broyden(), "other.safetensors")
    given = ["mine/solver.safetensors", "mine/refused.safetensors", "other.safetensors", "universal"]
    assert list(cli._loaded(given)) == ["mine (Picard)", "mine, refused", "other (Broyden)", "universal"]
    assert list(cli._loaded(["mine"])) == ["mine (Picard)"]
    (here / "twin/mine").mkdir(parents=True)
    mb.save_solver(mb.Picard(), "twin/mine/solver.safetensors")
    assert "twin/mine/solver.safetensors (Picard)" in cli._loaded([*given, "twin/mine/solver.safetensors"])


def test_every_fifth_sample_of_a_pair_is_kept_from_fit(here):
    problem, named = (userfunction.load_problem(f"mymodel.py:{name}") for name in ("pair", "named"))
    whole = sys.modules["mymodel"].x
    assert torch.equal(problem.x_test, whole[4::5])
    assert len(problem.x_train) == 48
    assert torch.equal(named.x_test, problem.x_test)
    assert problem.file == here / "mymodel.py"
    doubled = torch.cat([whole[:20], whole[:20]])
    assert userfunction.shared_samples(*userfunction.kept_apart(torch.cat([doubled, whole]))) == 0


@pytest.mark.parametrize("name", ["unseeded", "loader"])
def test_what_function_draws_is_the_same_in_every_command(here, name):
    first, second = (userfunction.load_problem(f"mymodel.py:{name}") for _ in range(2))
    assert torch.equal(first.x_train, second.x_train)
    assert first.x_test.shape == (12, 6)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere:f", "no module 'nowhere' can be imported from"),
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("mymodel.py", "wanted MODULE:FUNCTION, as mymodel.py:problem"),
        (r"C:\models\mymodel.py", "wanted MODULE:FUNCTION"),
        (r"C:\models\mymodel.py:pair", r"there is no file C:\\models\\mymodel.py"),
        (".mymodel:pair", "wanted MODULE:FUNCTION"),
        ("mymodel.py:pairs", "mymodel.py has no function 'pairs': it has f, loader, raising, pair"),
        ("mymodel.py:x", "mymodel.py has no function 'x'"),
        ("mymodel.py:bad_argument", "must be a function without arguments: missing a required argument: 'a'"),
        ("mymodel.py:bad_none", r"must return \(f, x\), or a dict .*; got NoneType"),
        ("mymodel.py:bad_three", r"must return \(f, x\), or a dict .*; got tuple"),
        ("mymodel.py:bad_uncallable", "f is int, which cannot be called"),
        ("mymodel.py:bad_twice", "must return contexts, either x or x_train and x_test; got x, x_test"),
        ("mymodel.py:bad_nothing", "must return contexts, either x or x_train and x_test; got none"),
        ("mymodel.py:bad_typo", "returns lay_out, which nobody reads: known are f, x, x_train"),
        ("mymodel.py:bad_few", r"at least 15 samples first, to be split; got \[\(9, 6\)\]"),
        ("mymodel.py:bad_alike", "are all alike: none is left"),
        ("mymodel.py:bad_test", "returns x_test alone: to fit a solver it must return x or x_train"),
        ("mymodel.py:bad_narrow", "f must return what z is shaped like"),
        ("mymodel.py:bad_integers", "the state cannot be zeros like it: give z0="),
        (
            "mymodel.py:bad_start",
            r"f failed at the default start, zeros like x .*\(RuntimeError: mat1 and mat2 .*give z0=",
        ),
        ("mymodel.py:bad_model", "Linear takes one argument and has no DEQ in it: give its cell"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_in_one_sentence(here, capsys, name, words):
    assert fit(name=name) == 2
    assert re.search(words, told(capsys))


@pytest.mark.parametrize("name", ["broken", "broken_map"])
def test_an_error_in_code_of_the_users_shows_its_traceback(here, capsys, name):
    assert fit(name=f"mymodel.py:{name}") == 1
    found = capsys.readouterr().err
    assert found.startswith("Traceback")
    assert "mymodel.py" in found
    assert "a mistake in" in found.splitlines()[-1]


def test_an_import_that_fails_inside_of_the_module_is_the_users(here, capsys):
    (here / "imports.py").write_text("import not_installed")
    assert fit(name="imports:f") == 1
    assert "No module named 'not_installed'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("fit mymodel:pair --out mymodel.py", "--out mymodel.py is a file"),
        ("fit mymodel:pair --out mymodel.py/out", "mymodel.py/out: Not a directory"),
        ("fit mymodel:pair --out out --steps 0", "steps must be an integer of at least 1, got 0"),
        ("fit mymodel:pair --out out --solver adam", "unknown learned solver 'adam': known are"),
        ("fit mymodel:pair --out out --layout cube", "layout must be one of vector"),
        ("fit mymodel:pair --out out --device abacus", "device must be auto, cpu, cuda or cuda:N, got 'abacus'"),
        ("info nothing", "nothing is neither a file or folder nor the name of a shipped solver"),
        ("info mymodel.py", "mymodel.py is no readable safetensors file"),
        ("compare mymodel:pair --solver mymodel.py --out out", "mymodel.py is no readable safetensors file"),
        ("compare mymodel:bad_train --solver universal --out out", "it must return x_test too"),
        ("compare mymodel:leaking --solver universal --out out", "10 samples of x_test are in x_train"),
        ("new mymodel.py", "mymodel.py is there already"),
        ("new mymodel.txt", "FILE must end in .py"),
    ],
)
def test_other_bad_input_is_refused_in_one_sentence(here, capsys, command, words):
    assert main(command.split()) == 2
    assert words in told(capsys)


@pytest.mark.parametrize("command", ["", "fits", "fit mymodel:pair", "fit mymodel:pair --out out --steps few"])
def test_commands_that_are_not_understood_show_their_usage(here, capsys, command):
    with pytest.raises(SystemExit) as left:
        main(command.split())
    assert left.value.code == 2
    assert "usage: metabroyden" in capsys.readouterr().err
