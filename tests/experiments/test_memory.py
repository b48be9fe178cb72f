"""What training holds in memory: the counters count known cases, and an equilibrium costs the same at any depth."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from experiments import memory
from experiments.bench.runner import plain, read_rows
from experiments.bench.training import Step, growth
from experiments.configs import networks
from experiments.configs.networks import WAYS
from experiments.memory import Memory
from metabroyden.comparison.clock import LiveBytes, saved_bytes

TINY = Memory(batch=2, width=4, tokens=6, memory=2, backward=4)


def step(config: Memory, cell: str, way: str, count: int) -> Step:
    return networks.step(plain(config), cell, way, count)


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    x = torch.ones(100, dtype=torch.float64, requires_grad=True)
    w = torch.ones(100, dtype=torch.float64, requires_grad=True)
    assert saved_bytes(lambda: (x * x).sum()) == 800
    assert saved_bytes(lambda: (x * w).sum()) == 1600
    assert saved_bytes(lambda: (x * w).sum(), [w]) == 800
    assert saved_bytes(lambda: (x.view(10, 10) * x.view(10, 10)[0]).sum()) == 800
    assert saved_bytes(lambda: x.sum()) == 0
    assert saved_bytes(lambda: x.exp().exp().sum()) == 1600  # both results


def test_live_bytes_follows_storages_from_birth_to_death():
    given = torch.ones(1000)
    with LiveBytes([given]) as live:
        a = given * 2
        view = a[:10]
        del a
        assert live.now == 4000  # the view keeps all of it
        b = given.add_(1).view(10, 100)
        assert live.now == 4000  # what was there before is not counted
        del view
        assert (live.now, live.peak) == (0, 4000)
        c = torch.exp(b) + torch.exp(b)
        assert (live.now, live.peak) == (4000, 12000)
        live.mark()
        assert live.peak == 4000
        del c
    assert live.now == 0


def test_live_bytes_sees_the_backward_pass():
    x = torch.ones(1000, requires_grad=True)
    with LiveBytes([x]) as live:
        loss = x.exp().sum()
        assert live.now == 4004  # the saved result and the loss
        loss.backward()
        del loss
    assert live.now == 4000  # the gradient
    assert live.peak >= 8004


def test_nothing_of_a_step_is_left_behind():
    for way in ("implicit", "unrolled", "unrolled, checkpoints"):
        one = step(TINY, "causal", way, 5)
        one.take()
        with LiveBytes(one.given) as live:
            one.take()
        assert live.now == 0, way


@pytest.mark.parametrize("cell", ["conv", "causal"])
def test_implicit_training_needs_the_same_memory_at_any_depth_and_unrolled_training_does_not(cell):
    config = Memory(batch=4, channels=8, side=16, width=8, tokens=16, backward=10)

    def at(way):
        steps = [step(config, cell, way, n) for n in (10, 30)]
        assert [one.reached()["spent"] for one in steps] == [10, 30]
        return [one.bytes() for one in steps]

    few, many = at("implicit")
    totals = [row["saved"] + row["solver"] for row in (few, many)]
    assert max(totals) <= 1.05 * min(totals)
    assert many["peak"] <= 1.05 * few["peak"]
    injection = 4 * 4 * 8 * (16 * 16 if cell == "conv" else 16)  # saved for a second derivative; not counted as held
    assert few["saved"] == many["saved"] <= few["held"] + injection
    few, many = at("unrolled")
    assert many["saved"] >= 0.8 * 3 * few["saved"]
    assert many["peak"] >= 0.8 * 3 * few["peak"]
    assert few["held"] <= few["saved"] + 4
    few, many = at("implicit, full memory")
    assert many["solver"] >= 2 * few["solver"]


def test_every_way_of_training_gives_the_gradients_of_the_same_equilibrium():
    gradients = {}
    for way in WAYS:
        one = step(replace(TINY, memory=6, backward=40, gain=1.0), "causal", way, 60)
        one.forward().backward()
        gradients[way] = torch.cat([tensor.grad.flatten() for tensor in one.given[:-1]])
    for way, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients["unrolled"], rtol=1e-3, atol=1e-5, msg=way)


def test_a_fresh_process_grows_by_more_for_a_deeper_network():
    options = plain(Memory(batch=16, channels=16, gain=1.0))
    warm = [{**options, "batch": 1}, "conv", "unrolled", 3]
    few, many = (growth(networks.step, warm, [options, "conv", "unrolled", n])["returning"] for n in (2, 20))
    assert many - few >= 0.8 * 18 * 16 * 16 * 16 * 16 * 4  # a state a layer, at the very least


def test_unknown_cells_and_ways_are_refused():
    with pytest.raises(ValueError, match="cell must be one of conv, causal"):
        step(TINY, "dense", "implicit", 10)
    with pytest.raises(ValueError, match="way one of"):
        step(TINY, "conv", "rolled", 10)


def test_the_experiment_writes_what_it_promises(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "growth", lambda *step: {"bytes": 2**20, "returning": 2**20})
    config = memory.Memory(
        evaluations=(10, 20), batch=2, channels=4, side=6, width=4, tokens=8, memory=4, backward=6, repeats=1,
        results=tmp_path / "results", runs=tmp_path / "runs", progress=False,
    )  # fmt: skip
    memory.run(config)
    (trial,) = config.results.iterdir()
    figures = {f"{name}_by_evaluations.{kind}" for name in ("memory", "time") for kind in ("png", "pdf")}
    assert {path.name for path in trial.iterdir()} == {"rows.jsonl.gz", "config.json", "report.md", *figures}
    rows = read_rows(trial / "rows.jsonl")
    for kind in ("bytes", "resident", "time"):
        assert len([row for row in rows if row["row"] == kind]) == 2 * 4 * 2
    for row in rows:
        if row["row"] == "time" and row["way"] == "unrolled":
            assert row["ratio_total"] == 1
    described = json.loads((trial / "config.json").read_text())
    assert described["config"]["memory"] == 4
    assert described["provenance"]["versions"]["torch"]
    assert "saved + solver" in capsys.readouterr().out
    assert "nan" not in (trial / "report.md").read_text()
    assert "1 (1)" in (trial / "report.md").read_text()
