"""Several processes compute what one does. This file is also what torchrun starts."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.nn.parallel import DistributedDataParallel

import metabroyden as mb
from metabroyden.learned.layout import Layout
from metabroyden.meta import MetaConfig, MetaTrainer, TaskSet, distributed
from metabroyden.meta.estimators import frozen
from metabroyden.meta.fit import make_learned
from tests.helpers import ConvTanh, normal, refused

CONFIG = MetaConfig(steps=3, unroll=4, batch=4, validate_every=2, validation_nfe=20, start_noise=0.3, clip=0.05)
VARIANTS = {
    "higher": CONFIG,
    "native, segments": replace(CONFIG, backend="native", segments=2, unroll=(2, 5)),
    "checkpointed, detached": replace(CONFIG, checkpoint_steps=True, detach_features=True),
    "evolution": replace(CONFIG, estimator="pes", segments=3, particles=2),
    "budget": replace(CONFIG, steps=1000, seconds=0.2, validate_every=1000, patience=5),
}


def noisy(raw, generator):
    return raw + 0.1 * torch.randn(raw.shape, generator=generator, dtype=raw.dtype)


def trainer(name: str, path: Path | None = None) -> MetaTrainer:
    raw = 0.5 * normal(40, 3, 4, 4, seed=1, dtype=torch.float64)
    solver = make_learned("grouped", Layout("image", (3, 4, 4)), hidden=5, rank=4, initializer_width=4).double()
    tasks = TaskSet(ConvTanh().double(), raw[:30], raw[30:], augment=noisy)
    return MetaTrainer(solver, tasks, VARIANTS[name], checkpoint=path)


def outcome(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """The gradient of the first outer step, and the weights, losses and scores of a whole training."""
    one = trainer(name)
    one.solver.requires_grad_(True)
    with frozen(one.tasks.f):
        loss, norm = one.estimator(0, 0.0)
    found = {f"gradient.{key}": value.grad for key, value in one.solver.named_parameters() if value.grad is not None}
    found |= {"loss": loss, "norm": norm}
    whole = trainer(name, folder / "training.safetensors")
    losses: list[float] = []
    whole.curves = lambda step, values: losses.append(values["loss"]) if "loss" in values else None
    found |= {f"weights.{key}": value for key, value in whole.run().state_dict().items()}
    found["losses"] = torch.tensor(losses, dtype=torch.float64)
    found["scores"] = torch.tensor([look["score"] for look in whole.history], dtype=torch.float64)
    return found


def co_trained() -> dict[str, torch.Tensor]:
    """Weights of a model and of its solver after four steps, each process with its share of the batches."""
    torch.manual_seed(0)
    deq = mb.DEQ(ConvTanh().double(), rtol=1e-10, max_nfe=60, backward=mb.Implicit(rtol=1e-10, max_nfe=60), warn=False)
    layout = Layout("image", (3, 4, 4))
    solver = make_learned("meta-broyden", layout, conditioning="input", learned_steps=8, rank=4).double()
    config = mb.CoTrainConfig(unroll=3, every=2, warmup_steps=2, clip=1e6, balance=0.01)
    trainer = mb.CoTrainer(deq, solver, config=config)
    model = DistributedDataParallel(deq) if distributed.size() > 1 else deq
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(4):
        x = 0.5 * normal(8, 3, 4, 4, seed=step, dtype=torch.float64)[distributed.part(8)]
        optimizer.zero_grad()
        trainer.loss(model(x).square().mean()).backward()
        optimizer.step()
        trainer.step()
    found = {f"model.{key}": value for key, value in deq.state_dict().items()}
    found["weight"] = torch.tensor(trainer.residual_weight, dtype=torch.float64)
    return found | {f"solver.{key}": value for key, value in solver.state_dict().items()}


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """What two processes wrote, each a file for each variant."""
    folder = tmp_path_factory.mktemp("together")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "budget"])
def test_two_processes_train_as_one_does(together, tmp_path, name):
    alone = outcome(name, tmp_path)
    assert max(float(value.abs().max()) for key, value in alone.items() if key.startswith("gradient.")) > 1e-3
    assert float(alone["norm"]) > CONFIG.clip, "clipped, which is to come after the reduction"
    for rank in range(2):
        found = safetensors.torch.load_file(together / f"{name}-{rank}.safetensors")
        assert found.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-10)


def test_two_processes_co_train_as_one_does(together):
    alone = co_trained()
    assert float(alone["weight"]) != mb.CoTrainConfig.residual_weight, "balanced by the norms of both shares"
    for rank in range(2):
        found = safetensors.torch.load_file(together / f"co-trained-{rank}.safetensors")
        for key, value in alone.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)


def test_a_time_budget_is_the_first_processes_and_weights_stay_together(together):
    one, other = (safetensors.torch.load_file(together / f"budget-{rank}.safetensors") for rank in range(2))
    assert 1 <= len(one["losses"]) < 1000
    for key in one:
        assert torch.equal(one[key], other[key]), key


def test_the_first_process_alone_writes(together):
    assert [path.name for path in together.glob("*/training.safetensors")] == ["training.safetensors"] * len(VARIANTS)
    assert not list(together.glob("*-1/*"))


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 3)
    refused("a batch of 32 cannot be shared out equally by 3 processes", lambda: distributed.part(32))


def test_devices_are_found_or_refused():
    assert distributed.resolve("cpu") == torch.device("cpu")
    assert distributed.resolve("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    refused("device must be auto, cpu, cuda or cuda:N, got 'abacus'", lambda: distributed.resolve("abacus"))


def main(folder: Path) -> None:
    """What each process does."""
    with distributed.processes(torch.device("cpu")):
        rank = distributed.rank()
        for name in VARIANTS:
            place = folder / f"{name}-0"  # seen by all
            tensors = {key: value.contiguous() for key, value in outcome(name, place).items()}
            distributed.wait()
            safetensors.torch.save_file(tensors, folder / f"{name}-{rank}.safetensors")
        safetensors.torch.save_file(co_trained(), folder / f"co-trained-{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
