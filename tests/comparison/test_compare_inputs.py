"""What `mb.compare` takes, and the one sentence that it answers everything else with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import metabroyden as mb
from metabroyden.solver import Step

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
UNIVERSAL = mb.load_solver("universal")


def cell(z, x):
    return torch.tanh(0.6 * z.roll(1, 1) - 0.3 * z + x)


def compared(f=cell, x=X, **options):
    return mb.compare(f, x, **{"solvers": mb.Newton(), "rtol": 1e-2, "rounds": 0, "progress": False, **options})


def refused(words, kind=ValueError, f=cell, x=X, **options):
    with pytest.raises(kind, match=words):
        compared(f, x, **options)


def test_one_solver_several_or_names_will_do():
    assert compared(solvers={mb.Newton()}).names[0] == "Newton"
    assert compared(solvers=(one for one in [mb.Newton(), mb.Newton(damping=0.5)])).names[:2] == ["Newton", "Newton #2"]
    assert compared(solvers=["universal", "broyden"]).names[:2] == ["universal", "Broyden"]
    told = {1: mb.Newton()}
    refused("the name of a solver must be one line of text, without spaces around it, got 1", solvers=told)
    for name in ("", " mine", "two\nlines"):
        refused("must be one line of text", solvers={name: mb.Newton()})
    refused("nor that of a registered one .*broyden", FileNotFoundError, solvers="nosuch")
    refused("meta-broyden is a learned solver, which has to be fitted first", FileNotFoundError, solvers="meta-broyden")
    refused(r"must be an instance with start, init and step, .* got \('a'", TypeError, solvers=[("a", mb.Newton())])


class Own:
    """A solver of one's own, without our base class."""

    def start(self, z, problem):
        return z

    def init(self, z, g, problem):
        return ()

    def step(self, z, g, state, problem):
        return Step(z + 0.7 * g, ())


def test_a_solver_of_ones_own_runs_too():
    own = Own()
    found = compared(solvers={"own": own, "damped": mb.Picard(damping=0.7)}, rounds=1)
    assert found.outcome("own").evaluations.tolist() == found.outcome("damped").evaluations.tolist()
    assert found.solvers["own"] is own


def test_a_learned_solver_cannot_pass_for_a_classical_one():
    for name in ("tuned Broyden", "Broyden", "Picard", "best classical"):
        refused(f"{name!r} is the name of a classical solver that runs too", solvers={name: UNIVERSAL})
    refused("'fastest classical' is the name of", solvers={"fastest classical": mb.Newton()})
    mine = mb.Broyden(memory=7, damping=0.9)
    assert compared(solvers={"tuned Broyden": mine}).solvers["tuned Broyden"] is mine, (
        "a classical one may take its place"
    )


@pytest.mark.parametrize(
    "rtol", [[1e-3, 1e-2, 1e-3], np.array([1e-2, 1e-3]), torch.tensor([1e-3, 1e-2]), (1e-2, np.float32(1e-3))]
)
def test_tolerances_may_come_in_any_order_and_type(rtol):
    found = compared(rtol=rtol)
    assert found.tolerances == [1e-2, 1e-3]
    assert found.outcome("Newton", 1e-3).success > 0.9


def test_tolerances_are_numbers():
    assert compared(rtol=np.float32(1e-2)).tolerances == compared(rtol=torch.tensor(1e-2)).tolerances == [1e-2]
    for rtol in ("0.01", ["a"], None, True, [[1e-2]]):
        refused("rtol must be a number or several", TypeError, rtol=rtol)
    refused("rtol must be a finite number of at least 0, got -1.0", rtol=-1)
    refused("rtol is empty", rtol=np.array([]))


def test_contexts_are_checked_under_their_own_names():
    hurt = X.clone()
    hurt[3, 2] = torch.nan
    refused("x_test must be finite, got NaN", x=hurt)
    refused("tune_on must be finite, got NaN", tune_on=hurt)
    for x, words in ((None, "None"), ("abc", "str"), (X.numpy(), "ndarray"), (X[:0], r"\(0, 4\)"), (X[0, 0], r"\(\)")):
        refused(f"x_test must be a tensor, .* with at least 1 sample first, got {words}", x=x)
        if x is not None:
            refused(f"tune_on must be a tensor, .* with at least 1 sample first, got {words}", tune_on=x)
    refused("x_test is list, so the state cannot be zeros like it: .* give iter", x=list(X.split(8)))
    refused("x_test is torch.int64, so the state cannot be zeros like it", x=torch.arange(40).reshape(10, 4))
    refused("x_test must be float32, float64", x=X.half())
    refused(r"give x_test \(or z0\) as \(N, 1\)", x=X[:, 0], f=lambda z, x: torch.cos(z + x))
    refused("x_test has no batch to give", x=iter([]))
    loader = DataLoader(TensorDataset(X, X), batch_size=8)
    refused("the batches of x_test are lists of 2", x=loader)
    refused("the batches of tune_on are lists of 2", tune_on=loader)
    assert compared(x=DataLoader(TensorDataset(X), batch_size=8)).samples == 32


def test_starts_have_a_row_for_each_sample():
    refused(r"z0\(x\) must have a row for each of 32 contexts, got 3", z0=lambda x: torch.zeros(3, 4))
    refused(r"z0\(x\) must be a tensor or a non-empty tuple of tensors, got NoneType", TypeError, z0=lambda x: None)


def test_a_metric_that_cannot_be_used_is_refused_before_anything_is_solved():
    calls = []

    def counted(z, x):
        calls.append(len(z))
        return cell(z, x)

    refused(
        r"metric\(z, x\) must give \(32,\) numbers, or their mean, got shape \(32, 4\)",
        f=counted,
        metric=lambda z, x: z,
    )
    refused(
        r"metric\(z, x\) must give numbers, or their mean, got str", TypeError, f=counted, metric=lambda z, x: "good"
    )
    assert len(calls) <= 4


def test_a_solver_that_cannot_run_on_these_problems_is_named():
    refused(
        "the solver 'mine' cannot run on these problems: .* weights are torch.float32",
        x=X.double(),
        solvers={"mine": UNIVERSAL},
    )
    refused("the solver 'digits' cannot run on these problems", solvers={"digits": mb.load_solver("dense-digits")})

    def broken(z, x):
        raise KeyError("of the user's own")

    refused("of the user's own", KeyError, f=broken)


def test_modules_are_in_evaluation_mode_while_it_lasts_and_then_as_before():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, z, x):
            return self.drop(cell(z, x))

    f, solver = Cell().train(), mb.load_solver("universal").train()
    found = compared(f, solvers={"mine": solver})
    assert found.outcome("tuned Broyden").success == 1, "with dropout there is no fixed point"
    assert f.drop.training
    assert solver.training


def test_counts_may_be_those_of_numpy_and_the_rest_is_refused():
    assert compared(max_nfe=np.int64(20), rounds=np.int64(1)).budget == 20
    refused("title must be text, got int", TypeError, title=5)
    assert compared(title=None).title == ""


def test_what_it_was_made_on_is_told():
    about = compared(rounds=2, tune_on=X[:1]).about
    assert about.startswith(
        "40 problems; the options of the classical solvers were chosen on 1 other; times are medians of 2"
    )
    threads = torch.get_num_threads()
    assert f"on {threads} thread{'s' if threads > 1 else ''} of " in about
    assert torch.__version__.split("+")[0] in about
    assert compared(x=X[:1]).about == "1 problem; the classical solvers have their default options; nothing was timed."


def test_large_states_are_tuned_on_and_solved_few_at_a_time(monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules["metabroyden.compare"], "ROOM", 8)
    sizes = set()

    def noted(z, x):
        sizes.add(len(z))
        return cell(z, x)

    found = compared(noted)
    assert max(sizes) == 4, "for tuning; measured are two at a time"
    assert found.outcome("Newton").evaluations.shape == (1, 32)
