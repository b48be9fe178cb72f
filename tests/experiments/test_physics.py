"""The experiment on physics: each map has its field's answer as fixed point, and everything is counted and reported."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import metabroyden as mb
from experiments import physics
from experiments.bench.runner import read_rows
from experiments.physics import parts, power, report, scf, water
from experiments.physics.suite import SUITE
from metabroyden.comparison.statistics import Field
from metabroyden.comparison.tables import chosen
from metabroyden.zoo.testbed.base import distance
from tests.helpers import refused

NAMES = ("case118", "Hanoi", "H2O") if sys.platform != "win32" else ("case118", "Hanoi")  # pyscf has no Windows build


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_a_fixed_point_that_solvers_come_to(name):
    held = SUITE[name].problems(3, "test")
    assert held.known.all()
    star = held.states(held.star)
    assert distance(held.f(star, held.x), star).max() < 1e-8
    assert distance(held.z0, star).min() > 1e-3, "nothing is solved at the start"
    found = mb.solve(held.f, held.z0, held.x, solver=mb.Broyden(), rtol=1e-10, max_nfe=60)
    assert distance(found.z, star).max() < 1e-7
    other = SUITE[name].problems(3, "validation")
    assert distance(held.states(other.star), star).min() > 1e-4, "tuned on other samples"


def test_power_flow_has_pandapowers_solution():
    net = importlib.import_module("pandapower.networks").case118()
    importlib.import_module("pandapower").runpp(net, numba=False, tolerance_mva=1e-9)
    found, history = power.newton(power.network("case118"), torch.ones(1, dtype=torch.float64), 1e-11, 30)
    voltage = power.network("case118").voltage(found.numpy()[None])[:, 0]
    np.testing.assert_allclose(np.sort(abs(voltage)), np.sort(net.res_bus.vm_pu), atol=1e-8)
    assert len(history) < 8
    assert 3 < power.highest_load("case118") < 3.4
    assert power.problems("case118", True, 3, "test").x.min() > 2


def test_flows_of_water_are_epanets_and_the_global_gradient_method_is_quadratic():
    net = water.network("Hanoi")
    held = water.problems("Hanoi", 1, "test")
    demand = torch.from_numpy(net.demand)[None]
    balanced = held.f(torch.from_numpy(net.start)[None], demand)
    found = mb.solve(held.f, balanced, demand, solver=water.own().solver, rtol=1e-9, max_nfe=9)
    np.testing.assert_allclose(found.z[0].numpy(), net.flow, atol=1e-6 * net.flow.max())
    inner = net.incidence[:, : len(net.demand)]
    np.testing.assert_allclose(inner.T @ found.z[0].numpy(), -net.demand, atol=1e-9 * net.demand.max())


def test_pumps_valves_and_what_they_cut_off_are_left_out():
    net = water.network("Net3")  # of 117 pipes one is closed
    assert net.incidence.shape[0] == 116
    assert net.incidence.shape[1] == len(net.demand) + len(net.heads)
    assert (abs(net.incidence).sum(axis=1) == 2).all()


@pytest.mark.usefixtures("few_candidates")
def test_all_solvers_are_counted_and_reported(tmp_path):
    config = physics.Physics(
        only=NAMES, samples=2, budget=40, results=tmp_path / "results", runs=tmp_path / "runs", progress=False
    )
    physics.run(config)
    (trial,) = config.results.iterdir()
    written = {"config.json", "rows.jsonl.gz", "report.md", "residuals.png", "residuals.pdf"}
    assert {path.name for path in trial.iterdir()} == written
    rows = read_rows(trial / "rows.jsonl")
    field = Field(rows)
    assert tuple(field.families) == NAMES
    names = {*report.PLAIN, *report.TUNED, report.OURS}
    for name in NAMES:
        (own,) = field.solvers(name, "peer")
        assert set(field.solvers(name)) == {*names, own}
        assert field.must(name, own, 1e-6).success == field.must(name, report.OURS, 1e-6).success == 1
        for tolerance in physics.TOLERANCES:
            rivals = [field.must(name, one, tolerance).mean for one in report.PLAIN]
            over = report.ratios(field, name, tolerance)
            assert over["best plain"] == field.must(name, report.OURS, tolerance).mean / min(rivals)
    for row in chosen(rows, "solve", tolerance=1e-6):
        distances = [far for far, letter in zip(row["distance"], row["status"], strict=True) if letter == "C"]
        assert max(distances, default=0) < 1e-5
    for row in chosen(rows, "solve", family="H2O", solver="Anderson", tolerance=1e-6):
        assert max(map(abs, row["score"])) < report.SAME, "the same energy as DIIS's"
    text = (trial / "report.md").read_text()
    assert f"| {NAMES[0]} | 181 |" in text
    assert "## water, to 1e-06" in text
    assert "nan" not in text
    assert re.search(r"\| H2O \|( 0, 0 of \d \|){7}", text) or "H2O" not in NAMES


@pytest.mark.parametrize("budget", [4, 40])
def test_an_own_methods_iterations_are_counted_to_the_tolerance_or_the_budget(budget):
    def halved(context, tolerance, budget):
        history = [0.5**k for k in range(budget)]
        history = history[: next((k for k, value in enumerate(history, 1) if value <= tolerance), budget)]
        return context.repeat(2), history

    contexts, z0 = torch.tensor([1.0, 2.0]), torch.zeros(2, 2)
    found, taken = parts.Own("halved", "peer", halved).timed(None, z0, contexts, 0.1, budget)
    assert found.evaluations.tolist() == [min(budget, 5)] * 2
    assert found.status == ("BB" if budget == 4 else "CC")
    assert found.residual == [0.125 if budget == 4 else 0.0625] * 2
    assert found.z.tolist() == [[1.0, 1.0], [2.0, 2.0]]
    assert taken["total"] > 0


@pytest.mark.skipif("H2O" not in NAMES, reason="pyscf has no Windows build")
def test_diis_counts_fock_builds_and_ends_at_pyscfs_energy():
    (one,) = scf.geometries("H 0 0 0; F 0 0 0.92", "sto-3g", 1, "test")
    found, history = one.diis(1e-8, 60)
    assert history[-1] <= 1e-8 < history[-2]
    field = scf.hartree_fock(one.field.mol)
    assert field._chkfile.file.closed, "a garbage collector that closes it warns, in whatever runs then"
    field.kernel()
    exact = one.density(field.make_rdm1())
    assert abs(found.numpy() - exact).max() < 1e-4
    assert abs(one.energy(found.numpy()) - field.e_tot) < 1e-8
    assert len(one.diis(1e-8, 3)[1]) == 3


def test_missing_libraries_are_named_and_unknown_problems_refused(tmp_path, monkeypatch):
    config = physics.Physics(only=("Hanoi",), results=tmp_path / "results", runs=tmp_path / "runs", progress=False)
    refused("unknown problem 'Venice': known are case118", lambda: physics.run(replace(config, only=("Venice",))))
    refused("samples must be at least 1", lambda: physics.run(replace(config, samples=0)))
    monkeypatch.setitem(sys.modules, "epyt", None)
    words = r"this needs epyt, which could not be imported: pip install 'metabroyden\[physics\]'"
    refused(words, lambda: physics.run(config), ImportError)
    assert not config.results.exists()
