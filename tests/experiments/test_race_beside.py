"""What is run beside the race: pieces left out, other families' solvers, another library's learned solver."""

import numpy as np
import pytest
import torch

import metabroyden as mb
from experiments import meta, race
from experiments.legacy.equilibria import HeldOut
from experiments.legacy.race import ablation, figures_beside, hyper_deq, measure, report
from experiments.legacy.race.contestants import Contestant
from experiments.legacy.race.measure import Rules
from experiments.legacy.race.statistics import Field
from metabroyden.learned.coefficients import StepLSTM, StepSchedule
from metabroyden.learned.layout import Layout
from metabroyden.learned.safeguard import BY_PROGRESS
from metabroyden.meta.fit import make_learned
from metabroyden.meta.orthogonal import make_optimizer
from metabroyden.zoo.testbed import cells


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
    held = HeldOut(problem.f, problem.z0, problem.context, lambda z, index: z.sum(dim=1))
    peer = hyper_deq.HyperDEQ(hyper_deq._network(16, 16), "untrained")
    one = Contestant("HyperDEQ", "peer", peer, peer.options, 0)
    stamp = {"part": "hyper-deq", "family": "cell", "solver": "HyperDEQ", "kind": "peer", "seed": 0}
    rules = Rules((1e-2,), (1e-2,), 40, 6, 2, weighed=False)
    rows = measure.solve_rows(
        [one], held, *measure.unknown(held), rules, lambda one: {**stamp, "config": "0123abcd", "commit": "here"}
    )
    (row,) = (row for row in rows if row["row"] == "solve")
    assert set(row["status"]) == {"C"}
    assert 1 < min(row["evaluations"]) <= max(row["evaluations"]) < 40
    assert max(row["residual"]) <= 1e-2
    assert len(row["seconds"]) == 2
    z, recorder = peer.solve(lambda z: problem.f(z, problem.context), problem.z0, 0.0, 7, condition=problem.context)
    assert recorder.count == 7, "no more calls than the budget"
    assert torch.isfinite(z).all()


def solve_row(part, family, solver, evaluations, kind="classical", seed=None, tolerance=1e-2):
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
            solve_row("families", "conv-digits", "tuned Anderson", [20, 20, 20], tolerance=at),
            solve_row("families", "conv-digits", "meta-broyden", [10, 10, 10], "learned", 0, at),
            solve_row("families", "conv-digits", "universal", [15, 15, 15], "learned", 0, at),
            solve_row("outside", "conv-digits, noisy", "tuned Anderson", [40, 40, 40], tolerance=at),
            solve_row("outside", "conv-digits, noisy", "meta-broyden", [10, 10, 10], "learned", 0, at),
            solve_row("outside", "conv-digits, noisy", "universal", [40, 40, 40], "learned", 0, at),
            solve_row("transfer", "conv-digits", "meta-broyden of mlp-digits", [60, 60, 60], "learned", 0, at),
            solve_row("transfer", "conv-digits", "meta-broyden of conv-fashion", [25, 25, 25], "learned", 0, at),
        ]
    parts = {part: Field(rows, part) for part in ("families", "outside", "transfer")}
    names, problems, values = figures_beside.transferred(parts, 1e-2)
    assert names == ["own", "of the twin on other data", "universal"]
    assert problems == ["conv-digits", "conv-digits, noisy"]
    assert np.allclose(values[:, 0], [0.5, 1.25, 0.75])
    assert np.allclose(values[[0, 2], 1], [0.25, 1.0])
    assert np.isnan(values[1, 1])
    _, head, body = report._transfer(parts, 1e-2)
    assert head == ["problem", "MetaBroyden, own", "MetaBroyden, of the twin on other data", "universal"]
    assert body[1] == ["conv-digits, noisy", "0.25", "", "1.00"]


def test_an_lstm_for_the_table_has_no_last_row_that_goes_on(tmp_path):
    usual = meta.Meta(family="conv-digits", runs=tmp_path)
    table, lstm = (race._Ablated(usual, ablation.TRAINED[name]).recipe.options for name in ("no P", "LSTM for table"))
    assert (table["schedule_length"], table["learned_steps"]) == (28, 42)
    assert (lstm["schedule_length"], lstm["learned_steps"], lstm["coefficients"]) == (28, 28, "lstm")
