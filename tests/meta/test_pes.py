"""Persistent evolution strategies: unbiased where truncation is not."""

from __future__ import annotations

from dataclasses import replace

import torch

from experiments import pes
from experiments.bench.runner import read_rows
from metabroyden.meta import MetaConfig
from metabroyden.meta.estimators import Particles
from tests.helpers import refused, same_parameters
from tests.meta.test_meta import SMALL, grouped, trainer

TARGET = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
DRIFT = 0.9 * torch.tensor([[0.8, 0.6, 0.0], [-0.6, 0.8, 0.0], [0.0, 0.3, 0.7]], dtype=torch.float64)
SEGMENTS, STEPS = 4, 3


def play(theta, state):
    """z ← Az + θ for a few steps, the loss the mean squared distance to a target: quadratic in all θ that were used."""
    z = torch.zeros(3, dtype=torch.float64) if state is None else state
    losses = []
    for _ in range(STEPS):
        z = DRIFT @ z + theta
        losses.append((z - TARGET).square().sum())
    return torch.stack(losses).mean(), z


def backpropagated(theta, *, truncated: bool):
    theta = theta.clone().requires_grad_()
    state, total = None, 0.0
    for _ in range(SEGMENTS):
        loss, state = play(theta, state)
        state = state.detach() if truncated else state
        total = total + loss
    return torch.autograd.grad(total, theta)[0]


def test_estimates_over_a_whole_unroll_average_to_its_exact_gradient_where_truncation_is_biased():
    theta = torch.tensor([0.3, 0.1, -0.2], dtype=torch.float64)
    exact = backpropagated(theta, truncated=False)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(700):
        particles = Particles(2, sigma=0.3)
        pieces = []
        for _ in range(SEGMENTS):
            noise = torch.randn(2, 3, generator=generator, dtype=torch.float64)
            pieces.append(particles.segment(theta, noise, play)[1])
        found.append(sum(pieces))
    estimates = torch.stack(found)
    error = estimates.std(dim=0) / len(estimates) ** 0.5
    assert ((estimates.mean(dim=0) - exact).abs() < 3.5 * error).all()
    truncated = backpropagated(theta, truncated=True)
    assert (truncated - exact).norm() > 6 * error.norm(), "truncation is off by far more than the estimate's error"


def test_one_segment_is_an_antithetic_finite_difference():
    theta = torch.tensor([0.3, 0.1, -0.2], dtype=torch.float64)
    noise = torch.eye(3, dtype=torch.float64)
    _, gradient = Particles(3, sigma=1e-4).segment(theta, noise, play)
    exact = torch.autograd.functional.jacobian(lambda theta: play(theta, None)[0], theta)
    torch.testing.assert_close(3 * gradient, exact, rtol=1e-6, atol=1e-8)


PES = replace(SMALL, estimator="pes", unroll=3, segments=3, particles=2, steps=10)


def test_meta_training_by_evolution_goes_on_bit_for_bit_from_the_last_unroll_that_ended(tmp_path):
    whole, path = trainer(PES).run(), tmp_path / "training.safetensors"
    trainer(PES, checkpoint=path, save_every=2).run(until=8)
    resumed = trainer(PES, seed=9, checkpoint=path)
    assert resumed.step == 6, "in between there are particles, which no file keeps"
    assert same_parameters(whole, resumed.run())
    assert not same_parameters(whole, grouped())


def test_evolution_lowers_the_loss_of_an_unroll_in_many_segments():
    made = trainer(replace(PES, steps=36, particles=4, sigma=0.02, learning_rate=1e-2, validate_every=36))
    losses = []
    made.curves = lambda step, values: losses.append(values["loss"]) if "loss" in values else None
    made.run()
    unrolls = torch.tensor(losses).view(-1, 3).mean(dim=1)
    assert unrolls[-4:].mean() < unrolls[:4].mean() - 0.1
    assert made.skipped == 0


def test_the_experiment_writes_what_it_promises(tmp_path):
    config = pes.Pes(
        unroll=2, segments=2, begin_seconds=0.1, seconds=0.1, particles=1, lengths=(2, 4), batch=2,
        results=tmp_path / "results", runs=tmp_path / "runs",
        progress=False,
    )  # fmt: skip
    pes.run(config)
    (trial,) = config.results.iterdir()
    assert {path.name for path in trial.iterdir()} == {
        "rows.jsonl.gz",
        "config.json",
        "report.md",
        "pes.png",
        "pes.pdf",
    }
    rows = read_rows(trial / "rows.jsonl")
    assert [row["way"] for row in rows if row["row"] == "way"] == ["short", *pes.WAYS]
    assert all(row["cpu_seconds"] >= 0.1 and row["steps"] >= 1 for row in rows if row["row"] == "way")
    assert [row["unroll"] for row in rows if row["row"] == "length"] == [2, 4]
    assert "| PES | " in (trial / "report.md").read_text()


def test_modes_of_backpropagation_are_refused():
    for name in ("detach_features", "checkpoint_steps"):
        words = "are of backpropagation, estimator is 'pes'"
        refused(words, lambda: MetaConfig(estimator="pes", **{name: True}))  # noqa: B023
