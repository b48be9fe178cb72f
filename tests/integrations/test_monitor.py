"""What the solves of a model cost, counted in any loop, and where the figures go."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import metabroyden as mb
from metabroyden.integrations import SolveMonitor, TensorBoardLogger, WandbLogger
from tests.helpers import normal, refused


class TanhCell(nn.Module):
    def __init__(self, gain: float = 0.8) -> None:
        super().__init__()
        self.weight = nn.Parameter(gain * torch.linalg.qr(normal(5, 5))[0])

    def forward(self, z, x):
        return torch.tanh(z @ self.weight + x)


class Model(nn.Module):
    """Two DEQs: one by itself, one in the cell of another's block."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 5)
        self.deq = mb.DEQ(TanhCell(), rtol=1e-4, **options)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(5, 5), mb.DEQ(TanhCell(0.3), solver=mb.Picard()))])

    def forward(self, x):
        return self.blocks[0](self.deq(self.stem(x)))


class Kept:
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics, step):
        self.rows.append((step, metrics))


def batches(count: int):
    return [3 * normal(7 + number, 3, seed=number) for number in range(count)]


def figures_of(solutions, prefix: str) -> dict[str, float]:
    """What a monitor has to say of these solves, from the solutions themselves."""
    nfe = np.concatenate([solution.nfe.numpy() for solution in solutions])
    status = np.concatenate([solution.status.numpy() for solution in solutions])
    failed = {f"failed_{name.name.lower()}": np.mean(status == name) for name in mb.Status if name and name in status}
    return {
        f"{prefix}{name}": pytest.approx(float(value))
        for name, value in {
            "solves": len(solutions),
            "seconds": sum(solution.trace.seconds[-1].item() for solution in solutions),
            "nfe_mean": nfe.mean(),
            "nfe_p90": np.quantile(nfe, 0.9, method="inverted_cdf"),
            "nfe_max": nfe.max(),
            "failed": np.mean(status != mb.Status.CONVERGED),
            **failed,
        }.items()
    }


def test_the_figures_are_those_of_the_solutions_of_every_deq_in_both_directions():
    model = Model(max_nfe=6, warn=False)
    inner = model.blocks[0][1]
    seen = {"deq/": [], "deq/backward_": [], "blocks.0.1/": [], "blocks.0.1/backward_": []}
    with SolveMonitor(model) as monitor:
        for x in batches(4):
            model(x).square().sum().backward()
            for name, deq in (("deq", model.deq), ("blocks.0.1", inner)):
                seen[f"{name}/"].append(deq.last_solution)
                seen[f"{name}/backward_"].append(deq.last_backward_solution)
        metrics = monitor.metrics()
    expected = {}
    for prefix, solutions in seen.items():
        expected |= figures_of(solutions, prefix)
    assert metrics == expected
    assert {type(value) for value in metrics.values()} == {float}
    assert 0 < metrics["deq/failed"] == metrics["deq/failed_max_nfe"] <= 1  # six evaluations are too few for some
    assert metrics["deq/backward_failed"] == 0
    assert metrics["deq/seconds"] > 0


def test_evaluation_and_gradients_without_an_adjoint_count_too():
    x = normal(4, 5)
    for mode, spent in ((mb.JacobianFree(), None), (mb.Unroll(steps=9), 10)):
        deq = mb.DEQ(TanhCell(), backward=mode)
        with SolveMonitor(deq) as monitor:
            deq(x).sum().backward()
            assert {name.split("/")[0] for name in monitor.metrics()} == {"deq"}
            assert not any("backward" in name for name in monitor.metrics())
            assert spent is None or monitor.metrics()["deq/nfe_mean"] == spent
            with torch.no_grad():
                deq(x)
            assert monitor.metrics()["deq/solves"] == 2
    slow = mb.DEQ(
        lambda z, x: (threading.Event().wait(0.002), torch.tanh(0.5 * z + x))[1], backward=mb.Unroll(steps=10)
    )
    slow(x.clone().requires_grad_())
    assert slow.last_solution.seconds > 0.02  # the time of all steps, not of the evaluation that measures them
    assert (slow.last_solution.trace.nfe == 11).all()


def test_the_cell_of_a_deq_may_hold_another():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mb.DEQ(TanhCell(0.3))

        def forward(self, z, x):
            return 0.3 * self.inner(z) + x

    deq = mb.DEQ(Outer(), backward=mb.JacobianFree())
    with SolveMonitor(deq) as monitor, torch.no_grad():
        deq(normal(3, 5))
    metrics = monitor.metrics()
    assert metrics["deq/solves"] == 1
    assert metrics["cell.inner/solves"] == metrics["deq/nfe_max"]


def test_it_begins_anew_and_keeps_the_columns_of_failures_that_occurred():
    deq = mb.DEQ(TanhCell(), max_nfe=2, warn=False)
    monitor = SolveMonitor(deq)
    assert monitor.metrics() == {}
    with torch.no_grad():
        deq(normal(4, 5))
        assert monitor.metrics()["deq/failed_max_nfe"] == 1
        monitor.reset()
        assert monitor.metrics() == {}
        deq.max_nfe = 50
        deq(normal(4, 5))
        metrics = monitor.metrics()
        assert (metrics["deq/solves"], metrics["deq/failed"], metrics["deq/failed_max_nfe"]) == (1, 0, 0)
        monitor.reset()
        deq(normal(0, 5))  # an empty batch is a solve of no sample
    assert monitor.metrics() == {"deq/solves": 1, "deq/seconds": 0}


def test_detached_it_leaves_no_trace_and_may_come_back():
    model, x = Model(), normal(4, 3)
    before = set(model.__dict__), model.state_dict().keys(), len(list(model.modules()))
    others = []
    model.deq.observers.append(lambda direction, solution: others.append(direction))
    one, two = SolveMonitor(model), SolveMonitor(model)
    one.attach()  # already is
    model(x)
    one.detach()
    one.detach()
    model(x)
    assert (one.metrics()["deq/solves"], two.metrics()["deq/solves"], len(others)) == (1, 2, 2)
    one.attach()
    model(x)
    assert (one.metrics()["deq/solves"], two.metrics()["deq/solves"]) == (2, 3)
    one.detach()
    two.detach()
    assert [len(deq.observers) for deq in (model.deq, model.blocks[0][1])] == [1, 0]
    assert (set(model.__dict__), model.state_dict().keys(), len(list(model.modules()))) == before
    with pytest.raises(ZeroDivisionError), SolveMonitor(model):
        raise ZeroDivisionError
    assert len(model.deq.observers) == 1


def test_copies_of_a_watched_model_are_not_watched():
    model, x = Model(), normal(4, 3)
    model.monitor = SolveMonitor(model, Kept())  # kept where copies take it along
    model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied(x)
        assert copied.deq.observers == []
        assert copied.monitor.metrics() == model.monitor.metrics()
        copied.monitor.detach()
        refused("has no logger", lambda copied=copied: copied.monitor.log(0))
    model(x)
    assert model.monitor.metrics()["deq/solves"] == 2


def test_threads_lose_no_solve():
    deq, x = mb.DEQ(TanhCell()), normal(2, 5)

    def work() -> None:
        with torch.no_grad():
            for _ in range(20):
                deq(x)

    with SolveMonitor(deq) as monitor:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        deq(x)
    assert monitor.metrics()["deq/solves"] == 81
    assert monitor.metrics()["deq/nfe_mean"] == pytest.approx(float(deq.last_solution.nfe.double().mean()))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_model_is_counted():
    model = nn.Sequential(nn.Linear(3, 5), mb.DEQ(TanhCell()))
    with SolveMonitor(model) as monitor:
        torch.compile(model, backend="eager")(normal(4, 3))
    assert monitor.metrics()["1/solves"] == 1


def test_it_says_what_it_wants():
    deq = mb.DEQ(TanhCell())
    refused("model must be a module, got function", lambda: SolveMonitor(batches), TypeError)
    refused("mb.DEQ layers of a model, and Linear has none", lambda: SolveMonitor(nn.Linear(2, 2)))
    refused(r"logger must have a method log\(metrics, step\), got str", lambda: SolveMonitor(deq, "runs"), TypeError)
    refused("every must be an integer", lambda: SolveMonitor(deq, every=0))
    refused("has no logger: give one", lambda: SolveMonitor(deq).log(1))
    assert deq.observers == [deq.observers[0]]  # of the last one alone


def test_a_loop_logs_every_so_many_steps_and_nothing_is_lost_between():
    deq, logger = mb.DEQ(TanhCell()), Kept()
    with SolveMonitor(deq, logger, every=2) as monitor, torch.no_grad():
        for step in range(1, 6):
            deq(normal(4, 5, seed=step))
            monitor.log(step)
    assert [(step, metrics["deq/solves"]) for step, metrics in logger.rows] == [(2, 2), (4, 2)]
    assert monitor.metrics()["deq/solves"] == 1


def test_tensorboard_shows_the_figures(tmp_path):
    deq = mb.DEQ(TanhCell())
    logged = []
    with TensorBoardLogger(tmp_path / "run") as logger, SolveMonitor(deq) as monitor, torch.no_grad():
        for step in (1, 2):
            deq(normal(4, 5, seed=step))
            logger.log(monitor.metrics(), step)
            logged.append(monitor.metrics())
            monitor.reset()
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert set(events.Tags()["scalars"]) == set(logged[0])
    for name in logged[0]:
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(metrics[name])) for step, metrics in zip((1, 2), logged, strict=True)]


def test_wandb_gets_the_figures_of_a_run(monkeypatch):
    calls = []
    run = SimpleNamespace(log=lambda *a, **k: calls.append(("log", a, k)), finish=lambda: calls.append("finish"))
    wandb = ModuleType("wandb")
    wandb.init = lambda **options: (calls.append(("init", options)), run)[1]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    deq = mb.DEQ(TanhCell())
    with WandbLogger(project="deq", mode="offline") as logger, SolveMonitor(deq, logger) as monitor:
        deq(normal(4, 5))
        metrics = monitor.metrics()
        monitor.log(7)
    assert calls == [("init", {"project": "deq", "mode": "offline"}), ("log", (metrics,), {"step": 7}), "finish"]


@pytest.mark.parametrize(("module", "make", "package"), [
    ("wandb", WandbLogger, "wandb"),
    ("torch.utils.tensorboard", lambda: TensorBoardLogger("never-made"), "tensorboard"),
])  # fmt: skip
def test_a_logger_that_is_not_installed_says_what_to_install(monkeypatch, module, make, package):
    monkeypatch.setitem(sys.modules, module, None)
    refused(f"this needs {package}, which is not installed: pip install {package}", make, ImportError)


def test_importing_the_package_imports_none_of_the_libraries():
    code = """
import sys, metabroyden as mb
assert mb.integrations.SolveMonitor and mb.integrations.TensorBoardLogger and mb.integrations.WandbLogger
libraries = {"lightning", "pytorch_lightning", "tensorboard", "wandb", "torchdeq"}
loaded = {name.split(".")[0] for name in sys.modules} & libraries
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    refused("has no attribute 'keras'", lambda: mb.integrations.keras, AttributeError)
