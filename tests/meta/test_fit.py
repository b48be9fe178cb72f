"""`fit_solver`: what it chooses, what it returns, what it says, and what it refuses."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import metabroyden as mb
from experiments import fit
from experiments.bench.runner import read_rows
from metabroyden.compare import Comparison, SolverResult, by_sample, compare_solvers
from metabroyden.integrations.torchdeq import FixedPointMap
from metabroyden.learned import MetaBroyden, MetaSplitting
from metabroyden.learned.fingerprint import fingerprint
from metabroyden.learned.layout import LARGEST_PACKED
from metabroyden.meta.defaults import DAMPINGS, SOLVER_STEPS, context_options, schedule, state_layout
from metabroyden.meta.fit import _split
from metabroyden.meta.plan import measure_classical, plan
from metabroyden.meta.target import Inside, Target
from metabroyden.meta.tasks import TaskSet, count, rows
from metabroyden.meta.trainer import MetaTrainer
from metabroyden.solvers import classical, clock
from metabroyden.solvers.classical import splitting_solvers, tuned_solvers
from tests.meta.test_meta import Cell, contexts

pytestmark = pytest.mark.usefixtures("quick_fits")
EVERY = classical.grids


def fitted(f, x, **options):
    """What `fit_solver` makes, whether it pays or not."""
    return mb.fit_solver(f, x, **{"steps": 1, "progress": False, "fallback": False} | options)


def same_weights(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class Counted(Cell):
    """The cell, counting its calls."""

    calls = 0

    def forward(self, z, x):
        self.calls += 1
        return super().forward(z, x)


def by_calls(monkeypatch, f: Counted) -> None:
    """From now on a solve takes as many seconds as it calls f: the clock of an f that costs a lot."""
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: float(f.calls)))


# --- what is returned


def test_a_solver_that_wins_is_returned_and_serves_as_a_drop_in(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(classical, "grids", EVERY)
    cell = Counted()
    by_calls(monkeypatch, cell)
    solver = mb.fit_solver(cell, contexts(120), steps=45, seconds=100, progress=True)
    assert isinstance(solver, MetaBroyden)
    held = solver.summary["held_out"]
    assert held["failed_criteria"] == []
    assert held["samples"] == 24
    ours, best = held["solvers"]["metabroyden"], held["solvers"][held["best_classical"]]
    assert ours["mean_evaluations"] == held["mean_evaluations"] < 0.9 * best["mean_evaluations"]
    assert ours["seconds"] < best["seconds"]
    printed = capsys.readouterr().out
    for name, row in held["solvers"].items():
        (line,) = [line for line in printed.splitlines() if line.strip().split("  ")[0] == name]
        assert f"{row['mean_evaluations']:.1f}" in line
        assert f"{row['success']:.1%}" in line
    loaded = mb.load_solver(mb.save_solver(solver, tmp_path / "solver.safetensors"))
    assert loaded.summary == solver.summary
    deq, x = mb.DEQ(cell, solver=loaded), contexts(8, 5)
    with torch.no_grad():
        torch.testing.assert_close(deq(x), mb.DEQ(cell, rtol=1e-5)(x), rtol=0, atol=5e-3)
    assert deq.last_solution.nfe.float().mean() < 0.8 * mb.solve(cell, 0 * x, x, solver=mb.Broyden()).nfe.float().mean()


def test_a_solver_that_does_not_pay_is_refused_and_the_best_classical_one_serves_everywhere(tmp_path):
    """f(z) = −z/5 + x: damped by 5/6, Picard is there after one step."""

    class Easy(torch.nn.Module):
        def forward(self, z, x):
            return x - 0.2 * z

    cell, x = Easy(), torch.randn(60, 4)
    with pytest.warns(UserWarning, match=r"does not beat .* on 12 held-out problems to 0.001: .*Returned is \w+\("):
        solver = mb.fit_solver(cell, x, steps=1, progress=False)
    assert not solver.is_learned
    assert mb.load_solver(mb.save_solver(solver, tmp_path / "solver.safetensors")) == solver
    deq = mb.DEQ(cell, solver=solver, rtol=1e-5)
    torch.testing.assert_close(deq(x), x / 1.2, rtol=1e-3, atol=1e-3)
    assert mb.solve(cell, 0 * x, x, solver=solver).nfe.float().mean() <= 4
    refused = fitted(cell, x)  # a warning would be an error here
    assert isinstance(refused, MetaBroyden)
    assert refused.summary["held_out"]["failed_criteria"]


def standing(nfe, seconds, solved=None, solver=None) -> SolverResult:
    nfe = np.array(nfe)
    solved = np.ones(len(nfe), dtype=bool) if solved is None else np.array(solved)
    return SolverResult(solver, 60, nfe, solved, np.array(seconds))


def test_the_verdict_asks_for_success_evaluations_and_time_and_pairs_the_rounds():
    slow, quick = [2.0, 4.0, 6.0], [1.0, 2.0, 3.0]

    def failed(ours, *classical):
        names = [f"rival {number}" for number in range(len(classical))]
        return Comparison("ours", {"ours": ours, **dict(zip(names, classical, strict=True))}, 1e-3).failed_criteria

    assert failed(standing([3, 4], quick), standing([6, 8], slow)) == []
    assert failed(standing([3, 4], slow), standing([6, 8], quick)) == ["it takes 2.00 times as long as rival 0"]
    more = "it needs 7.0 evaluations in the mean, rival 0 3.5"
    assert failed(standing([6, 8], quick), standing([3, 4], slow)) == [more]
    less = failed(standing([3, 60], quick, [True, False]), standing([6, 8], slow))
    assert less[0] == "it solves 50.0%, rival 0 100.0%"
    assert less[1] == "it needs 61.5 evaluations in the mean, rival 0 7.0"
    # a quicker one that fails more does not count; as good is not better
    frail = standing([2, 60], [0.1] * 3, [True, False])
    assert failed(standing([3, 4], quick), standing([6, 8], slow), frail) == []
    assert len(failed(standing([3, 4], quick), standing([3, 4], quick))) == 2
    # by the rounds' ratios 0.9, 0.9, 3: the medians of the times alone would say the contrary
    assert failed(standing([3], [0.9, 9.0, 6.0]), standing([6], [1.0, 10.0, 2.0])) == []


def test_the_best_classical_solver_is_the_fastest_of_those_that_solve_most():
    frail = standing([2, 60], [0.1], [True, False])
    others = {"frail": frail, "quick": standing([8, 8], [2.0]), "frugal": standing([4, 4], [3.0])}
    race = Comparison("ours", {"ours": standing([9, 9], [1.0]), **others}, 1e-3)
    assert race.best == "quick"
    assert set(race.rivals) == {"quick", "frugal"}
    assert race.failed_criteria == ["it needs 9.0 evaluations in the mean, frugal 4.0"]


def test_a_classical_solver_that_fails_on_a_few_more_by_chance_is_a_rival_still():
    """Of 100 problems 90, 88 and 80: the standard error is 3%."""

    def solving(count, seconds):
        return standing([9] * count + [60] * (100 - count), seconds, [True] * count + [False] * (100 - count))

    others = {"sure": solving(90, [3.0]), "quick": solving(88, [1.0]), "frail": solving(80, [0.1])}
    race = Comparison("ours", {"ours": solving(89, [2.0]), **others}, 1e-3)
    assert set(race.rivals) == {"sure", "quick"}
    assert race.best == "quick"
    assert race.failed_criteria[0] == "it solves 89.0%, sure 90.0%"
    assert race.failed_criteria[-1] == "it takes 2.00 times as long as quick"


def test_the_figures_are_those_of_solves_on_a_share_that_chose_nothing(monkeypatch):
    cell, x = Counted(), contexts(60)
    by_calls(monkeypatch, cell)
    solver = fitted(cell, x, steps=2, rtol=1e-2)
    held = solver.summary["held_out"]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    group = torch.unique(x.reshape(60, -1), dim=0, return_inverse=True)[1]
    test, validation = x[(order[group] >= 12) & (order[group] < 24)], x[order[group] < 12]
    tuned = tuned_solvers(cell, torch.zeros_like(validation), validation, budget=60, tolerances=(1e-2,))
    assert {name: repr(one) for name, one in tuned.items()}.items() <= {
        name: row["config"] for name, row in held["solvers"].items()
    }.items()
    for name, one in {"metabroyden": solver, "Broyden, untuned": mb.Broyden(), **tuned}.items():
        row, before = held["solvers"][name], cell.calls
        found = mb.solve(cell, torch.zeros_like(test), test, solver=one, rtol=1e-2, max_nfe=60, throw=False)
        cost = torch.where(found.converged, found.nfe, 120)
        assert row["mean_evaluations"] == pytest.approx(float(cost.double().mean()))
        assert row["median_evaluations"] in cost.clamp(max=60).tolist()
        assert row["p90_evaluations"] == np.quantile(cost.clamp(max=60), 0.9, method="nearest")
        assert row["success"] == pytest.approx(float(found.converged.double().mean()))
        assert row["seconds"] == cell.calls - before
    assert held["solvers"]["metabroyden"]["fitted_over_this"] == 1


def test_the_table_needs_no_rich(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    race = Comparison(
        "ours", {"ours": standing([3, 4], [0.5]), "Picard": standing([60, 8], [1.0], [False, True])}, 1e-3
    )
    race.show()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].split() == ["solver", "median", "90%", "mean", "solved", "time", "ratio", "elsewhere"]
    assert lines[-2].split() == ["Picard", "8", "60", "64.0", "50.0%", "1000.0", "ms", "0.50×", "0.0%"]
    assert lines[-1].split() == ["ours", "3", "4", "3.5", "100.0%", "500.0", "ms", "1.00×", "0.0%"]


def test_cells_that_offer_their_parts_bring_operator_splitting_to_the_contest():
    from metabroyden.zoo.models import MonotoneDense

    cell, x = MonotoneDense(6, 3).requires_grad_(False), torch.randn(20, 6)
    assert set(splitting_solvers(cell, torch.zeros(20, 6), x, budget=40)) == {"forward-backward", "Peaceman-Rachford"}
    assert splitting_solvers(Cell(), contexts(3), contexts(3), budget=40) == {}


@pytest.mark.parametrize(("context", "kind"), [("auto", MetaSplitting), ("initial_value", MetaBroyden)])
def test_on_such_a_cell_what_is_fitted_steps_on_the_splittings_map(context, kind):
    from metabroyden.zoo.models import MonotoneDense

    torch.manual_seed(0)
    cell, x = MonotoneDense(12, 1), torch.randn(60, 12) + 1
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter *= 2
    solver = fitted(cell, x, steps=2, conditioning=context)
    assert type(solver) is kind
    held = solver.summary["held_out"]["solvers"]
    if kind is MetaSplitting:
        assert (
            solver.config.alpha
            == mb.PeacemanRachford.tuned(cell, *_validation(x), tolerances=(1e-3,), max_nfe=60).alpha
        )
        assert solver.trained_for == solver.summary["meta_training"]["unroll"]
    assert {"metabroyden", "Peaceman-Rachford", "forward-backward"} <= set(held)


def _validation(x):
    """(z0, x): a fifth of 60 samples, as `fit_solver` takes it."""
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    chosen = x[order[torch.unique(x, dim=0, return_inverse=True)[1]] < 12]
    return torch.zeros_like(chosen), chosen


def test_the_experiment_reports_what_is_returned(tmp_path, capsys):
    config = fit.Fit(
        family="dense-digits",
        steps=2,
        contexts=60,
        progress=False,
        results=tmp_path / "results",
        runs=tmp_path / "runs",
    )
    fit.run(config)
    fit.run(replace(config, family="monotone-dense-digits", rtol=1e-2))
    (trial,) = config.results.iterdir()
    assert {path.name for path in trial.iterdir()} == {
        "dense-digits-0.001-seed0", "monotone-dense-digits-0.01-seed0", "report.md"
    }  # fmt: skip
    rows = {path.parent.name: read_rows(path)[0] for path in trial.glob("*/rows.jsonl.gz")}
    assert {row["solver"] for row in rows.values()} == {"MetaBroyden", "MetaSplitting"}
    report = (trial / "report.md").read_text()
    for row in rows.values():
        (line,) = (line for line in report.splitlines() if line.startswith(f"| {row['family']}, seed 0"))
        returned = row["best_classical"] if row["failed_criteria"] else "**the fitted one**"
        assert line.split("|")[-3].strip() == returned
    with pytest.raises(ValueError, match="transformer-shakespeare is one of texts"):
        fit.run(replace(config, family="transformer-shakespeare"))


# --- defaults


def test_turns_are_taken_by_all_and_begun_by_each():
    assert list(clock.turns(["a", "b", "c"], 2)) == ["a", "b", "c", "b", "c", "a"]


def test_a_race_lasts_a_few_seconds_and_at_least_three_rounds(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: 0.5 * next(ticks)))
    solvers, z0 = {"Picard": mb.Picard(), "Broyden": mb.Broyden()}, torch.zeros(2, 1)
    for seconds, rounds in ((0.1, 3), (5.0, 5), (1e6, 15)):
        found, taken = clock.race(torch.cos, z0, None, solvers, rtol=1e-3, max_nfe=60, seconds=seconds)
        assert set(found) == set(taken) == set(solvers)
        assert all(times == [0.5] * rounds for times in taken.values())


def test_training_ends_with_its_time_and_short_ones_unroll_less():
    began = time.perf_counter()
    solver = fitted(Cell(), contexts(30), steps=100_000, seconds=1.0)
    assert time.perf_counter() - began < 30
    assert solver.summary["stopped"] == "budget"
    assert 1 <= solver.summary["seconds"] < 10
    training = solver.summary["meta_training"]
    assert training["segments"] == 1
    assert solver.trained_for == training["unroll"]


def test_an_unroll_has_half_of_the_steps_that_the_best_classical_solver_needs(monkeypatch):
    assert schedule(3.0) == (6, 1)
    assert schedule(13.2) == schedule(13.2, 2) == (7, 1)
    assert schedule(28.0, 2) == (14, 1)
    assert schedule(28.1, 2) == schedule(120.0, 2) == (14, 2)
    assert schedule(120.0) == (14, 1)
    seen, run = [], MetaTrainer.run
    monkeypatch.setattr(classical, "grids", EVERY)
    monkeypatch.setattr(MetaTrainer, "run", lambda self, report: (seen.append(self.config), run(self, report, until=1)))
    best = fitted(Cell(), contexts(40), steps=None).summary["held_out"]["solvers"]
    fewest = min(row["mean_evaluations"] for row in best.values() if "Meta" not in row["config"])
    (training,) = seen
    assert abs(2 * training.unroll - max(fewest, 12)) <= 3
    assert training.steps == 11_200 // (training.unroll * training.segments)


def test_training_stops_early_where_nothing_is_gained():
    solver = fitted(lambda z, x: 0 * z + x, torch.randn(20, 2), steps=40)
    assert solver.summary["stopped"] == "patience"
    assert solver.summary["steps"] == 20, "four looks, one every eighth of the steps"


def test_the_context_is_native_where_it_can_be_seen():
    cell, state = Cell(), contexts(4)

    def chosen(x, z=state, f=cell, conditioning="auto"):
        return context_options(f, state_layout(f, z, None), z, x, conditioning)

    assert chosen(contexts(4)) == {"conditioning": "input", "context_channels": 3}
    assert chosen(torch.zeros(4, 7, 4, 4)) == {"conditioning": "input", "context_channels": 7}
    assert chosen(torch.zeros(4, 5), z=torch.zeros(4, 9)) == {"conditioning": "input", "context_channels": 5}
    for x in (torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 4, 4).double(), torch.zeros(4, 3), torch.zeros(4).long()):
        assert chosen(x) == {"conditioning": "initial_value"}
        with pytest.raises(ValueError, match=r"conditioning='input' cannot be had: x must be .* got torch"):
            chosen(x, conditioning="input")
    assert chosen(contexts(4), conditioning="initial_value") == {"conditioning": "initial_value"}
    closure = FixedPointMap.__new__(FixedPointMap)
    assert chosen(contexts(4), f=closure) == {"conditioning": "initial_value"}
    with pytest.raises(ValueError, match="a torchdeq model solves a closure"):
        chosen(contexts(4), f=closure, conditioning="input")


def test_a_cells_own_layout_is_taken():
    class Sequence(torch.nn.Module):
        layout = "nct"

        def forward(self, z, x):
            return 0.3 * z + x

    solver = fitted(Sequence(), torch.randn(20, 3, 5))
    assert (solver.config.layout, solver.config.conditioning) == ("nct", "input")
    with pytest.raises(
        ValueError, match=r"it needs a context tensor with 3 .*got NoneType; .* conditioning='initial_value' needs none"
    ):
        mb.solve(lambda z: 0.3 * z, torch.zeros(2, 3, 5), solver=solver)


# --- states of several tensors


def test_a_state_of_scales_keeps_its_scales():
    def f(z, x):
        fine, coarse = z
        up = torch.nn.functional.interpolate(coarse, scale_factor=2)
        down = torch.nn.functional.avg_pool2d(fine, 2)
        return torch.tanh(0.4 * fine + 0.3 * up + x), torch.tanh(0.4 * coarse + 0.3 * down)

    def start(x):
        return torch.zeros_like(x), x.new_zeros(len(x), 2, 2, 2)

    x = torch.randn(30, 2, 4, 4)
    solver = fitted(f, x, z0=start, steps=2)
    assert solver.config.layout == "pyramid"
    assert solver.config.shape == ((2, 4, 4), (2, 2, 2))
    assert (solver.config.conditioning, solver.config.context_channels) == ("input", 8)
    found = mb.solve(f, start(x), x, solver=solver, rtol=1e-4, max_nfe=80)
    exact = mb.solve(f, start(x), x, solver=mb.Broyden(), rtol=1e-6, max_nfe=80, throw=False)
    for ours, star in zip(found.z, exact.z, strict=True):
        torch.testing.assert_close(ours, star, rtol=0, atol=1e-2)


def test_another_tuple_is_one_vector_and_the_solver_still_takes_the_tuple(tmp_path):
    def f(z, x):
        a, b = z
        return torch.tanh(0.5 * b[:, :, 0] + x), 0.3 * b + 0.2 * a.unsqueeze(2)

    def start(x):
        return torch.zeros_like(x), x.new_zeros(len(x), 3, 2)

    x = torch.randn(30, 3)
    solver = fitted(f, x, z0=start, steps=2)
    assert (solver.config.layout, solver.config.shape) == ("vector", (9,))
    loaded = mb.load_solver(mb.save_solver(solver, tmp_path / "solver.safetensors"))
    found = mb.solve(f, start(x), x, solver=loaded, rtol=1e-4)
    assert [part.shape for part in found.z] == [(30, 3), (30, 3, 2)]
    other = (torch.zeros(30, 3), torch.zeros(30, 4))
    with pytest.raises(ValueError, match=r"fitted to one tensor of shape \(9,\), got a state of 2: \[\(3,\), \(4,\)\]"):
        mb.solve(lambda z, x: z, other, x, solver=loaded)


def test_a_large_tuple_of_no_layout_is_refused_unless_asked_for():
    z = torch.zeros(2, LARGEST_PACKED), torch.zeros(2, 1)
    with pytest.raises(
        ValueError, match=r"no layout fits .* as one vector \(layout='vector'\) it has 8193 coordinates"
    ):
        state_layout(Cell(), z, None)
    assert state_layout(Cell(), z, "vector").shape == (LARGEST_PACKED + 1,)
    with pytest.raises(ValueError, match="of several tensors is 'pyramid', or 'vector' for one vector; got 'image'"):
        state_layout(Cell(), z, "image")
    with pytest.raises(ValueError, match="layout 'pyramid' wants at least two shapes"):
        state_layout(Cell(), z, "pyramid")


# --- arguments


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"f": 3}, TypeError, "callable"),
        ({"x_train": torch.zeros(4, 3, 4, 4)}, ValueError, r"at least 10 samples first, got \(4, 3, 4, 4\)"),
        ({"x_train": [1, 2]}, ValueError, "got list"),
        ({"x_train": torch.zeros(20, 3, 4, 4)}, ValueError, "at least three different samples, got 1"),
        (
            {"solver": "adam"},
            ValueError,
            "known are adjoint, coordinatewise, grouped, hyper-anderson, meta-broyden, meta-learner, meta-splitting, "
            "metabroyden, neural-fixed-point, started, universal",
        ),
        ({"solver": "meta-splitting"}, TypeError, "needs a cell with the methods linear, prox, resolvent"),
        ({"layout": "chw"}, ValueError, "layout must be one of"),
        ({"x_train": torch.randn(20, 3, 4)}, ValueError, "layout= is needed"),
        ({"steps": 0}, ValueError, "steps"),
        ({"x_train": torch.randint(0, 9, (20, 3, 4, 4))}, ValueError, "x_train is torch.int64.*give z0="),
        ({"x_train": torch.full((20, 3), torch.nan)}, ValueError, "x_train must be finite"),
        ({"z0": lambda x: torch.zeros(3, 3, 4, 4)}, ValueError, r"row for each of 4 contexts, got 3"),
        ({"z0": lambda x: (x, x[:1])}, ValueError, "must agree in batch size"),
        ({"z0": lambda x: [x, x]}, TypeError, "a tensor or a non-empty tuple of tensors, got list"),
        ({"seconds": 0}, ValueError, "seconds must be a positive number, or None for no limit, got 0"),
        ({"seconds": "1"}, ValueError, "seconds must be a positive number, or None for no limit, got '1'"),
        ({"patience": 0}, ValueError, "patience must be an integer of at least 1, got 0"),
        ({"conditioning": "x"}, ValueError, "conditioning must be one of auto, initial_value, input, got 'x'"),
        (
            {
                "f": lambda z, x: z,
                "x_train": torch.randint(0, 9, (20, 3)),
                "z0": lambda x: x.float(),
                "conditioning": "input",
            },
            ValueError,
            r"got torch.int64 of per-sample shape \(3,\)",
        ),
        ({"z0": torch.zeros(20, 3, 4, 4)}, TypeError, "z0 must be a map x → start, got Tensor"),
        ({"x_train": torch.randn(20)}, ValueError, "needs an axis besides the samples"),
        (
            {"x_train": torch.randn(20, 3).half()},
            ValueError,
            "float32, float64 or of an integer dtype, got torch.float16",
        ),
        ({"seed": "a"}, ValueError, "seed must be an integer, got 'a'"),
        ({"rtol": "1e-3"}, ValueError, "validation_rtol must be a positive number, got '1e-3'"),
        ({"f": lambda z, x: z[:, :1]}, ValueError, "f must return what z is shaped like"),
    ],
)
def test_fit_solver_refuses_bad_input(change, error, words):
    arguments = {"f": lambda z, x: 0.5 * z + x, "x_train": contexts(20), "progress": False, "steps": 2} | change
    with pytest.raises(error, match=words):
        mb.fit_solver(arguments.pop("f"), arguments.pop("x_train"), **arguments)


def test_f_may_compute_in_another_precision_and_no_grad_may_surround_the_fit():
    cell = Cell()
    with torch.no_grad():
        solver = fitted(lambda z, x: cell(z, x).bfloat16(), contexts(20), rtol=3e-2, steps=2)
    assert solver.summary["skipped_steps"] == 0


def test_a_fit_whose_gradients_blow_up_says_so():
    with pytest.warns(UserWarning, match="6 of 6 steps were skipped because their gradient was not finite"):
        fitted(lambda z, x: 1e30 * (z + x) ** 3, contexts(20), steps=6, patience=None)


def test_equal_contexts_stay_on_one_side_of_the_split():
    doubled = contexts(20).repeat(2, 1, 1, 1)
    solver = fitted(Cell(), doubled)
    assert solver.summary["held_out"]["samples"] == 8


# --- contexts of several tensors


def gated(z, c):
    return torch.tanh(0.5 * c["gain"] * z.roll(1, 1) + c["x"])


def parts(count: int = 40) -> dict:
    return {"x": torch.randn(count, 4), "gain": torch.rand(count, 1), "mode": "eval", "nothing": None}


def starts(c):
    return torch.zeros_like(c["x"])


@pytest.mark.parametrize("form", ["dict", "tuple", "list", "nested"])
def test_contexts_may_be_any_pytree_that_solve_takes(form):
    c = parts()
    pack = {
        "dict": (lambda c: c, lambda c: c),
        "tuple": (lambda c: (c["x"], c["gain"]), lambda c: {"x": c[0], "gain": c[1]}),
        "list": (lambda c: [c["x"], c["gain"], 3], lambda c: {"x": c[0], "gain": c[1]}),
        "nested": (lambda c: {"a": (c["gain"], {"b": c["x"]})}, lambda c: {"x": c["a"][1]["b"], "gain": c["a"][0]}),
    }[form]
    into, out = pack
    f = lambda z, c: gated(z, out(c))  # noqa: E731
    solver = fitted(f, into(c), z0=lambda c: starts(out(c)), steps=2)
    assert solver.config.conditioning == ("input" if form == "tuple" else "initial_value")
    assert solver.summary["held_out"]["samples"] == 8
    assert mb.solve(f, starts(c), into(c), solver=solver).converged.all()


def test_equal_samples_of_several_tensors_stay_on_one_side_and_others_may_share_a_tensor():
    c = parts(20)
    doubled = {"x": c["x"].repeat(2, 1), "gain": c["gain"].repeat(2, 1)}
    tasks = _split(Target(gated, None, starts), doubled, 0)
    assert [count(tasks.split(name)) for name in ("train", "validation", "test")] == [24, 8, 8]
    shared = {"x": c["x"][:1].expand(20, 4), "gain": c["gain"]}
    assert count(_split(Target(gated, None, starts), shared, 0).split("test")) == 4
    with pytest.raises(ValueError, match="a context of the validation split is in the train split"):
        TaskSet(gated, doubled, c, z0=starts)


def test_task_sets_of_several_tensors_draw_whole_samples():
    c = parts(30)
    c["x"] = torch.arange(30.0)[:, None].expand(30, 4)
    c["gain"] = torch.arange(30.0)[:, None]
    tasks = TaskSet(gated, rows(c, slice(20)), rows(c, slice(20, 30)), z0=starts)
    z0, x = tasks.draw(50, torch.Generator().manual_seed(0), slice(10, 40))
    assert z0.shape == (30, 4)
    assert torch.equal(x["x"][:, :1], x["gain"])
    assert int(x["gain"].max()) < 20
    assert (x["mode"], x["nothing"]) == ("eval", None)
    again = TaskSet(gated, rows(c, slice(20)), rows(c, slice(20, 30)), z0=starts)
    assert tasks.identity() == again.identity()
    c["gain"] += 1
    assert tasks.identity() != TaskSet(gated, rows(c, slice(20)), rows(c, slice(20, 30)), z0=starts).identity()
    made = tasks.prepared(6, torch.Generator().manual_seed(0), 3)
    _, x = made.problems("validation")
    assert (len(x["gain"]), x["mode"]) == (3, "eval")


@pytest.mark.parametrize(
    ("x", "z0", "error", "words"),
    [
        (parts(), None, ValueError, "x_train is dict, so the state cannot be zeros like it: give z0="),
        ({"x": torch.randn(20, 3), "y": torch.randn(19, 3)}, starts, ValueError, "batch first: wanted 20 rows"),
        ({"x": torch.randn(20, 3), "y": object()}, starts, TypeError, "tensors and plain values, got object"),
        ({"x": torch.randn(5, 3)}, starts, ValueError, "at least 10 samples first, got dict"),
        ({"x": torch.full((20, 3), torch.inf)}, starts, ValueError, "x_train must be finite"),
    ],
)
def test_what_are_no_contexts_is_refused_by_name(x, z0, error, words):
    with pytest.raises(error, match=words):
        mb.fit_solver(gated, x, z0=z0, steps=1, progress=False)


# --- a DEQ, and a model with one in it


class Small(torch.nn.Module):
    layout = "vector"

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, z, c):
        return torch.tanh(0.5 * self.linear(z) + c[0] * c[1])

    def initial_state(self, c):
        return torch.full_like(c[0], 0.1)


class Network(torch.nn.Module):
    """Inputs (B, 3) → logits, through a DEQ whose context is a tuple; with dropout before it."""

    def __init__(self, start: bool = False):
        super().__init__()
        self.stem, self.drop = torch.nn.Linear(3, 4), torch.nn.Dropout(0.5)
        self.deq, self.head = mb.DEQ(Small()), torch.nn.Linear(4, 2)
        self.start, self.seen = start, 0

    def context(self, x):
        return torch.tanh(self.drop(self.stem(x))), x[:, :1].exp()

    def forward(self, x):
        c = self.context(x)
        z = self.deq(c, torch.ones_like(c[0])) if self.start else self.deq(c)
        self.seen += 1
        return self.head(z)


def test_a_deq_is_fitted_for_its_cell():
    deq, c = mb.DEQ(Small()).train(), (torch.randn(40, 4), torch.ones(40, 1))
    same = fitted(deq.cell, c, steps=2)
    for f in (deq, deq.forward, torch.compile(deq, backend="eager")):
        solver = fitted(f, c, steps=2)
        assert same_weights(solver, same)
        assert solver.fingerprint == fingerprint(deq.cell)
        assert deq.training
        assert deq.cell.training


@pytest.mark.parametrize("start", [False, True])
def test_a_model_is_fitted_for_the_deq_inside_it(start, monkeypatch):
    model, x = Network(start).train(), torch.randn(40, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked = []
    usual = Small.forward
    monkeypatch.setattr(Small, "forward", lambda self, z, c: (asked.append((z, c)), usual(self, z, c))[1])
    solver = fitted(model, x, steps=2)
    z, c = asked[0]
    monkeypatch.undo()
    assert float(z[0, 0]) == pytest.approx(1.0 if start else 0.1)
    assert c[1].shape == (len(c[0]), 1)
    assert (solver.config.conditioning, solver.config.context_channels) == ("input", 4)
    assert same_weights(solver, fitted(model.forward, x, steps=2)), "a model's own forward is the model"
    assert solver.fingerprint == fingerprint(model.deq.cell)
    assert model.training
    assert model.seen == 0, "nothing behind the DEQ runs"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.deq.solver = solver
    model.eval()(x)
    assert model.deq.last_solution.converged.all()
    # the very problems of the model in evaluation mode
    with torch.no_grad():
        inside = Inside(model)
        for got, wanted in zip(inside.context(x), model.context(x), strict=True):
            assert torch.equal(got, wanted)


def test_models_that_other_functions_make_are_fitted_too():
    inner = mb.to_deq(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)))
    solver = fitted(inner, torch.randn(30, 4), layout="vector")
    assert solver.fingerprint == fingerprint(inner.cell)


def test_a_model_with_several_deqs_is_refused_and_told_their_names():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = mb.DEQ(Small()), mb.DEQ(Small())

        def forward(self, x):
            return self.second(self.first(x))

    with pytest.raises(ValueError, match=r"Two has 2 DEQs \(first, second\): give one of them \(such as model.first\)"):
        mb.fit_solver(Two(), torch.randn(20, 4), progress=False)


def test_a_map_with_a_deq_inside_is_not_taken_for_a_model_in_silence():
    class Nested(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.deq = mb.DEQ(Small())

        def forward(self, z, x):
            return 0.5 * z + x

    f, x = Nested(), torch.randn(20, 4)
    with pytest.raises(TypeError, match=r"Nested holds a DEQ \(deq\).*give `lambda z, x: f\(z, x\)`"):
        mb.fit_solver(f, x, steps=1, progress=False)
    fitted(lambda z, x: f(z, x), x)


def test_task_sets_take_a_deq_for_its_cell():
    deq, c = mb.DEQ(Small()), (torch.randn(20, 4), torch.ones(20, 1))
    tasks = TaskSet(deq, rows(c, slice(10)), rows(c, slice(10, 20)))
    assert tasks.f is deq.cell
    z0, _ = tasks.problems("validation")
    assert torch.equal(z0, torch.full((10, 4), 0.1))


# --- another equilibrium


@dataclass(frozen=True)
class Other(mb.Picard):
    """Picard from the other side: quicker to another of two stable equilibria, where `there` says so."""

    there: float = 0.0

    def start(self, z0, problem):
        first = problem.origin()
        other = problem.context[:, :1].abs() < self.there
        return torch.where(other, -3 * first.sign(), 3 * first.sign())


def double_well(z, x):
    """z⁺ = tanh(2.5 z + x): for small x two stable equilibria, near 1 and −1; from zero one goes to that of x's sign."""
    return torch.tanh(2.5 * z + x)


def two_wells(there: float, rivals=None, score=None, **options) -> Comparison:
    x = torch.linspace(-0.3, 0.3, 41)[:40, None] + 1e-3
    # a secant method from zero goes to the unstable one between them
    plain = {"Broyden, untuned": mb.Picard(), "Picard": mb.Picard(damping=0.9)}
    solvers = {**plain, **(rivals or {}), "ours": Other(there=there)}
    scored = None if score is None else by_sample(score, x)
    return compare_solvers(
        double_well, torch.zeros(40, 1), x, "ours", solvers, rtol=1e-3, max_nfe=60, score=scored, **options
    )


def test_a_solver_that_goes_to_another_equilibrium_is_told_apart_and_refused(capsys):
    same, apart = two_wells(0.0), two_wells(0.03)
    assert not [words for words in same.failed_criteria if "another solution" in words]
    figures = apart.summary()
    assert figures["solvers"]["ours"]["success"] == 1, "by their residuals all are solved"
    assert figures["solvers"]["ours"]["elsewhere"] == pytest.approx(4 / 40)
    assert figures["solvers"]["Picard"]["elsewhere"] == 0
    assert figures["reference"] == "Broyden, untuned"
    assert "it is at another solution than Broyden, untuned on 10.0% of the problems, " in apart.failed_criteria[-1]
    apart.show()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("ours ")]
    assert line.split()[-1] == "10.0%"


def test_where_classical_solvers_disagree_as_often_a_fitted_one_may_too():
    assert not [words for words in two_wells(0.03, {"third": Other(there=0.04)}).failed_criteria if "another" in words]
    assert [words for words in two_wells(0.2, {"third": Other(there=0.04)}).failed_criteria if "another" in words]


def test_an_honest_residual_on_an_ill_conditioned_problem_is_not_another_equilibrium():
    """f(z) = 0.99 z + x to 1e-3: solutions are up to 99 tolerances away; solved on, they come nearer."""
    x = torch.rand(40, 1) + 0.5
    solvers = {"Broyden, untuned": mb.Picard(), "Picard": mb.Picard(damping=0.9), "ours": mb.Picard(damping=0.95)}
    f = lambda z, x: 0.99 * z + x  # noqa: E731
    z = mb.solve(f, 0 * x, x, solver=solvers["ours"], rtol=1e-3, max_nfe=2000).z
    assert bool(((z - 100 * x).abs() > 0.01 * 100 * x).all()), "farther than ten tolerances"
    found = compare_solvers(f, 0 * x, x, "ours", solvers, rtol=1e-3, max_nfe=2000)
    assert found.fitted.apart == 0
    assert not [words for words in found.failed_criteria if "another" in words]


def test_only_samples_that_both_solve_are_compared():
    elsewhere, both = np.array([[1, 1, 0, 0], [0, 1, 1, 1]], bool)
    one = replace(standing([9] * 4, [1.0]), elsewhere=elsewhere, both=both)
    assert one.apart == pytest.approx(1 / 3)
    assert replace(one, both=np.zeros(4, bool)).apart == 0


def right(z, x):
    return (z.sign() == x.sign()).float().squeeze(1)


@pytest.mark.parametrize("score", [right, lambda z, x: right(z, x).mean(), lambda z, x: float(right(z, x).mean())])
def test_a_lower_score_is_a_shortfall_and_a_column(score, capsys):
    apart = two_wells(0.03, score=score)
    assert apart.summary()["solvers"]["ours"]["score"] == pytest.approx(0.9)
    assert apart.summary()["solvers"]["Picard"]["score"] == 1
    assert apart.failed_criteria[-1].startswith("it scores 0.9, ")
    assert not [words for words in two_wells(0.0, score=score).failed_criteria if "scores" in words]
    apart.show()
    assert capsys.readouterr().out.splitlines()[-2].split()[-1] == "0.9"


def test_a_fit_reports_the_score_on_what_was_held_out_with_labels_that_travel_along():
    c = {**parts(), "label": torch.arange(40)}
    seen = []

    def score(z, c):
        seen.append(c["label"])
        return -(z - gated(z, c)).norm(dim=1)

    solver = fitted(gated, c, z0=starts, score=score)
    held = solver.summary["held_out"]
    assert all(-0.1 < row["score"] <= 0 for row in held["solvers"].values())
    assert len(seen) == 1 + len(held["solvers"])  # once before the training
    assert len(seen[1]) == held["samples"] == 8
    json.dumps(held)
    with pytest.raises(ValueError, match=r"score\(z, x\) must give \(8,\) numbers, or their mean, got shape \(8, 4\)"):
        mb.fit_solver(gated, c, z0=starts, steps=1, progress=False, score=lambda z, c: z)
    with pytest.raises(TypeError, match="score must be a map"):
        mb.fit_solver(gated, c, z0=starts, score=3)


@pytest.mark.parametrize(
    ("score", "error", "words"),
    [
        (lambda z, c: z, ValueError, r"must give \(8,\) numbers, or their mean, got shape \(8, 4\)"),
        (lambda z, c: None, TypeError, r"score\(z, x\) must give numbers, or their mean, got NoneType"),
        (lambda z, c: 1 / 0, ZeroDivisionError, "division by zero"),
    ],
)
def test_a_score_that_cannot_be_used_is_refused_before_the_training(score, error, words, monkeypatch):
    monkeypatch.setattr("metabroyden.meta.fit.MetaTrainer", lambda *_, **__: pytest.fail("it was trained"))
    with pytest.raises(error, match=words):
        mb.fit_solver(gated, parts(), z0=starts, steps=1, progress=False, score=score)


class Plain(torch.nn.Module):
    def forward(self, z, x):
        return torch.tanh(0.5 * z + x)


class Shift(mb.DEQ):
    """A layer that does something to its inputs."""

    def forward(self, x, z0=None):
        return super().forward((x + 3, x[:, :1].exp()), z0)


class Inputs(torch.nn.Module):
    """A model whose inputs come with a tensor that all samples share."""

    def __init__(self):
        super().__init__()
        self.deq = mb.DEQ(Small())

    def forward(self, inputs):
        return self.deq((inputs["x"] @ inputs["w"], inputs["x"][:, :1]))


def test_what_a_subclass_of_the_layer_makes_of_its_inputs_is_what_its_solver_is_fitted_to():
    x = torch.randn(40, 4)
    alone = fitted(Shift(Small()), x)
    assert alone.config.context_channels == 4  # the first tensor of the tuple that forward makes
    for layer in (Shift(Small()), torch.nn.Sequential(Shift(Small()))):
        got = Inside(layer).context(x)
        assert torch.equal(got[0], x + 3)
        assert torch.equal(got[1], x[:, :1].exp())


def test_a_models_inputs_and_a_score_see_what_samples_share_without_its_mark():
    inputs = {"x": torch.randn(40, 4), "w": mb.Shared(0.5 * torch.eye(4))}
    score = lambda z, c: (z @ c["w"]).sum(1)  # noqa: E731
    solver = fitted(Inputs(), inputs, score=score)
    assert solver.config.conditioning == "input"
    assert all("score" in row for row in solver.summary["held_out"]["solvers"].values())


@pytest.mark.parametrize("gain", [torch.tensor(0.3), 0.3 * torch.eye(4).to_sparse()], ids=["scalar", "sparse"])
def test_what_samples_share_may_be_of_any_shape_and_layout_and_stand_first(gain):
    def f(z, c):
        return torch.tanh((c[0] * z if c[0].dim() == 0 else (c[0] @ z.T).T) + c[1])

    zeros = lambda c: torch.zeros_like(c[1])  # noqa: E731
    x = (mb.Shared(gain), torch.randn(40, 4))
    assert fitted(f, x, z0=zeros).config.conditioning == "initial_value"


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.randn(20, 4).to_sparse(), "x_train must be dense, got torch.sparse_coo"),
        (mb.Shared(torch.randn(20, 4)), "at least 10 samples first, got Shared"),
        ((torch.randn(20, 4), torch.tensor(0.3)), r"got shape \(\); if all samples share it, pass mb.Shared"),
    ],
)
def test_contexts_without_rows_are_refused_by_name(x, words):
    with pytest.raises(ValueError, match=words):
        mb.fit_solver(lambda z, c: 0.5 * z, x, z0=lambda c: torch.zeros(20, 4), steps=1, progress=False)


@pytest.mark.parametrize("fit_one", [mb.fit_solver, mb.fit_adjoint])
def test_a_layer_in_half_precision_is_told_to_be_fitted_before(fit_one):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), mb.DEQ(Plain()))
    with pytest.raises(ValueError, match=r"in torch.bfloat16.*fit it before the layer or model is taken to half"):
        fit_one(model.bfloat16(), torch.randn(20, 3).bfloat16(), progress=False)


def test_a_model_that_makes_several_samples_of_one_is_told_what_to_hand_over():
    class Folded(Network):
        def context(self, x):
            return super().context(x.reshape(-1, 3))

    with pytest.raises(ValueError, match=r"row for each of 4 contexts, got 8.*hand over the DEQ inside"):
        mb.fit_solver(Folded(), torch.randn(20, 2, 3), steps=1, progress=False)


def test_a_solver_is_fitted_to_contexts_that_share_a_tensor():
    w, x = 0.5 * torch.eye(6), torch.randn(60, 6)
    f = lambda z, c: torch.tanh(z @ c["w"] + c["x"])  # noqa: E731
    solver = fitted(f, {"x": x, "w": mb.Shared(w)}, z0=lambda c: torch.zeros_like(c["x"] @ c["w"]), steps=3)
    held = {"x": torch.randn(9, 6), "w": mb.Shared(w)}
    assert mb.solve(f, torch.zeros(9, 6), held, solver=solver).converged.all()


# --- the plan


def planned(f=None, **options):
    f = f or Cell()
    tasks = TaskSet(f, contexts(20), contexts(8, 1))
    classical = measure_classical(tasks, state_layout(f, contexts(2), None), rtol=1e-3, max_nfe=60)
    return plan(tasks, classical, **options), classical


def test_a_plan_is_what_fit_solver_trains_by():
    made, classical = planned(steps=3)
    assert (made.solver, made.layout.kind) == ("meta-broyden", "image")
    assert (made.options["conditioning"], made.options["context_channels"]) == ("input", 3)
    assert (made.training.unroll, made.training.segments) == schedule(classical.fewest, 2)
    assert made.options["schedule_length"] == made.training.unroll * made.training.segments
    assert made.options["damping"] in DAMPINGS
    assert made.build(contexts(2)).config.damping == made.options["damping"]


def test_overrides_take_the_place_of_choices_and_what_follows_from_them_follows():
    flat = {
        "unroll": 4,
        "segments": 6,
        "learning_rate": 2e-3,
        "damping": 0.5,
        "rank": 6,
        "conditioning": "initial_value",
    }
    made, _ = planned(overrides=flat)
    training = made.training
    assert (training.unroll, training.segments, training.learning_rate) == (4, 6, 2e-3)
    assert training.steps == SOLVER_STEPS // 24
    assert (made.options["schedule_length"], made.options["learned_steps"]) == (24, 36)
    assert (made.options["rank"], made.options["damping"]) == (6, 0.5)
    assert made.options["conditioning"] == "initial_value"
    other, _ = planned(overrides={"solver": "grouped", "hidden": 5})
    assert (other.solver, other.training.learning_rate, other.options["hidden"]) == ("grouped", 2e-3, 5)
    with pytest.raises(TypeError, match="unknown options for 'grouped': depth"):
        planned(overrides={"solver": "grouped", "depth": 5})[0].build(contexts(2))


def test_the_report_is_returned_also_after_a_fallback():
    f, x = (lambda z, x: x - 0.2 * z), torch.randn(60, 4)
    with pytest.warns(UserWarning, match="does not beat"):
        solver, report = mb.fit_solver(f, x, steps=1, progress=False, return_report=True)
    assert solver == report.results[report.best].solver
    assert (
        report.failed_criteria
        == report.summary()["failed_criteria"]
        == report.fitted.solver.summary["held_out"]["failed_criteria"]
    )
