"""The Lightning callback, under Lightning's own trainer."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import metabroyden as mb
from metabroyden.foreign import load
from tests.helpers import normal, refused
from tests.integrations.test_monitor import TanhCell, figures_of

load("torchvision")  # Lightning imports it
import pytorch_lightning  # noqa: E402
from pytorch_lightning.callbacks import EarlyStopping  # noqa: E402
from pytorch_lightning.loggers import CSVLogger  # noqa: E402

from metabroyden.integrations.lightning import SolveMonitorCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*(num_workers|GPU|log_every_n_steps|litlogger|litmodels).*")


class Classifier(pytorch_lightning.LightningModule):
    """Keeps the solutions of each stage, by which the log is checked."""

    def __init__(self) -> None:
        super().__init__()
        self.deq, self.head = mb.DEQ(TanhCell(), rtol=1e-4), nn.Linear(5, 2)
        self.solved: dict[str, list[list[mb.Solution]]] = {"train": [], "val": [], "test": []}

    def loss(self, batch, stage):
        z = self.deq(batch)
        self.solved[stage].append([self.deq.last_solution])
        return self.head(z).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch, "train")

    def on_after_backward(self):
        self.solved["train"][-1].append(self.deq.last_backward_solution)

    def validation_step(self, batch, batch_idx):
        self.loss(batch, "val")

    def test_step(self, batch, batch_idx):
        self.loss(batch, "test")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ByHand(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch, "train"))
        if batch_idx % 2:
            optimizer.step()


def loader(batches: int, seed: int = 0) -> DataLoader:
    return DataLoader(3 * normal(4 * batches, 5, seed=seed), batch_size=4)


def trainer_of(folder: Path, *callbacks, **options) -> pytorch_lightning.Trainer:
    options = {"max_epochs": 1, "log_every_n_steps": 1, "num_sanity_val_steps": 0} | options
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    logger = CSVLogger(folder, name=None, version="log")
    return pytorch_lightning.Trainer(accelerator="cpu", logger=logger, callbacks=list(callbacks), **quiet, **options)


def logged(folder: Path, stage: str) -> list[dict[str, float]]:
    """The rows of the log that hold figures of a stage, the stage taken off their names, with their step."""
    with (folder / "log" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    ours = [
        {
            name.removeprefix(f"{stage}/"): float(value)
            for name, value in row.items()
            if name.startswith(stage) and value
        }
        | {"step": int(row["step"])}
        for row in rows
    ]
    return [row for row in ours if len(row) > 1]


def expected(solved: list[list[mb.Solution]]) -> dict[str, float]:
    forward, *backward = zip(*solved, strict=True)
    both = figures_of(forward, "deq/") | (figures_of(backward[0], "deq/backward_") if backward else {})
    return {name: pytest.approx(value.expected, rel=1e-4) for name, value in both.items()}  # float32 on the way


def without_step(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step"}


def test_each_step_and_each_validation_is_logged_with_its_own_solves(tmp_path):
    model = Classifier()
    trainer = trainer_of(tmp_path, SolveMonitorCallback(), max_epochs=2, num_sanity_val_steps=1, val_check_interval=1)
    trainer.fit(model, loader(2), loader(3, seed=1))
    train, val = logged(tmp_path, "train"), logged(tmp_path, "val")
    assert [row["step"] for row in train] == [0, 1, 2, 3]
    assert [without_step(row) for row in train] == [expected([solved]) for solved in model.solved["train"]]
    checked = model.solved["val"][1:]  # without the sanity check
    assert len(val) == 4
    assert [without_step(row) for row in val] == [expected(checked[3 * n : 3 * n + 3]) for n in range(4)]
    assert model.deq.observers == []
    assert "train/deq/nfe_mean" in trainer.callback_metrics


@pytest.mark.parametrize("every", [1, 2])
def test_a_step_of_several_batches_is_logged_with_all_their_solves(tmp_path, every):
    model = Classifier()
    options = {"accumulate_grad_batches": 3, "log_every_n_steps": every}
    trainer_of(tmp_path, SolveMonitorCallback(), **options).fit(model, loader(8))  # steps of 3, 3 and 2 batches
    solved = model.solved["train"]
    shares = [solved[:3], solved[3:6], solved[6:]] if every == 1 else [solved[:6]]
    assert [without_step(row) for row in logged(tmp_path, "train")] == [expected(share) for share in shares]


def test_once_an_epoch_where_that_is_asked_for(tmp_path):
    model = Classifier()
    callback = SolveMonitorCallback(logging_interval="epoch")
    trainer = trainer_of(tmp_path, callback, EarlyStopping("val/deq/nfe_mean", patience=5), max_epochs=2)
    trainer.fit(model, loader(3), loader(1))
    solved = model.solved["train"]
    assert [without_step(row) for row in logged(tmp_path, "train")] == [expected(solved[:3]), expected(solved[3:])]
    trainer.test(model, loader(2), verbose=False)
    trainer.validate(model, loader(2), verbose=False)
    assert without_step(logged(tmp_path, "test")[-1]) == expected(model.solved["test"])
    assert without_step(logged(tmp_path, "val")[-1]) == expected(model.solved["val"][-2:])
    assert model.deq.observers == []


def test_with_optimisation_by_hand_every_batch_is_a_step(tmp_path):
    model = ByHand()
    trainer_of(tmp_path, SolveMonitorCallback()).fit(model, loader(4))
    assert [without_step(row) for row in logged(tmp_path, "train")] == [
        expected([one]) for one in model.solved["train"]
    ]


def test_a_training_that_breaks_off_leaves_the_module_as_it_was(tmp_path):
    class Broken(Classifier):
        def validation_step(self, batch, batch_idx):
            raise ZeroDivisionError

    model, callback = Broken(), SolveMonitorCallback()
    with pytest.raises(ZeroDivisionError):
        trainer_of(tmp_path, callback).fit(model, loader(2), loader(1))
    assert model.deq.observers == []
    assert callback._monitors == {}


def test_a_module_without_a_deq_and_a_wrong_interval_are_refused(tmp_path):
    refused("logging_interval must be 'step' or 'epoch', got 'batch'", lambda: SolveMonitorCallback("batch"))
    plain = Classifier()
    plain.deq = nn.Identity()
    refused("and Classifier has none", lambda: trainer_of(tmp_path, SolveMonitorCallback()).fit(plain, loader(1)))


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = Path(mb.__file__).parents[1] / "docs" / "logging.md"
    (code,) = re.findall(r"```py\n(.*?)```", page.read_text(), re.S)
    exec(code, {})
    assert re.search(r"^tensor\(\d+", capsys.readouterr().out, re.M)


def test_lightning_is_imported_where_it_is_asked_for_and_missed_in_words():
    code = """
import sys, types, metabroyden as mb
absent = dict.fromkeys(("lightning", "lightning.pytorch", "pytorch_lightning"))
sys.modules.update(absent)
try:
    mb.integrations.lightning
except ImportError as error:
    assert "pip install lightning" in str(error), error
else:
    raise SystemExit("imported")
other = types.ModuleType("lightning.pytorch")
other.Callback = type("Callback", (), {})
for name in absent:
    del sys.modules[name]
sys.modules["lightning.pytorch"] = other  # what is imported already is what the trainer in use comes from
assert issubclass(mb.integrations.lightning.SolveMonitorCallback, other.Callback)
assert "pytorch_lightning" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
