"""`fit_solver`: what it chooses, what it returns, what it says, and what it refuses."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import metabroyden as mb
from metabroyden.comparison import clock, measure
from metabroyden.comparison.comparison import Comparison
from metabroyden.comparison.measure import Rules
from metabroyden.comparison.problems import HeldOut
from metabroyden.comparison.verdict import Verdict, compare_solvers, judge_of
from metabroyden.integrations.torchdeq import FixedPointMap
from metabroyden.learned import MetaBroyden, MetaSplitting
from metabroyden.learned.fingerprint import fingerprint
from metabroyden.learned.layout import LARGEST_PACKED, Layout
from metabroyden.meta.defaults import (
    DAMPINGS,
    EVALUATIONS_A_DECADE,
    context_options,
    expected_steps,
    schedule,
    segments,
    solver_steps,
    splitting_alpha,
    state_layout,
)
from metabroyden.meta.fit import _split, reasons
from metabroyden.meta.plan import make_learned, measure_classical, operations, plan
from metabroyden.meta.prospect import prospect
from metabroyden.meta.target import Inside, Target
from metabroyden.meta.tasks import TaskSet, count, rows
from metabroyden.meta.trainer import MetaTrainer
from metabroyden.solvers import classical
from metabroyden.solvers.classical import splitting_solvers, tuned_solvers
from metabroyden.zoo.models import MonotoneDense
from tests.helpers import ConvTanh, contexts, normal, refused, same_parameters

pytestmark = pytest.mark.usefixtures("quick_fits")
EVERY = classical.grids


def fitted(f, x, **options):
    """What `fit_solver` makes, whether it pays or not."""
    return mb.fit_solver(f, x, **{"steps": 1, "progress": False, "fallback": False} | options)


class Counted(ConvTanh):
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
    solver = mb.fit_solver(cell, contexts(120), steps=45, seconds=1e5, progress=True)
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


def test_a_solver_that_does_not_pay_is_refused_and_the_best_classical_one_serves_everywhere(tmp_path, monkeypatch):
    f, x = Counted(), contexts(60)
    by_calls(monkeypatch, f)
    with pytest.warns(UserWarning, match=r"does not beat .* on 12 held-out problems to 0.001: .*Returned is \w+\("):
        solver, report = mb.fit_solver(f, x, steps=1, progress=False, return_report=True)
    assert not solver.is_learned
    assert solver == report.solvers[report.best]
    held = report.fitted.summary["held_out"]
    assert report.failed_criteria == report.summary()["failed_criteria"] == held["failed_criteria"]
    assert mb.load_solver(mb.save_solver(solver, tmp_path / "solver.safetensors")) == solver
    assert mb.solve(f, 0 * x, x, solver=solver).converged.all()
    torch.testing.assert_close(mb.DEQ(f, solver=solver, rtol=1e-5)(x), mb.DEQ(f, rtol=1e-5)(x), rtol=0, atol=1e-3)
    kept = fitted(f, x)  # a warning would be an error here
    assert isinstance(kept, MetaBroyden)
    assert kept.summary["held_out"]["failed_criteria"]


# --- whether there is anything to gain


def easy(z, x):
    """Damped by 5/6, Picard is there after one step."""
    return x - 0.2 * z


NOTHING = r"nothing to gain: .* takes .* ms \(\d+\.\d evaluations .*even if it needed only 3.0, so nothing is trained"


def test_where_nothing_can_be_gained_it_says_so_trains_nothing_and_returns_the_fastest_classical(monkeypatch, tmp_path):
    monkeypatch.setattr("metabroyden.meta.fit.MetaTrainer", lambda *_, **__: pytest.fail("it was trained"))
    with pytest.warns(UserWarning, match=NOTHING) as said:
        solver, report = mb.fit_solver(easy, normal(60, 4), progress=False, return_report=True)
    assert len(said) == 1
    assert set(report.names) == {"Broyden", "tuned Picard", "tuned Anderson", "tuned Broyden"}
    assert solver == report.solvers[report.best if report.failed_criteria else "Broyden"]
    assert mb.load_solver(mb.save_solver(solver, tmp_path / "solver.safetensors")) == solver
    assert mb.solve(easy, torch.zeros(9, 4), normal(9, 4), solver=solver).nfe.max() <= 6


def test_a_training_that_was_asked_for_or_has_begun_is_not_called_off(tmp_path):
    assert fitted(easy, normal(60, 4)).is_learned
    path = tmp_path / "fit.safetensors"
    fitted(easy, normal(60, 4), checkpoint=path)
    with pytest.warns(UserWarning, match="does not beat"):
        mb.fit_solver(easy, normal(60, 4), steps=1, progress=False, checkpoint=path)


class Halving:
    """z/2 + x, counting its calls: as hard for every sample."""

    calls = 0

    def __call__(self, z, x):
        self.calls += 1
        return 0.5 * z + x


def test_the_prospect_is_a_third_of_the_evaluations_of_the_best_classical_solver_and_three(monkeypatch):
    """On the clock of an f that costs a lot."""
    f, x, seen = Halving(), torch.ones(8, 4), []
    by_calls(monkeypatch, f)
    learned = make_learned("meta-broyden", Layout("vector", (4,)), conditioning="initial_value")
    for rtol in (0.3, 0.1, 0.04, 0.01, 1e-4):
        needs = int(mb.solve(f, 0 * x, x, solver=mb.Picard(), rtol=rtol).nfe.max())
        found = prospect(f, 0 * x, x, learned, {"Picard": mb.Picard()}, fewest=needs, rtol=rtol, max_nfe=60)
        assert (found.evaluations, found.seconds) == (needs, needs)
        assert found.least == max(3, 0.35 * needs)
        assert found.learned_seconds == pytest.approx(found.least)
        assert found.name == ("Picard" if needs <= 3 else "f"), "where f's calls alone take longer, that is enough"
        assert found.hopeless is (needs <= 3)
        seen.append(found.hopeless)
    assert set(seen) == {True, False}
    # where that is not plain the classical solvers are timed, and the fastest of those that solve most counts
    rivals = {"slow": mb.Picard(0.1), "Picard": mb.Picard()}
    found = prospect(f, 0 * x, x, learned, rivals, fewest=1.0, rtol=1e-4, max_nfe=20)
    assert (found.name, found.evaluations, found.least) == ("Picard", 14, 0.35 * 14)
    assert not found.hopeless


SLOW, QUICK = [2.0, 4.0, 6.0], [1.0, 2.0, 3.0]


def standing(nfe, seconds, solved=None, **more):
    letters = ["C" if hit else "B" for hit in (len(nfe) * [True] if solved is None else solved)]
    laps = [{"total": second, "f": second} for second in seconds]
    return {"evaluations": nfe, "status": "".join(letters), "seconds": laps, "reference": "rival", **more}


def race(ours, **rivals) -> Verdict:
    same = {"row": "solve", "family": "", "tolerance": 1e-3, "budget": 60, "block": 0, "seed": None, "options": ""}
    kinds = {"ours": "learned", **dict.fromkeys(rivals, "classical")}
    every = {"ours": ours, **rivals}
    return Verdict(
        Comparison([{**same, "solver": name, "kind": kinds[name], **row} for name, row in every.items()]), "ours"
    )


def test_the_verdict_asks_for_success_evaluations_and_time_and_pairs_the_rounds():
    failed = lambda ours, **rivals: race(ours, **rivals).failed_criteria  # noqa: E731
    frail = standing([2, 60], [0.1] * 3, [True, False])
    assert failed(standing([3, 4], QUICK), rival=standing([6, 8], SLOW)) == []
    assert failed(standing([3, 4], SLOW), rival=standing([6, 8], QUICK)) == ["it takes 2.00 times as long as rival"]
    more = failed(standing([6, 8], QUICK), rival=standing([3, 4], SLOW))
    assert more == ["it needs 7.0 evaluations in the mean, rival 3.5"]
    less = failed(standing([3, 60], QUICK, [True, False]), rival=standing([6, 8], SLOW))
    assert less[:2] == [
        "it solves 50.0%, rival 100.0%",
        "it needs 61.5 evaluations in the mean, a failure counting twice the budget, rival 7.0",
    ]
    # a quicker one that fails more does not count; as good is not better
    assert failed(standing([3, 4], QUICK), rival=standing([6, 8], SLOW), frail=frail) == []
    assert len(failed(standing([3, 4], QUICK), rival=standing([3, 4], QUICK))) == 2
    # by the rounds' ratios 0.9, 0.9, 3: the medians of the times alone would say the contrary
    assert failed(standing([3], [0.9, 9.0, 6.0]), rival=standing([6], [1.0, 10.0, 2.0])) == []


def test_the_best_classical_solver_is_the_fastest_of_those_that_solve_most():
    """Give or take a standard error: of 100 problems 90, 88 and 80, and it is 3%."""
    frail = standing([2, 60], [0.1], [True, False])
    found = race(standing([9, 9], [1.0]), frail=frail, quick=standing([8, 8], [2.0]), frugal=standing([4, 4], [3.0]))
    assert (found.best, set(found.rivals)) == ("quick", {"quick", "frugal"})
    assert found.failed_criteria == ["it needs 9.0 evaluations in the mean, frugal 4.0"]

    def solving(count, seconds):
        return standing([9] * count + [60] * (100 - count), [seconds], [True] * count + [False] * (100 - count))

    found = race(solving(86, 2.0), sure=solving(90, 3.0), quick=solving(88, 1.0), frail=solving(80, 0.1))
    assert (found.best, set(found.rivals)) == ("quick", {"sure", "quick"})
    assert found.failed_criteria[0] == "it solves 86.0%, sure 90.0%"
    assert found.failed_criteria[-1] == "it takes 2.00 times as long as quick"
    assert "it solves" not in race(solving(88, 2.0), sure=solving(90, 3.0)).failed_criteria[0]


def held_apart(x, *places):
    """The samples of x, of 60, that `fit_solver` holds apart at these places of its order, as z0 and x."""
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    place = order[torch.unique(x.flatten(1), dim=0, return_inverse=True)[1]]
    chosen = x[(place >= places[0]) & (place < places[1])]
    return torch.zeros_like(chosen), chosen


def test_the_figures_are_those_of_solves_on_a_share_that_chose_nothing(monkeypatch):
    cell, x = Counted(), contexts(60)
    by_calls(monkeypatch, cell)
    solver = fitted(cell, x, steps=2, rtol=1e-2)
    held = solver.summary["held_out"]
    tuned = tuned_solvers(cell, *held_apart(x, 0, 12), budget=60, tolerances=(1e-2,))
    for name, one in {"metabroyden": solver, "Broyden": mb.Broyden(), **tuned}.items():
        row, before = held["solvers"][name], cell.calls
        if name in tuned:
            assert row["config"] == repr(one)
        z0, test = held_apart(x, 12, 24)
        found = mb.solve(cell, z0, test, solver=one, rtol=1e-2, max_nfe=60, throw=False)
        cost = torch.where(found.converged, found.nfe, 60)
        assert row["mean_evaluations"] == pytest.approx(float(cost.double().mean()))
        assert row["median_evaluations"] == np.median(cost)
        assert row["p90_evaluations"] == pytest.approx(np.quantile(cost, 0.9))
        assert row["success"] == pytest.approx(float(found.converged.double().mean()))
        assert row["seconds"] == cell.calls - before
    assert held["solvers"]["metabroyden"]["fitted_over_this"] == 1


def test_the_table_is_plain_text(capsys):
    race(standing([3, 4], [0.5]), Picard=standing([60, 8], [1.0], [False, True])).show()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 problems to 0.001, at most 60 evaluations each"
    assert lines[1].split()[:6] == ["solver", "median", "90%", "mean", "solved", "time"]
    assert lines[2].split() == ["ours", "3.5", "3.9", "3.5", "100.0%", "500", "ms", "0.10", "0.50"]
    assert lines[3].split() == ["Picard", "34", "54.8", "34.0", "50.0%", "1", "s", "1", "(best)", "1", "(fastest)"]


@pytest.mark.parametrize(("context", "kind"), [("auto", MetaSplitting), ("initial_value", MetaBroyden)])
def test_cells_that_offer_their_parts_bring_operator_splitting_to_the_contest_and_a_solver_for_it(context, kind):
    cell, x = MonotoneDense(12, 1), torch.randn(60, 12) + 1
    for parameter in cell.parameters():
        parameter.data *= 2
    names = {"forward-backward", "Peaceman-Rachford"}
    assert set(splitting_solvers(cell.requires_grad_(False), *held_apart(x, 0, 60), budget=40)) == names
    assert splitting_solvers(ConvTanh(), contexts(3), contexts(3), budget=40) == {}
    solver = fitted(cell, x, steps=2, conditioning=context)
    assert type(solver) is kind
    assert {"metabroyden"} | names <= set(solver.summary["held_out"]["solvers"])
    if kind is MetaSplitting:
        tuned = mb.PeacemanRachford.tuned(cell, *held_apart(x, 0, 12), tolerances=(1e-3,), max_nfe=60)
        assert solver.config.alpha == tuned.alpha
        assert solver.trained_for == solver.summary["meta_training"]["unroll"]


@pytest.mark.parametrize(("stiff", "more"), [(0.0, False), (30.0, True)])
def test_alpha_is_larger_where_few_stiff_directions_bound_peaceman_rachfords_own(stiff, more):
    cell, x = MonotoneDense(12, 1), torch.rand(40, 12) + 1
    first = torch.zeros(2, 12, 12)
    first[0, 0, 0] = stiff**0.5  # I − W = I + AᵀA has the eigenvalue 1 + stiff once, and 1
    cell.parametrizations.weight.original.data = first
    judged = {"tolerances": (1e-3,), "max_nfe": 60}
    best = mb.PeacemanRachford.tuned(cell, torch.zeros_like(x), x, **judged).alpha
    found = splitting_alpha(best, cell, torch.zeros_like(x), x, **judged)
    if more:
        rate = math.log10((1 + best / 2) / (1 - best / 2))  # decades an evaluation, by the eigenvalue 1
        assert found == pytest.approx(best / 2 / rate / EVALUATIONS_A_DECADE, rel=0.15)
        assert found > 1.5 * best
    else:
        assert found == best


# --- defaults


def test_all_take_turns_for_a_few_seconds_and_at_least_three_rounds(monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 3.0)
    assert list(clock.turns(["a", "b", "c"], 2)) == ["a", "b", "c", "b", "c", "a"]
    rules = Rules((1e-3,), rounds=None)
    assert [rules.rounds_to(1e-3, spent) for spent in (2.0, 0.6, 0.0)] == [3, 5, 15]


def test_training_ends_with_its_time_or_where_nothing_is_gained():
    began = time.perf_counter()
    solver = fitted(ConvTanh(), contexts(30), steps=100_000, seconds=1.0)
    assert time.perf_counter() - began < 30
    assert solver.summary["stopped"] == "budget"
    assert 0 < solver.summary["seconds"] < 1, "the second is of the whole call"
    training = solver.summary["meta_training"]
    assert solver.trained_for == training["unroll"] * training["segments"]
    stopped = fitted(lambda z, x: 0 * z + x, normal(20, 2), steps=40).summary
    assert (stopped["stopped"], stopped["steps"]) == ("patience", 20), "four looks, one every eighth of the steps"


def test_an_unroll_has_half_of_the_steps_that_the_best_classical_solver_needs(monkeypatch):
    assert [schedule(fewest) for fewest in (3.0, 13.2, 28.0, 120.0)] == [6, 7, 14, 14]
    assert [segments(10, most) for most in (3.0, 10.0, 10.5, 28.0, 60.0)] == [1, 1, 1, 1, 3]
    seen, run = [], MetaTrainer.run
    monkeypatch.setattr(classical, "grids", EVERY)
    monkeypatch.setattr(MetaTrainer, "run", lambda self, report: (seen.append(self.config), run(self, report, until=1)))
    best = fitted(ConvTanh(), contexts(40), steps=None).summary["held_out"]["solvers"]
    fewest = min(row["mean_evaluations"] for row in best.values() if "Meta" not in row["config"])
    (training,) = seen
    assert abs(2 * training.unroll - max(fewest, 12)) <= 3
    assert training.steps == 11_200 // expected_steps(training), "f costs next to nothing"
    later = expected_steps(replace(training, segments=3)) / expected_steps(replace(training, segments=1))
    assert 1 < later < 2, "later segments are of the samples that are left"
    assert expected_steps(replace(training, segments=3, drop_below=0.0)) == 3 * training.unroll


def test_the_context_is_native_where_it_can_be_seen():
    cell, state, first = ConvTanh(), contexts(4), {"conditioning": "initial_value"}

    def chosen(x, z=state, f=cell, conditioning="auto"):
        return context_options(f, state_layout(f, z, None), z, x, conditioning)

    assert chosen(contexts(4)) == {"conditioning": "input", "context_channels": 3}
    assert chosen(torch.zeros(4, 7, 4, 4)) == {"conditioning": "input", "context_channels": 7}
    assert chosen(torch.zeros(4, 5), z=torch.zeros(4, 9)) == {"conditioning": "input", "context_channels": 5}
    for x in (torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 4, 4).double(), torch.zeros(4, 3), torch.zeros(4).long()):
        assert chosen(x) == first
        with pytest.raises(ValueError, match=r"conditioning='input' cannot be had: x must be .* got torch"):
            chosen(x, conditioning="input")
    assert chosen(contexts(4), conditioning="initial_value") == first
    closure = FixedPointMap.__new__(FixedPointMap)
    assert chosen(contexts(4), f=closure) == first
    refused("a torchdeq model solves a closure", lambda: chosen(contexts(4), f=closure, conditioning="input"))


def test_a_cells_own_layout_is_taken():
    cell, x = nn.Module(), normal(20, 3, 5)
    cell.layout, cell.forward = "nct", lambda z, x: 0.3 * z + x
    solver = fitted(cell, x)
    assert (solver.config.layout, solver.config.conditioning) == ("nct", "input")
    words = r"it needs a context tensor with 3 .*got NoneType; .* conditioning='initial_value' needs none"
    refused(words, lambda: mb.solve(lambda z: 0.3 * z, torch.zeros(2, 3, 5), solver=solver))


# --- states of several tensors


def test_a_state_of_scales_keeps_its_scales():
    def f(z, x):
        up, down = functional.interpolate(z[1], scale_factor=2), functional.avg_pool2d(z[0], 2)
        return torch.tanh(0.4 * z[0] + 0.3 * up + x), torch.tanh(0.4 * z[1] + 0.3 * down)

    start = lambda x: (torch.zeros_like(x), x.new_zeros(len(x), 2, 2, 2))  # noqa: E731
    x = normal(30, 2, 4, 4)
    solver = fitted(f, x, z0=start, steps=2)
    assert (solver.config.layout, solver.config.shape) == ("pyramid", ((2, 4, 4), (2, 2, 2)))
    assert (solver.config.conditioning, solver.config.context_channels) == ("input", 8)
    found = mb.solve(f, start(x), x, solver=solver, rtol=1e-4, max_nfe=80)
    exact = mb.solve(f, start(x), x, solver=mb.Broyden(), rtol=1e-6, max_nfe=80, throw=False)
    for ours, star in zip(found.z, exact.z, strict=True):
        torch.testing.assert_close(ours, star, rtol=0, atol=1e-2)


def test_another_tuple_is_one_vector_and_the_solver_still_takes_the_tuple(tmp_path):
    def f(z, x):
        return torch.tanh(0.5 * z[1][:, :, 0] + x), 0.3 * z[1] + 0.2 * z[0].unsqueeze(2)

    start = lambda x: (torch.zeros_like(x), x.new_zeros(len(x), 3, 2))  # noqa: E731
    x = normal(30, 3)
    solver = fitted(f, x, z0=start, steps=2)
    assert (solver.config.layout, solver.config.shape) == ("vector", (9,))
    loaded = mb.load_solver(mb.save_solver(solver, tmp_path / "solver.safetensors"))
    found = mb.solve(f, start(x), x, solver=loaded, rtol=1e-4)
    assert [part.shape for part in found.z] == [(30, 3), (30, 3, 2)]
    other = (torch.zeros(30, 3), torch.zeros(30, 4))
    words = r"fitted to one tensor of shape \(9,\), got a state of 2: \[\(3,\), \(4,\)\]"
    refused(words, lambda: mb.solve(lambda z, x: z, other, x, solver=loaded))


def test_a_large_tuple_of_no_layout_is_refused_unless_asked_for():
    z, layout = (torch.zeros(2, LARGEST_PACKED), torch.zeros(2, 1)), lambda kind: state_layout(ConvTanh(), z, kind)
    refused(r"no layout fits .* as one vector \(layout='vector'\) it has 8193 coordinates", lambda: layout(None))
    assert layout("vector").shape == (LARGEST_PACKED + 1,)
    words = "of several tensors is 'pyramid', or 'vector' for one vector; got 'image'"
    refused(words, lambda: layout("image"))
    refused("layout 'pyramid' wants at least two shapes", lambda: layout("pyramid"))


# --- contexts of several tensors, some of which all samples share


def gated(z, c):
    return torch.tanh(0.5 * c["gain"] * z.roll(1, 1) + c["x"])


def parts(count: int = 40) -> dict:
    generator = torch.Generator().manual_seed(0)
    x, gain = torch.randn(count, 4, generator=generator), torch.rand(count, 1, generator=generator)
    return {"x": x, "gain": gain, "mode": "eval", "nothing": None}


def starts(c):
    return torch.zeros_like(c["x"])


C, EYE = parts(), torch.eye(4)
FORMS = {  # f, its contexts, the part of them that a state is like, and what the solver sees
    "dict": (gated, C, lambda c: c["x"], "initial_value"),
    "tuple": (lambda z, c: gated(z, {"x": c[0], "gain": c[1]}), (C["x"], C["gain"]), lambda c: c[0], "input"),
    "list": (lambda z, c: gated(z, {"x": c[0], "gain": c[1]}), [C["x"], C["gain"], 3], lambda c: c[0], "initial_value"),
    "nested": (
        lambda z, c: gated(z, {"x": c["a"][1]["b"], "gain": c["a"][0]}),
        {"a": (C["gain"], {"b": C["x"]})},
        lambda c: c["a"][1]["b"],
        "initial_value",
    ),
    "a shared scalar": (
        lambda z, c: torch.tanh(c[0] * z + c[1]),
        (mb.Shared(torch.tensor(0.3)), C["x"]),
        lambda c: c[1],
        "initial_value",
    ),
    "a shared sparse matrix": (
        lambda z, c: torch.tanh((c[0] @ z.T).T + c[1]),
        (mb.Shared(0.3 * EYE.to_sparse()), C["x"]),
        lambda c: c[1],
        "initial_value",
    ),
    "a shared matrix": (
        lambda z, c: torch.tanh(z @ c["w"] + c["x"]),
        {"x": C["x"], "w": mb.Shared(0.5 * EYE)},
        lambda c: c["x"] @ c["w"],
        "initial_value",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_contexts_may_be_any_pytree_that_solve_takes(form):
    f, x, like, conditioning = FORMS[form]
    solver = fitted(f, x, z0=lambda c: torch.zeros_like(like(c)), steps=2)
    assert solver.config.conditioning == conditioning
    assert solver.summary["held_out"]["samples"] == 8
    assert mb.solve(f, torch.zeros(40, 4), x, solver=solver).converged.all()


def test_equal_samples_stay_on_one_side_and_others_may_share_a_tensor():
    assert fitted(ConvTanh(), contexts(20).repeat(2, 1, 1, 1)).summary["held_out"]["samples"] == 8
    c = parts(20)
    doubled = {"x": c["x"].repeat(2, 1), "gain": c["gain"].repeat(2, 1)}
    tasks = _split(Target(gated, None, starts), doubled, 0)
    assert [count(tasks.split(name)) for name in ("train", "validation", "test")] == [24, 8, 8]
    shared = {"x": c["x"][:1].expand(20, 4), "gain": c["gain"]}
    assert count(_split(Target(gated, None, starts), shared, 0).split("test")) == 4
    words = "a context of the validation split is in the train split"
    refused(words, lambda: TaskSet(gated, doubled, c, z0=starts))


def test_task_sets_of_several_tensors_draw_whole_samples():
    c = parts(30)
    c["x"], c["gain"] = torch.arange(30.0)[:, None].expand(30, 4), torch.arange(30.0)[:, None]
    task_set = lambda: TaskSet(gated, rows(c, slice(20)), rows(c, slice(20, 30)), z0=starts)  # noqa: E731
    tasks = task_set()
    z0, x = tasks.draw(50, torch.Generator().manual_seed(0), slice(10, 40))
    assert z0.shape == (30, 4)
    assert torch.equal(x["x"][:, :1], x["gain"])
    assert int(x["gain"].max()) < 20
    assert (x["mode"], x["nothing"]) == ("eval", None)
    assert tasks.identity() == task_set().identity()
    c["gain"] += 1
    assert tasks.identity() != task_set().identity()
    _, x = tasks.prepared(6, torch.Generator().manual_seed(0), 3).problems("validation")
    assert (len(x["gain"]), x["mode"]) == (3, "eval")


def test_f_may_compute_in_another_precision_and_no_grad_may_surround_the_fit():
    cell = ConvTanh()
    with torch.no_grad():
        solver = fitted(lambda z, x: cell(z, x).bfloat16(), contexts(20), rtol=3e-2, steps=2)
    assert solver.summary["skipped_steps"] == 0


def test_a_fit_whose_gradients_blow_up_says_so():
    with pytest.warns(UserWarning, match="6 of 6 steps were skipped because their gradient was not finite"):
        fitted(lambda z, x: 1e30 * (z + x) ** 3, contexts(20), steps=6, patience=None)


# --- a DEQ, and a model with one in it


class Small(nn.Module):
    layout = "vector"

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, z, c):
        return torch.tanh(0.5 * self.linear(z) + c[0] * c[1])

    def initial_state(self, c):
        return torch.full_like(c[0], 0.1)


class Network(nn.Module):
    """Inputs (B, 3) → logits, through a DEQ whose context is a tuple; with dropout before it."""

    def __init__(self, start: bool = False):
        super().__init__()
        self.stem, self.drop = nn.Linear(3, 4), nn.Dropout(0.5)
        self.deq, self.head = mb.DEQ(Small()), nn.Linear(4, 2)
        self.start, self.seen = start, 0

    def context(self, x):
        return torch.tanh(self.drop(self.stem(x))), x[:, :1].exp()

    def forward(self, x):
        c = self.context(x)
        z = self.deq(c, torch.ones_like(c[0])) if self.start else self.deq(c)
        self.seen += 1
        return self.head(z)


class Folded(Network):
    def context(self, x):
        return super().context(x.reshape(-1, 3))


class Shift(mb.DEQ):
    """A layer that does something to its inputs."""

    def forward(self, x, z0=None):
        return super().forward((x + 3, x[:, :1].exp()), z0)


class Inputs(nn.Module):
    """A model whose inputs come with a tensor that all samples share."""

    def __init__(self):
        super().__init__()
        self.deq = mb.DEQ(Small())

    def forward(self, inputs):
        return self.deq((inputs["x"] @ inputs["w"], inputs["x"][:, :1]))


class Nested(Inputs):
    """A map with a DEQ in it that it does not use."""

    def forward(self, z, x):
        return 0.5 * z + x


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = mb.DEQ(Small()), mb.DEQ(Small())


def test_a_deq_is_fitted_for_its_cell():
    deq, c = mb.DEQ(Small()).train(), (normal(40, 4), torch.ones(40, 1))
    same = fitted(deq.cell, c, steps=2)
    for f in (deq, deq.forward, torch.compile(deq, backend="eager")):
        solver = fitted(f, c, steps=2)
        assert same_parameters(solver, same)
        assert solver.fingerprint == fingerprint(deq.cell)
        assert deq.training
        assert deq.cell.training
    tasks = TaskSet(deq, rows(c, slice(10)), rows(c, slice(10, 20)))
    assert tasks.f is deq.cell
    assert torch.equal(tasks.problems("validation")[0], torch.full((10, 4), 0.1))


@pytest.mark.parametrize("start", [False, True])
def test_a_model_is_fitted_for_the_deq_inside_it(start, monkeypatch):
    model, x = Network(start).train(), normal(40, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked, usual = [], Small.forward
    monkeypatch.setattr(Small, "forward", lambda self, z, c: (asked.append((z, c)), usual(self, z, c))[1])
    solver = fitted(model, x, steps=2)
    z, c = asked[0]
    monkeypatch.undo()
    assert float(z[0, 0]) == pytest.approx(1.0 if start else 0.1)
    assert c[1].shape == (len(c[0]), 1)
    assert (solver.config.conditioning, solver.config.context_channels) == ("input", 4)
    assert same_parameters(solver, fitted(model.forward, x, steps=2)), "a model's own forward is the model"
    assert solver.fingerprint == fingerprint(model.deq.cell)
    assert model.training
    assert model.seen == 0, "nothing behind the DEQ runs"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.deq.solver = solver
    model.eval()(x)
    assert model.deq.last_solution.converged.all()
    with torch.no_grad():  # the very problems of the model in evaluation mode
        for got, wanted in zip(Inside(model).context(x), model.context(x), strict=True):
            assert torch.equal(got, wanted)


def test_models_that_other_functions_make_and_maps_with_an_idle_deq_are_fitted_too():
    inner = mb.to_deq(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
    assert fitted(inner, normal(30, 4), layout="vector").fingerprint == fingerprint(inner.cell)
    f = Nested()
    fitted(lambda z, x: f(z, x), normal(20, 4))


def test_what_a_subclass_of_the_layer_makes_of_its_inputs_is_what_its_solver_is_fitted_to():
    x = normal(40, 4)
    assert fitted(Shift(Small()), x).config.context_channels == 4  # the first tensor of the tuple that forward makes
    for layer in (Shift(Small()), nn.Sequential(Shift(Small()))):
        got = Inside(layer).context(x)
        assert torch.equal(got[0], x + 3)
        assert torch.equal(got[1], x[:, :1].exp())


# --- another equilibrium, another score


@dataclass(frozen=True)
class Other(mb.Picard):
    """Picard from the other side: quicker to another of two stable equilibria, where `there` says so."""

    there: float = 0.0

    def start(self, z0, problem):
        sign = problem.origin().sign()
        return torch.where(problem.context[:, :1].abs() < self.there, -3 * sign, 3 * sign)


def two_wells(there: float, rivals=None, score=None) -> Verdict:
    """On z⁺ = tanh(2.5 z + x): for small x two stable equilibria, near 1 and −1; from zero one goes to that of x's sign."""
    x = torch.linspace(-0.3, 0.3, 41)[:40, None] + 1e-3
    # a secant method from zero goes to the unstable one between them
    plain = {"Broyden": mb.Picard(), "Picard": mb.Picard(damping=0.9)}
    solvers = {**plain, **(rivals or {}), "ours": Other(there=there)}
    judge = None if score is None else judge_of(score, x)
    held = HeldOut(lambda z, x: torch.tanh(2.5 * z + x), torch.zeros(40, 1), x, judge)
    return compare_solvers(held, "ours", solvers, rtol=1e-3, max_nfe=60)


def said_apart(found: Verdict) -> bool:
    return any("another solution" in words for words in found.failed_criteria)


def test_a_solver_that_goes_to_another_equilibrium_is_told_apart_and_refused(capsys):
    assert not said_apart(two_wells(0.0))
    apart = two_wells(0.06)
    figures = apart.summary()
    assert figures["solvers"]["ours"]["success"] == 1, "by their residuals all are solved"
    assert figures["solvers"]["ours"]["elsewhere"] == pytest.approx(8 / 40)
    assert figures["solvers"]["Picard"]["elsewhere"] == 0
    assert figures["reference"] == "Broyden"
    assert "it is at another solution than Broyden on 20.0% of the problems, " in apart.failed_criteria[-1]
    apart.show()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("ours ")]
    assert line.split()[-1] == "20.0%"
    assert not said_apart(two_wells(0.01)), "one of forty is no evidence"
    # where classical solvers disagree as often a fitted one may too
    third = {"third": Other(there=0.04)}
    assert not said_apart(two_wells(0.03, third))
    assert said_apart(two_wells(0.2, third))


def test_an_honest_residual_on_an_ill_conditioned_problem_is_not_another_equilibrium():
    """f(z) = 0.99 z + x to 1e-3: solutions are up to 99 tolerances away; solved on, they come nearer."""
    f, x = (lambda z, x: 0.99 * z + x), torch.rand(40, 1) + 0.5
    solvers = {"Broyden": mb.Picard(), "Picard": mb.Picard(damping=0.9), "ours": mb.Picard(damping=0.95)}
    z = mb.solve(f, 0 * x, x, solver=solvers["ours"], rtol=1e-3, max_nfe=2000).z
    assert bool(((z - 100 * x).abs() > 0.01 * 100 * x).all()), "farther than ten tolerances"
    found = compare_solvers(HeldOut(f, 0 * x, x), "ours", solvers, rtol=1e-3, max_nfe=2000)
    assert found.summary()["solvers"]["ours"]["elsewhere"] == 0
    assert not said_apart(found)


def test_only_samples_that_both_solve_are_compared():
    one, rival = (
        standing([9] * 10, [1.0], elsewhere=[None] + [1] * 6 + [0] * 3),
        standing([9] * 10, [1.0], elsewhere=[0] * 10),
    )
    found = race(one, rival=rival)
    assert found.summary()["solvers"]["ours"]["elsewhere"] == pytest.approx(2 / 3)
    assert said_apart(found)
    assert not said_apart(race({**one, "elsewhere": [None, 1] + [0] * 8}, rival=rival)), "one of nine is no evidence"
    assert not said_apart(race({**one, "elsewhere": [None] * 10}, rival=one))


def right(z, x):
    return (z.sign() == x.sign()).float().squeeze(1)


def test_a_refusal_names_the_scores_beside_its_reasons():
    def refusal(ours: float, theirs: float) -> str:
        one, other = standing([9] * 4, [2.0]), standing([8] * 4, [1.0])
        return reasons(race({**one, "score": [ours] * 4}, rival={**other, "score": [theirs] * 4}))

    plain = "; ".join(race(standing([9] * 4, [2.0]), rival=standing([8] * 4, [1.0])).failed_criteria)
    assert plain == reasons(race(standing([9] * 4, [2.0]), rival=standing([8] * 4, [1.0])))
    assert refusal(0.977, 0.945) == f"{plain} (by your metric it scores 0.977, rival 0.945)"
    assert refusal(0.9, 0.945) == f"{plain}; it scores 0.9, rival 0.945"


@pytest.mark.parametrize("score", [right, lambda z, x: right(z, x).mean(), lambda z, x: float(right(z, x).mean())])
def test_a_lower_score_is_a_shortfall_and_a_column(score, capsys):
    apart = two_wells(0.03, score=score)
    assert apart.summary()["solvers"]["ours"]["score"] == pytest.approx(0.9)
    assert apart.summary()["solvers"]["Picard"]["score"] == 1
    assert apart.failed_criteria[-1].startswith("it scores 0.9, ")
    assert not [words for words in two_wells(0.0, score=score).failed_criteria if "scores" in words]
    apart.show()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ours ")]
    assert line.split()[-1] == "0.9"


def test_a_fit_reports_the_score_on_what_was_held_out_with_labels_that_travel_along():
    c, seen = {**parts(), "label": torch.arange(40)}, []

    def score(z, c):
        seen.append(c["label"])
        return -(z - gated(z, c)).norm(dim=1)

    held = fitted(gated, c, z0=starts, metric=score).summary["held_out"]
    assert all(-0.1 < row["score"] <= 0 for row in held["solvers"].values())
    assert len(seen) == 1 + len(held["solvers"])  # once before the training
    assert len(seen[1]) == held["samples"] == 8
    json.dumps(held)


def test_a_models_inputs_and_a_score_see_what_samples_share_without_its_mark():
    inputs = {"x": normal(40, 4), "w": mb.Shared(0.5 * EYE)}
    solver = fitted(Inputs(), inputs, metric=lambda z, c: (z @ c["w"]).sum(1))
    assert solver.config.conditioning == "input"
    assert all("score" in row for row in solver.summary["held_out"]["solvers"].values())


# --- what is refused, before any training

NAMES = (
    "adjoint, coordinatewise, grouped, hyper-anderson, meta-broyden, meta-learner, meta-splitting, metabroyden, "
    "neural-fixed-point, started, universal"
)
TUPLES = {"f": gated, "x_train": C, "z0": starts}
INTEGERS = torch.randint(0, 9, (20, 3, 4, 4))
REFUSED = [
    ("callable", TypeError, {"f": 3}),
    (r"at least 10 samples first, got \(4, 3, 4, 4\)", ValueError, {"x_train": torch.zeros(4, 3, 4, 4)}),
    (
        r"if its 30 points do not see one another, give lambda z, x: f\(z\[None\], x\[None\]\)\[0\] and x\[0\]",
        ValueError,
        {"x_train": torch.zeros(1, 30, 4)},
    ),
    ("got list", ValueError, {"x_train": [1, 2]}),
    ("at least three different samples, got 1", ValueError, {"x_train": torch.zeros(20, 3, 4, 4)}),
    (f"known are {NAMES}", ValueError, {"solver": "adam"}),
    ("needs a cell with the methods linear, prox, resolvent", TypeError, {"solver": "meta-splitting"}),
    ("layout must be one of", ValueError, {"layout": "chw"}),
    ("layout= is needed", ValueError, {"x_train": normal(20, 3, 4)}),
    ("steps", ValueError, {"steps": 0}),
    ("x_train is torch.int64.*give z0=", ValueError, {"x_train": INTEGERS}),
    ("x_train must be finite", ValueError, {"x_train": torch.full((20, 3), torch.nan)}),
    ("row for each of 4 contexts, got 3", ValueError, {"z0": lambda x: torch.zeros(3, 3, 4, 4)}),
    ("must agree in batch size", ValueError, {"z0": lambda x: (x, x[:1])}),
    ("a tensor or a non-empty tuple of tensors, got list", TypeError, {"z0": lambda x: [x, x]}),
    ("seconds must be a positive number, or None for no limit, got 0", ValueError, {"seconds": 0}),
    ("seconds must be a positive number, or None for no limit, got '1'", ValueError, {"seconds": "1"}),
    ("patience must be an integer of at least 1, got 0", ValueError, {"patience": 0}),
    ("conditioning must be one of auto, initial_value, input, got 'x'", ValueError, {"conditioning": "x"}),
    (
        r"got torch.int64 of per-sample shape \(3,\)",
        ValueError,
        {"f": lambda z, x: z, "x_train": INTEGERS[:, :, 0, 0], "z0": lambda x: x.float(), "conditioning": "input"},
    ),
    ("z0 must be a map x → start, got Tensor", TypeError, {"z0": torch.zeros(20, 3, 4, 4)}),
    ("needs an axis besides the samples", ValueError, {"x_train": normal(20)}),
    ("float32, float64 or of an integer dtype, got torch.float16", ValueError, {"x_train": normal(20, 3).half()}),
    ("seed must be an integer, got 'a'", ValueError, {"seed": "a"}),
    ("validation_rtol must be a positive number, got '1e-3'", ValueError, {"rtol": "1e-3"}),
    ("f must return what z is shaped like", ValueError, {"f": lambda z, x: z[:, :1]}),
    ("x_train is dict, so the state cannot be zeros like it: give z0=", ValueError, TUPLES | {"z0": None}),
    ("wanted 20 rows", ValueError, TUPLES | {"x_train": {"x": torch.zeros(20, 3), "y": torch.zeros(19, 3)}}),
    ("and plain values, got object", TypeError, TUPLES | {"x_train": {"x": torch.zeros(20, 3), "y": object()}}),
    ("at least 10 samples first, got dict", ValueError, TUPLES | {"x_train": {"x": normal(5, 3)}}),
    ("x_train must be finite", ValueError, TUPLES | {"x_train": {"x": torch.full((20, 3), torch.inf)}}),
    ("x_train must be dense, got torch.sparse_coo", ValueError, {"x_train": normal(20, 4).to_sparse()}),
    ("at least 10 samples first, got Shared", ValueError, {"x_train": mb.Shared(normal(20, 4))}),
    (
        r"got shape \(\); if all samples share it, pass mb.Shared",
        ValueError,
        {"x_train": (normal(20, 4), torch.tensor(0.3)), "z0": lambda c: torch.zeros(20, 4)},
    ),
    ("metric must be a map", TypeError, TUPLES | {"metric": 3}),
    (r"\(8,\) numbers, or their mean, got shape \(8, 4\)", ValueError, TUPLES | {"metric": lambda z, c: z}),
    ("give numbers, or their mean, got NoneType", TypeError, TUPLES | {"metric": lambda z, c: None}),
    ("division by zero", ZeroDivisionError, TUPLES | {"metric": lambda z, c: 1 / 0}),
    (
        r"Two has 2 DEQs \(first, second\): give one of them \(such as model.first\)",
        ValueError,
        {"f": Two(), "x_train": normal(20, 4)},
    ),
    (
        r"Nested holds a DEQ \(deq\).*give `lambda z, x: f\(z, x\)`",
        TypeError,
        {"f": Nested(), "x_train": normal(20, 4)},
    ),
    (
        r"row for each of 4 contexts, got 8.*hand over the DEQ inside",
        ValueError,
        {"f": Folded(), "x_train": normal(20, 2, 3)},
    ),
]


@pytest.mark.parametrize(("words", "error", "change"), REFUSED)
def test_fit_solver_refuses_bad_input(words, error, change, monkeypatch):
    monkeypatch.setattr("metabroyden.meta.fit.MetaTrainer.run", lambda *_, **__: pytest.fail("it was trained"))
    arguments = {"f": lambda z, x: 0.5 * z + x, "x_train": contexts(20), "progress": False, "steps": 2} | change
    refused(words, lambda: mb.fit_solver(arguments.pop("f"), arguments.pop("x_train"), **arguments), error)


@pytest.mark.parametrize("fit_one", [mb.fit_solver, mb.fit_adjoint])
def test_a_layer_in_half_precision_is_told_to_be_fitted_before(fit_one):
    model = nn.Sequential(nn.Linear(3, 4), mb.DEQ(Small())).bfloat16()
    words = r"in torch.bfloat16.*fit it before the layer or model is taken to half"
    refused(words, lambda: fit_one(model, normal(20, 3).bfloat16(), progress=False))


# --- the plan


def planned(**options):
    tasks = TaskSet(ConvTanh(), contexts(20), contexts(8, 1))
    classical = measure_classical(tasks, rtol=1e-3, max_nfe=60)
    return plan(tasks, classical, **options), classical


def test_a_plan_is_what_fit_solver_trains_by():
    made, classical = planned(steps=3)
    assert (made.solver, made.layout.kind) == ("meta-broyden", "image")
    assert (made.options["conditioning"], made.options["context_channels"]) == ("input", 3)
    assert made.training.unroll == schedule(classical.fewest)
    assert made.training.segments == segments(made.training.unroll, classical.most)
    assert made.training.drop_below == 1e-3
    assert classical.fewest <= classical.most <= 60
    assert made.options["schedule_length"] == made.training.unroll * made.training.segments
    assert made.options["damping"] in DAMPINGS
    assert made.build(contexts(2)).config.damping == made.options["damping"]


def test_a_fused_transformer_layer_is_counted():
    layer = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, batch_first=True).eval().requires_grad_(False)
    products = 2 * 5 * (4 * 8 * 8 + 2 * 8 * 32)  # attention itself comes on top
    counted = operations(lambda z, x: layer(z + x), torch.zeros(3, 5, 8), normal(3, 5, 8))
    assert products <= counted < 2 * products
    assert torch.backends.mha.get_fastpath_enabled()


def test_overrides_take_the_place_of_choices_and_what_follows_from_them_follows():
    flat = {"unroll": 4, "segments": 6, "learning_rate": 2e-3, "damping": 0.5, "rank": 6}
    made, classical = planned(overrides={**flat, "conditioning": "initial_value"})
    training = made.training
    assert (training.unroll, training.segments, training.learning_rate) == (4, 6, 2e-3)
    assert training.steps == solver_steps(operations(*classical.problems)) // 24
    assert solver_steps(0.0) == solver_steps(1e5) == 11_200
    assert (solver_steps(1.25e6), solver_steps(1e12)) == (7_000, 3_000)
    assert (made.options["schedule_length"], made.options["learned_steps"]) == (24, 36)
    assert (made.options["rank"], made.options["damping"]) == (6, 0.5)
    assert made.options["conditioning"] == "initial_value"
    other, _ = planned(overrides={"solver": "grouped", "hidden": 5})
    assert (other.solver, other.training.learning_rate, other.options["hidden"]) == ("grouped", 2e-3, 5)
    wrong, _ = planned(overrides={"solver": "grouped", "depth": 5})
    refused("unexpected keyword argument 'depth'", lambda: wrong.build(contexts(2)), TypeError)
