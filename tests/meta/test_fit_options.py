"""Options of `fit_solver` by name: what each does to the training, what it is told, and what is refused at once."""

from __future__ import annotations

import importlib.util
import math
import re

import numpy as np
import pytest
import torch

import metabroyden as mb
from metabroyden.meta import MetaConfig
from metabroyden.meta.defaults import RATES
from metabroyden.meta.trainer import TrainingStep
from tests.helpers import ConvTanh, contexts, refused, same_parameters

pytestmark = pytest.mark.usefixtures("quick_fits")


def fitted(**options):
    return mb.fit_solver(ConvTanh(), contexts(40), **{"steps": 4, "progress": False, "fallback": False} | options)


def test_the_config_says_what_fit_solver_uses_in_place_of_its_defaults():
    about = dict(re.findall(r"(\w+): ((?:.(?!\n        \w+: ))*)", MetaConfig.__doc__, re.S))
    for name, rate in RATES.items():
        assert f"`fit_solver` uses {rate:g}" in about[name]


def test_batch_size_and_learning_rate_are_what_is_trained_with():
    training = fitted(batch_size=6, learning_rate=1e-3).summary["meta_training"]
    assert (training["batch"], training["learning_rate"]) == (6, 1e-3)
    assert training["orthogonal_rate"] == pytest.approx(1e-2), "in proportion"
    usual = fitted().summary["meta_training"]
    assert (usual["batch"], usual["learning_rate"], usual["orthogonal_rate"]) == (32, 5e-3, 0.05)
    other = fitted(solver="grouped", learning_rate=1e-3).summary["meta_training"]
    assert (other["learning_rate"], other["orthogonal_rate"]) == (1e-3, 0)


def test_curves_are_logged_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    solver = fitted(log_dir=tmp_path / "log")
    read = EventAccumulator(str(tmp_path / "log"))
    read.Reload()
    names = {"loss", "gradient norm", "learning rate", "learning rate of matrices", "skipped steps"}
    assert set(read.Tags()["scalars"]) == names | {"evaluations on validation"}
    for name in names:
        assert [event.step for event in read.Scalars(name)] == [1, 2, 3, 4]
    logged = {event.step: event.value for event in read.Scalars("evaluations on validation")}
    looks = {look["step"]: look["score"] for look in solver.summary["validation"]}
    assert logged == pytest.approx(looks)


def test_a_callback_is_told_of_every_step():
    seen: list[TrainingStep] = []
    solver = fitted(callback=seen.append)
    assert same_parameters(solver, fitted())
    assert [(told.step, told.steps) for told in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(math.isfinite(told.loss) and told.skipped == 0 for told in seen)
    assert [told.seconds for told in seen] == sorted(told.seconds for told in seen)
    looks = {look["step"]: look["score"] for look in solver.summary["validation"]}
    assert {told.step: told.evaluations for told in seen} == {step: looks[step] for step in (1, 2, 3, 4)}
    assert seen[-1].best == min(looks.values())


@pytest.mark.parametrize("answer", [True, np.True_])
def test_a_callback_that_returns_true_ends_the_training(answer):
    solver = fitted(steps=100, callback=lambda told: answer if told.step == 3 else None)
    assert (solver.summary["steps"], solver.summary["stopped"]) == (3, "callback")
    assert solver.summary["validation"][-1]["step"] == 3, "and its last step is looked at"


def test_what_a_logger_returns_does_not_end_the_training():
    assert fitted(callback=lambda told: {"logged": told.loss}).summary["steps"] == 4


def test_an_error_in_a_callback_is_the_users():
    def fails(told):
        raise KeyError("mine")

    refused("mine", lambda: fitted(callback=fails), KeyError)


REFUSED = [
    ("batch_size must be an integer of at least 1, or None for 32, got 0", ValueError, {"batch_size": 0}),
    ("batch_size must be .* got 2.5", ValueError, {"batch_size": 2.5}),
    ("learning_rate must be a positive number, or None .* got -1", ValueError, {"learning_rate": -1}),
    ("learning_rate must be .* got nan", ValueError, {"learning_rate": math.nan}),
    ("callback must be a function of a TrainingStep, got int", TypeError, {"callback": 3}),
    ("fallback must be True or False, got 'no'", TypeError, {"fallback": "no"}),
    ("progress must be True or False, got 1", TypeError, {"progress": 1}),
    ("return_report must be True or False, got None", TypeError, {"return_report": None}),
    ("checkpoint must be a path, or None for none, got bool", TypeError, {"checkpoint": True}),
    ("checkpoint must be a file, .* got the folder", ValueError, {"checkpoint": "."}),
    ("log_dir must be a path, or None for none, got int", TypeError, {"log_dir": 1}),
    ("log_dir must be a folder, got the file", ValueError, {"log_dir": __file__}),
    ("device must be auto, cpu, cuda or cuda:N, got 'abacus'", ValueError, {"device": "abacus"}),
]


@pytest.mark.parametrize(("words", "error", "options"), REFUSED)
def test_options_that_cannot_be_used_are_refused_before_anything_is_solved(words, error, options):
    f = lambda z, x: pytest.fail("f was called")  # noqa: E731
    refused(words, lambda: mb.fit_solver(f, contexts(40), **{"progress": False, **options}), error)


def test_without_tensorboard_log_dir_says_what_to_install_before_anything_is_solved(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    f = lambda z, x: pytest.fail("f was called")  # noqa: E731
    refused(
        "pip install tensorboard",
        lambda: mb.fit_solver(f, torch.randn(20, 3), log_dir=tmp_path, progress=False),
        ImportError,
    )


def test_a_solver_that_is_there_is_trained_further_and_left_as_it_is():
    before = fitted()
    weights = {name: value.clone() for name, value in before.state_dict().items()}
    after = fitted(solver=before)
    assert after is not before
    assert all(torch.equal(value, weights[name]) for name, value in before.state_dict().items())
    assert not same_parameters(after, before)
    assert after.config.damping == before.config.damping
    assert after.summary["steps"] == 4
    usual: list[int] = []
    for solver in ("metabroyden", before):
        fitted(solver=solver, steps=None, callback=lambda told: usual.append(told.steps) or True)
    assert usual[1] == max(1, usual[0] // 2), "half of the steps"


@pytest.mark.parametrize(
    ("words", "solver", "error"),
    [
        ("a learned solver to train further, got Broyden", mb.Broyden(), TypeError),
        (r"for layout 'image' and shape \(3, 5, 5\), f has 'image' and \(3, 4, 4\)", (3, 5, 5), ValueError),
    ],
)
def test_solvers_that_cannot_be_trained_further_are_refused(words, solver, error):
    if isinstance(solver, tuple):
        solver = mb.MetaBroyden(layout=mb.Layout("image", solver), rank=4)
    refused(words, lambda: fitted(solver=solver), error)
