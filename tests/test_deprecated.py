"""Old names work as the new ones do, and say which those are."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

import metabroyden as mb
from metabroyden import deprecated
from metabroyden.inverse import FinalInverse
from metabroyden.learned import GroupedConfig
from metabroyden.meta import CoTrainConfig, MetaConfig
from metabroyden.meta.defaults import state_layout
from metabroyden.solver import Phase, as_solver
from tests.helpers import refused


@pytest.mark.parametrize(("old", "new"), deprecated.PUBLIC.items())
def test_an_old_public_name_is_the_new_one(old, new):
    with pytest.warns(DeprecationWarning, match=f"metabroyden.{old} is now called metabroyden.{new}") as said:
        assert getattr(mb, old) is getattr(mb, new)
    assert said[0].filename == __file__, "the caller is told, not we"


@pytest.mark.parametrize(("old", "options"), deprecated.REGISTRIES.items())
def test_an_old_registry_holds_what_is_listed_now(old, options):
    with pytest.warns(DeprecationWarning, match=r"is now called metabroyden.list_solvers\("):
        assert sorted(getattr(mb, old)) == mb.list_solvers(**options)


PATHS = [*deprecated.MODULES.items(), ("metabroyden.testbed.cells", "metabroyden.zoo.testbed.cells")]


@pytest.mark.parametrize(("old", "new"), PATHS)
def test_an_old_import_path_leads_to_the_same_module(old, new, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{old} is now called {new}"):
        found = importlib.import_module(old)
    assert found is importlib.import_module(new)
    assert found.__spec__.name == new


def test_what_never_was_is_no_attribute():
    refused("no attribute 'Ledgers'", lambda: mb.Ledgers, AttributeError)


def test_old_words_of_layouts_and_options_are_taken():
    with pytest.warns(DeprecationWarning, match="'nchw' is now called 'image'"):
        layout = mb.Layout("nchw", (4, 3, 3))
    assert layout == mb.Layout("image", (4, 3, 3))
    with pytest.warns(DeprecationWarning, match="is now called") as said:
        solver = mb.MetaBroyden(layout=layout, context="native", weighing="table", gated=8, initializer=0)
    assert {str(one.message).split("'")[1] for one in said} == {
        *("context", "native", "weighing", "table", "gated", "initializer"),
    }
    new = {"conditioning": "input", "coefficients": "schedule", "learned_steps": 8, "initializer_width": 0}
    assert solver.config == mb.get_solver("meta-broyden", layout=layout, **new).config

    class Cell(torch.nn.Module):
        layout = "scales"

    state = torch.zeros(2, 2, 4, 4), torch.zeros(2, 3, 2, 2)
    with pytest.warns(DeprecationWarning, match="'pyramid'"):
        assert state_layout(Cell(), state, None).kind == "pyramid"
    with pytest.warns(DeprecationWarning, match="'vector'"):
        assert GroupedConfig(layout="nd", shape=(3,)).layout == "vector"


LAYOUT = {"layout": "vector", "shape": (3,)}
RETURNS = {"returns": 1, "return_after": 2, "return_above": 3.0, "budget_seconds": 4.0}


@pytest.mark.parametrize(
    ("config", "old", "options"),
    [
        (GroupedConfig, {"context": "input", "initializer": 4}, LAYOUT),
        (CoTrainConfig, {"burst": 0}, {}),
        (MetaConfig, RETURNS, {}),
    ],
)
def test_old_options_of_configs_are_taken(config, old, options):
    with pytest.warns(DeprecationWarning, match="is now called") as said:
        found = config(**old, **options)
    assert [str(one.message).split("'")[1] for one in said] == list(old)
    assert {one.filename for one in said} == {__file__}
    assert found == config(**{deprecated.OPTIONS[name]: value for name, value in old.items()}, **options)


@pytest.mark.filterwarnings("ignore:.* is now called:DeprecationWarning")
def test_fit_solver_takes_its_old_keywords(quick_fits):
    x = torch.randn(20, 3)
    solver = mb.fit_solver(lambda z, x: torch.tanh(0.5 * z + x), x, context="f0", steps=1, refuse=False, progress=False)
    assert solver.config.conditioning == "initial_value"


def test_the_old_name_of_a_metric_is_taken(quick_fits):
    x, f = torch.randn(20, 3), lambda z, x: torch.tanh(0.5 * z + x)
    options = {"steps": 1, "fallback": False, "progress": False}
    score = lambda z, x: -z.square().sum(dim=1)  # noqa: E731
    with pytest.warns(DeprecationWarning, match="'score' is now called 'metric'"):
        solver = mb.fit_solver(f, x, score=score, **options)
    assert all("score" in row for row in solver.summary["held_out"]["solvers"].values())
    refused("got both score= and metric=", lambda: mb.fit_solver(f, x, score=score, metric=score), TypeError)


def test_an_unknown_option_is_refused_with_what_may_be_meant():
    x = torch.randn(20, 3)
    for call, words in (
        (lambda: mb.fit_solver(torch.add, x, tol=1e-3), r"fit_solver takes no tol=: did you mean rtol=\?"),
        (lambda: mb.fit_solver(torch.add, x, learningrate=1), r"did you mean learning_rate=\?"),
        (lambda: mb.fit_solver(torch.add, x, qqq=1), "it takes f, x_train, z0, "),
        (lambda: mb.compare(torch.add, x, solvers="broyden", tol=1e-3), r"compare takes no tol=: did you mean rtol=\?"),
        (lambda: mb.compare(torch.add, x, solvers="broyden", max_iter=3), r"did you mean max_nfe=\?"),
    ):
        refused(words, call, TypeError)


def test_old_members_of_solvers_and_inverses_are_taken():
    class Own:
        parts = ("cos",)

        def __init__(self):
            self.safeguard = self

        def start(self, z0, problem):
            return z0

        init = step = inverse = start

        def transposed(self, w, frozen):
            return 2 * w

        def plan(self, solver):
            return [Phase(mb.Picard(), horizon=2), Phase(mb.Broyden())]

    with pytest.warns(DeprecationWarning, match="is now called") as said:
        own = as_solver(Own())
    news = [str(one.message).split("is now called ")[1] for one in said]
    assert news == ["rmatvec", "required_methods", "phases"]
    assert own.required_methods == ("cos",)
    assert own.has_inverse
    assert own.rmatvec(3, None) == 6
    assert [phase.horizon for phase in own.phases()] == [2, None]
    inverse, w = FinalInverse(2), torch.randn(2, 3)
    inverse.add(torch.tensor([1]), own, None)
    with pytest.warns(DeprecationWarning, match="transpose is now called rmatvec"):
        assert torch.equal(inverse.transpose(w), inverse.rmatvec(w))
