"""The command line: fit a root finder to one's own DEQ, compare it with classical solvers, look at what is saved."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any

from metabroyden import userfunction
from metabroyden.checkpoint import CheckpointError, list_pretrained, load_solver, save_solver
from metabroyden.learned.fingerprint import module_of
from metabroyden.meta import distributed, fit_solver
from metabroyden.meta.config import MetaConfig
from metabroyden.meta.defaults import RATES, SOLVER_STEPS
from metabroyden.meta.fit import reasons
from metabroyden.solvers.registry import name_of, solver_types
from metabroyden.storage import atomic_write
from metabroyden.userfunction import UserProblem, load_problem
from metabroyden.version import __version__

DESCRIPTION = """\
Learned root finders for deep equilibrium models, on your own model.

MODULE:FUNCTION names a function of yours, as mymodel.py:problem or package.module:problem. It takes no arguments and
returns (f, x): the map f(z, x), an mb.DEQ, or a whole model with one DEQ in it; and unlabelled contexts x, samples first.
A dict may say more: f, x (or x_train and x_test), z0, layout, conditioning, metric; `metabroyden new FILE` writes a
template that explains them. Of x every fifth sample is kept from `fit`, for `compare` alone.
"""
EXAMPLES = """\
examples:
  metabroyden new mymodel.py
  metabroyden fit mymodel.py:problem --out runs/mine --rtol 1e-3
  metabroyden compare mymodel.py:problem --solver runs/mine/solver.safetensors --out runs/mine-compared
  torchrun --nproc-per-node 2 -m metabroyden fit mymodel.py:problem --out runs/mine
"""
SOLVER, REFUSED, REPORT, CHECKPOINT = "solver.safetensors", "refused.safetensors", "report.json", "training.safetensors"
"""What `fit` writes: the solver; the fitted one where that is not it; the comparison; and before, the training's state."""
COMPARED = "comparison.json"
"""What a finished comparison has in its folder."""
_LIBRARIES = {"metabroyden", "matplotlib", "torch", "numpy", "safetensors", "higher", "rich", *sys.stdlib_module_names}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words behind `metabroyden`; default those of the process.

    Returns:
        The exit status: 0; 1 where code of the user's raised, with its traceback; 2 where what was given cannot be used,
        with one sentence on stderr; 130 after an interruption.
    """
    options = _parser().parse_args(argv)
    first = os.environ.get("RANK", "0") == "0"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without the signs of tables and formulas
    try:
        with _plain_warnings():
            options.run(options)
    except KeyboardInterrupt:
        print(f"metabroyden: interrupted{_again(options)}", file=sys.stderr)
        return 130
    except Exception as error:
        if not _refusal(error):
            traceback.print_exc()
            return 1
        if first:
            print(f"metabroyden: {_sentence(error)}", file=sys.stderr)
        return 2
    return 0


def _again(options: argparse.Namespace) -> str:
    """What repeating an interrupted command does."""
    if options.run is not _fit:
        return ""
    if not (options.out / CHECKPOINT).exists():
        return " before the training had saved anything: the same command starts anew"
    return f"; the same command{' without --overwrite' if options.overwrite else ''} goes on where this one stopped"


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """While it lasts, warnings of the library are shown as sentences, without a line of its code."""
    package, shown = str(Path(__file__).parent), warnings.showwarning

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        if not filename.startswith(package):
            shown(message, category, filename, lineno, file, line)
        elif issubclass(category, UserWarning):  # others are for those who change the library
            words = str(message).removeprefix("fit_solver: ").replace("fallback=False", "--no-fallback")
            print(f"warning: {words}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.filterwarnings("default", "fit_solver: |there are no figures: ")
        warnings.filterwarnings("ignore", "fit_solver: the fitted solver does not beat")  # `fit` has its own words
        warnings.showwarning = show
        yield


def _refusal(error: Exception) -> bool:
    """Whether the library raised this over what it was given: no code of the user's was at work."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    kinds = ValueError, TypeError, RuntimeError, ImportError
    ours = isinstance(error, kinds) and modules[-1].split(".")[0] == "metabroyden"
    return (ours or isinstance(error, OSError)) and all(module.split(".")[0] in _LIBRARIES for module in modules)


def _parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        "metabroyden", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole.add_argument("--version", action="version", version=f"metabroyden {__version__}")
    commands = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_fit(_command(commands, "fit", _fit, "meta-train a solver on your DEQ and see whether it pays"))
    _add_compare(_command(commands, "compare", _compare, "measure saved solvers against tuned classical ones"))
    _command(commands, "list", _list, "the registered solvers, and the trained ones that come with the package")
    about = _command(commands, "info", _info, "what a file of a solver holds")
    about.add_argument(
        "file",
        metavar="FILE",
        help="a saved solver: a file, a folder (that fit wrote, too), or the name of one that comes with the package",
    )
    new = _command(commands, "new", _new, "write a template for MODULE:FUNCTION")
    new.add_argument("file", metavar="FILE", type=Path, help="a file to be made, ending in .py")
    return whole


def _command(commands: Any, name: str, run: Any, words: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.")
    made.set_defaults(run=run)
    return made


def _add_shared(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument(
        "function", metavar="MODULE:FUNCTION", help="what returns your f and contexts; see metabroyden --help"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help=out)
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N: where contexts go, and f where it is a module "
                        "(default: where FUNCTION has put them)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="throw away what an earlier run has left in DIR")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True, help="show a bar (default: "
                        "--progress)")  # fmt: skip


def _add_fit(parser: argparse.ArgumentParser) -> None:
    _add_shared(parser, f"folder for {SOLVER} and {REPORT}; an interrupted fit goes on from what is there")
    given = parser.add_argument_group("options of mb.fit_solver")
    given.argument_default = argparse.SUPPRESS
    usual = inspect.signature(fit_solver).parameters

    def add(name: str, words: str, default: str = "", **more: Any) -> None:
        default = default or str(usual[name].default)
        given.add_argument(f"--{name.replace('_', '-')}", help=f"{words} (default: {default})", **more)

    add("solver", "which one to fit: see metabroyden list")
    add("rtol", "relative tolerance at which solvers are judged", type=float)
    add(
        "steps",
        "outer steps of the training, at most",
        "of {:,} to {:,} steps of the solver in all, by what f costs".format(*SOLVER_STEPS),
        type=int,
    )
    add("seconds", "time of the whole fit, about", "no limit", type=float)
    add("patience", "looks at validation without gain before it stops", type=int)
    add("batch_size", "problems of an outer step, over all processes", str(MetaConfig.batch), type=int)
    rates = f"{RATES['learning_rate']:g} for metabroyden, {MetaConfig.learning_rate:g} for others"
    add("learning_rate", "peak rate of Adam", rates, type=float)
    add("log_dir", "folder for TensorBoard's files", "none are written")
    add("seed", "of weights, batches and the split", type=int)
    add(
        "layout", "axes of the state: vector, nct, ntc, tokens, set, image, pyramid", "what FUNCTION says, else a guess"
    )
    add("conditioning", "what the solver sees of x: auto, input, initial_value", "what FUNCTION says, else auto")
    words = (
        "save the fastest classical solver where the fitted one does not pay; --no-fallback saves the fitted one anyway"
    )
    add("fallback", words, "--fallback", action=argparse.BooleanOptionalAction)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    _add_shared(parser, "folder for report, figures and rows")
    parser.add_argument("--solver", metavar="FILE", nargs="+", action="extend", required=True, dest="solvers",
                        help="saved solvers, or names of such that come with the package; the classical ones are always "
                        "there, tuned on x_train")  # fmt: skip
    parser.add_argument("--rtol", type=float, nargs="+", default=(1e-2, 1e-3), help="relative tolerances (default: 0.01 "
                        "0.001)")  # fmt: skip
    parser.add_argument("--max-nfe", type=int, default=60, help="evaluations a sample may cost (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, in turns (default: %(default)s)")
    parser.add_argument("--title", help="of figures and report (default: MODULE:FUNCTION)")


# --- fit


def _fit(options: argparse.Namespace) -> None:
    folder = options.out
    _check_folder(folder, REPORT, options.overwrite)
    problem = _problem(options)
    if problem.x_train is None:
        raise ValueError(f"{options.function} returns x_test alone: to fit a solver it must return x or x_train")
    with _processes(problem.f, options.device) as first:
        if first and options.overwrite:
            for name in (REPORT, SOLVER, REFUSED, CHECKPOINT):
                (folder / name).unlink(missing_ok=True)
        distributed.wait()
        try:
            solver, comparison = fit_solver(
                problem.f, problem.x_train, z0=problem.z0, metric=problem.metric, checkpoint=folder / CHECKPOINT,
                return_report=True, progress=options.progress and first, **_options_of_fit(options, problem),
            )  # fmt: skip
        except CheckpointError as error:
            raise CheckpointError(
                f"{folder / CHECKPOINT} is damaged, or of a fit with other options, contexts or weights of f: repeat the "
                "command that began it, or start anew with --overwrite"
            ) from error
        if not first:
            return
        if not options.progress:
            comparison.show()
        _write_fit(options, problem, solver, comparison)


def _options_of_fit(options: argparse.Namespace, problem: UserProblem) -> dict[str, Any]:
    names = ("solver", "rtol", "steps", "seconds", "patience", "seed", "layout", "conditioning", "fallback",
             "batch_size", "learning_rate", "log_dir")  # fmt: skip
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return {"layout": problem.layout, "conditioning": problem.conditioning, **given}


def _write_fit(options: argparse.Namespace, problem: UserProblem, solver: Any, comparison: Any) -> None:
    """The solver, the report and what to do with them; the report last, as the mark of a finished fit."""
    folder, fitted = options.out, comparison.fitted
    trained, kept = fitted.is_learned, solver is fitted  # it is no learned one where nothing could be gained
    if trained:
        fitted.summary["fitted_to"] = {"function": options.function, **_contexts(problem.x_train)}
    path = save_solver(solver, folder / SOLVER)
    if trained and not kept:
        save_solver(fitted, folder / REFUSED)
    report = {
        "function": options.function,
        "version": __version__,
        "saved": comparison.name if kept else comparison.best,
        "refused": comparison.failed_criteria if trained and not kept else [],
        **({key: value for key, value in fitted.summary.items() if key != "held_out"} if trained else {}),
        "fingerprint": fitted.fingerprint if trained else None,
        "held_out": comparison.summary(),
    }
    atomic_write(folder / REPORT, json.dumps(report, indent=2) + "\n")
    (folder / CHECKPOINT).unlink(missing_ok=True)
    if trained and not kept:
        print(
            f"\nThe fitted solver was refused: {reasons(comparison)}. It is in {folder / REFUSED}; with --no-fallback it is "
            f"{SOLVER}, whatever it is worth."
        )
    if not (trained and kept):
        print(f"Saved is the best classical solver, {solver!r}.")
    print(f"\nWritten to {folder}: {SOLVER}, {REPORT}\n\nIn your code:\n")
    print(textwrap.indent(_usage(problem, path, report["held_out"]["rtol"]), "    "))


def _contexts(x: Any) -> dict[str, Any]:
    """How many contexts there are, and which."""
    return {"contexts": userfunction.count(x), "digest": userfunction.digest(x)}


def _usage(problem: UserProblem, path: Path, rtol: float) -> str:
    """Lines to paste, which run where f, x and z0 are those of FUNCTION."""
    from metabroyden.meta.target import ModelMap, target_of

    target, imports = target_of(problem.f), "import metabroyden as mb"
    if isinstance(target.f, ModelMap):
        use = 'model.deq.f_solver = mb.integrations.torchdeq.register("learned", solver)  # model.deq: your torchdeq layer'
    elif target.whole is not None:
        use = f"{_layer(target.model)}.solver = solver"
    else:
        own = "z0(x)" if problem.z0 is not None else "f.initial_state(x)" if target.z0 is not None else None
        imports += "" if own else "\nimport torch"
        call = f"x, {own}" if problem.z0 is not None else "x"
        use = (
            f"solution = mb.solve(f, {own or 'torch.zeros_like(x)'}, x, solver=solver, rtol={rtol:g})\n"
            f"z = mb.DEQ(f, solver=solver, rtol={rtol:g})({call})  # the same as a layer, with gradients"
        )
    return f"{imports}\n\nsolver = mb.load_solver({json.dumps(path.as_posix())})\n{use}"


def _layer(model: Any) -> str:
    """What to call the DEQ of a model, or one that is given itself."""
    from metabroyden.meta.target import deqs_in

    name = next(iter(deqs_in(model)), "")
    if not name:
        return "deq"  # it is f itself
    return f"model.{name}" if all(map(str.isidentifier, name.split("."))) else f"model.get_submodule({name!r})"


# --- compare


def _compare(options: argparse.Namespace) -> None:
    import metabroyden as mb

    solvers = _loaded(options.solvers)
    _check_folder(options.out, COMPARED, options.overwrite)
    problem = _problem(options)
    _check_apart(options.function, problem, solvers)
    comparison = mb.compare(
        problem.f, problem.x_test, solvers=solvers, tune_on=problem.x_train, z0=problem.z0, rtol=options.rtol,
        max_nfe=options.max_nfe, metric=problem.metric, rounds=options.rounds,
        title=options.title or options.function, progress=options.progress,
    )  # fmt: skip
    print(comparison)
    page = comparison.save(options.out)
    figures = "figures, " if any(options.out.glob("*.png")) else ""
    print(f"\nWritten to {options.out}: {page.name}, the same as report.md, {figures}table.csv, {COMPARED}")


def _loaded(names: Sequence[str]) -> dict[str, Any]:
    """Solvers by short names that say what they are.

    A short name is a file's, its folder's where that is the usual one, or the whole path where two are alike. Behind it
    stands the kind of a classical solver, and that a fit has refused a solver.
    """
    solvers = {name: _load(name) for name in names}
    short = {name: _short(name) for name in names}
    titles = {name: _titled(name, short[name], solver) for name, solver in solvers.items()}
    alike = {name for name in names if list(titles.values()).count(titles[name]) > 1}
    return {_titled(name, name, one) if name in alike else titles[name]: one for name, one in solvers.items()}


def _load(name: str) -> Any:
    """A saved solver: a file, a folder (that `fit` wrote, too), or the name of one that comes with the package."""
    fitted = Path(name) / SOLVER
    return load_solver(fitted if fitted.is_file() else name)


def _short(name: str) -> str:
    path = Path(name)
    if path.name in (SOLVER, REFUSED):
        return path.resolve().parent.name
    return path.resolve().name if path.is_dir() else path.stem


def _titled(name: str, short: str, solver: Any) -> str:
    kind = "" if solver.is_learned else f" ({type(solver).__name__})"
    return f"{short}{kind}{', refused' if Path(name).name == REFUSED else ''}"


def _check_apart(function: str, problem: UserProblem, solvers: Mapping[str, Any]) -> None:
    """ValueError where solvers would be measured on contexts they were fitted to; a word where that cannot be told."""
    if problem.x_test is None:
        raise ValueError(
            f"{function} returns x_train alone, to which solvers are fitted: to compare them it must return x_test too"
        )
    if problem.x_train is None:
        return
    if shared := userfunction.shared_samples(problem.x_train, problem.x_test):
        raise ValueError(f"{shared} samples of x_test are in x_train, too: {function} must keep them apart")
    now = _contexts(problem.x_train)
    for name, solver in solvers.items():
        then = getattr(solver, "summary", {}).get("fitted_to", {})
        if then.get("function") == function and {**then, **now} != then:
            print(
                f"warning: {function} returns other contexts than when {name} was fitted to it: make sure that it was not "
                "fitted to these ones",
                file=sys.stderr,
            )


# --- list, info, new

_SPLITTING = {
    "forward-backward": "Forward–backward splitting, for monotone cells f = prox ∘ linear: a short step along f, then prox.",
    "peaceman-rachford": "Peaceman–Rachford splitting, for such cells: one linear solve a step, which may be longer.",
}
"""Solvers whose module holds several."""


def _list(options: argparse.Namespace) -> None:
    solvers = sorted(solver_types().items(), key=lambda item: (item[1].is_learned, item[0]))
    for learned, title in ((False, "Classical solvers"), (True, "Learned solvers, which `fit --solver` takes")):
        print(f"{title}:\n")
        for name, cls in solvers:
            if cls.is_learned == learned:
                words = _SPLITTING.get(name) or (sys.modules[cls.__module__].__doc__ or "").splitlines()[0]
                print(f"  {name:<28}{words}")
        print()
    print("Trained ones that come with the package, for `compare --solver`, `info` and mb.load_solver:\n")
    for name in list_pretrained():
        print(f"  {name:<28}{_in_words(load_solver(name))}")


def _in_words(solver: Any) -> str:
    if not solver.is_learned:
        return repr(solver)
    layout = (
        "any state"
        if solver.dimension_free
        else f"states of layout {solver.layout.kind}, {solver.layout.shape} a sample"
    )
    return f"{type(solver).__name__}, {layout}, {sum(p.numel() for p in solver.parameters()):,} weights"


def _info(options: argparse.Namespace) -> None:
    solver = _load(options.file)
    print(_in_words(solver))
    for key, value in _facts(solver):
        print(textwrap.fill(f"{key + ':':<12}{value}", 120, subsequent_indent=12 * " "))
    report = Path(options.file) / REPORT
    if held := getattr(solver, "summary", {}).get("held_out"):
        failed = "; ".join(held["failed_criteria"])
        print(f"\n{_held_out(held)}\n{f'It does not pay: {failed}.' if failed else 'It beats the classical solvers.'}")
    elif report.is_file():  # of a fit that saved a classical solver
        found = json.loads(report.read_text(encoding="utf-8"))
        refused = "; ".join(found["refused"])
        more = f"; the fitted one was refused: {refused}" if refused else ""
        print(f"\n{_held_out(found['held_out'])}\nSaved is {found['saved']}{more}.")


def _facts(solver: Any) -> Iterator[tuple[str, str]]:
    """What a file says of a solver, by what it is about."""
    yield "registered", str(name_of(solver))
    if not solver.is_learned:
        return
    summary, config = solver.summary, asdict(solver.config)
    yield "config", ", ".join(f"{name} {value}" for name, value in config.items())
    to = summary.get("fitted_to", {})
    weights = solver.fingerprint or "none (f was no module, or it was fitted to several)"
    yield (
        "fitted to",
        (f"{to['function']}, {to.get('contexts', 'some')} contexts; " if to else "") + f"weights {weights}",
    )
    training = summary.get("meta_training", {})
    rtol = summary.get("held_out", {}).get("rtol", training.get("validation_rtol"))
    if rtol is not None:
        yield "rtol", f"{rtol:g}"
    yield "training", ", ".join(_training(summary, training)) or "not said"


def _training(summary: Mapping[str, Any], training: Mapping[str, Any]) -> Iterator[str]:
    steps = summary.get("steps", training.get("steps"))
    if steps is not None:
        yield f"{steps} outer steps"
    if "unroll" in training:
        yield f"unrolls of {training['unroll']} × {training.get('segments', 1)}, {training['batch']} problems each"
    if "seconds" in summary:
        yield f"{summary['seconds']:.0f} s"
    if looks := summary.get("validation"):
        best = min(look["score"] for look in looks)
        yield f"evaluations on validation {looks[0]['score']:.1f} untrained, {best:.1f} at best"


def _held_out(held: Mapping[str, Any]) -> str:
    """The comparison that a fit has made, as a table."""
    from metabroyden.comparison.tables import listed, text_table

    rows = [{"solver": name, **one} for name, one in held["solvers"].items()]
    fastest = next(row for row in rows if row["solver"] == held["best_classical"])

    def over_fastest(row: dict[str, Any]) -> str:
        ratio = fastest["fitted_over_this"] / row["fitted_over_this"]
        return "1 (fastest)" if row is fastest else f"{ratio:.2f}"

    columns: list[tuple[str, Any]] = [
        ("solver", "{solver}"),
        ("median", "{median_evaluations:g}"),
        ("90%", "{p90_evaluations:.4g}"),
        ("mean", "{mean_evaluations:.1f}"),
        ("solved", "{success:.1%}"),
        ("time", lambda row: f"{1e3 * row['seconds']:.3g} ms"),
        ("vs fastest", over_fastest),
        ("elsewhere", "{elsewhere:.1%}"),
    ]
    if all("score" in row for row in rows):
        columns.append(("metric", "{score:.4g}"))
    words = f"{held['samples']} held-out problems to {held['rtol']:g}, at most {held['max_nfe']} evaluations each"
    return text_table(listed(words, rows, columns))


def _new(options: argparse.Namespace) -> None:
    path: Path = options.file
    if path.suffix != ".py":
        raise ValueError(f"the template is Python: FILE must end in .py, got {path}")
    if path.exists():
        raise ValueError(f"{path} is there already, and new overwrites nothing")
    text = resources.files("metabroyden").joinpath("template.py").read_text(encoding="utf-8")
    atomic_write(path, text.replace("template.py", path.as_posix()))
    print(
        f"Written: {path}. Put your model into it; as it stands it runs, too:\n\n    metabroyden fit "
        f"{path.as_posix()}:problem --out runs/{path.stem}"
    )


# --- what fit and compare share


@contextmanager
def _processes(f: Any, device: str | None) -> Iterator[bool]:
    """Join those that torchrun started, on the device of f unless one is given; yields whether this is the first one."""
    module = module_of(f)
    first = None if module is None else next(module.parameters(), None)
    with distributed.processes(distributed.resolve(device or ("cpu" if first is None else str(first.device)))):
        yield distributed.rank() == 0


def _check_folder(folder: Path, finished: str, overwrite: bool) -> None:
    """Make a folder where there is none; ValueError or OSError where it cannot be one, or has finished work to lose."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: give a folder")
    if (folder / finished).exists() and not overwrite:
        raise ValueError(f"{folder} holds a finished run ({finished}): give another folder, or --overwrite")
    folder.mkdir(parents=True, exist_ok=True)


def _problem(options: argparse.Namespace) -> UserProblem:
    """What FUNCTION returns, on the device that was asked for."""
    import torch
    from torch.utils import _pytree as pytree

    problem = load_problem(options.function)
    if options.device is None:
        return problem
    device = distributed.resolve(options.device)
    x_train, x_test = pytree.tree_map_only(
        torch.Tensor, lambda leaf: leaf.to(device), (problem.x_train, problem.x_test)
    )
    f = problem.f.to(device) if isinstance(problem.f, torch.nn.Module) else problem.f
    return replace(problem, f=f, x_train=x_train, x_test=x_test)
