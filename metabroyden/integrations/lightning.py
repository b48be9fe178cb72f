"""PyTorch Lightning: `SolveMonitorCallback`. Importing this imports `lightning` or `pytorch_lightning`."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from metabroyden.integrations.monitor import SolveMonitor


def _callback() -> Any:
    """Lightning's base class: of the package that is imported already, else of the one that is installed."""
    packages = ("lightning.pytorch", "pytorch_lightning")
    for package in sorted(packages, key=lambda package: package not in sys.modules):
        try:
            return importlib.import_module(package).Callback
        except ImportError:
            continue
    raise ImportError("this needs Lightning, which is not installed: pip install lightning")


Callback: Any = _callback()


class SolveMonitorCallback(Callback):
    """Logs evaluations, failures and solver time of every `mb.DEQ` in a LightningModule.

        trainer = Trainer(callbacks=[SolveMonitorCallback()])

    The figures are those of `SolveMonitor`, named `train/deq/nfe_mean`, `val/deq/nfe_mean` and `test/deq/nfe_mean`; they go
    through `log_dict` of the module, so to every logger of the trainer, and `EarlyStopping` and `ModelCheckpoint` can
    monitor them. What validation solves does not count as training.

    With several processes each logs what it solved itself, and loggers write the figures of the first.

    Args:
        logging_interval: when training is logged. "step": whenever Lightning writes the metrics of a step, as its
            `log_every_n_steps` says, the figures of all solves since it last did; "epoch": once an epoch. Validation and
            tests are logged once an epoch.

    Raises:
        ValueError: another logging_interval; or, where training or an evaluation begins, no DEQ in the module.
    """

    def __init__(self, logging_interval: str = "step") -> None:
        super().__init__()
        if logging_interval not in ("step", "epoch"):
            raise ValueError(f"logging_interval must be 'step' or 'epoch', got {logging_interval!r}")
        self._by_step = logging_interval == "step"
        self._monitors: dict[str, SolveMonitor] = {}  # by stage; one at most is attached
        self._steps = 0  # the trainer's when the last batch ended

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count."""
        self._steps = trainer.global_step
        self._begin("train", pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log where Lightning is about to write the metrics of a step."""
        stepped = trainer.global_step != self._steps or not pl_module.automatic_optimization
        self._steps = trainer.global_step
        if self._by_step and stepped and trainer._logger_connector.should_update_logs:
            self._log("train", pl_module, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the epoch."""
        if not self._by_step:
            self._log("train", pl_module, on_step=False, on_epoch=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the module as it was."""
        self._end("train")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Count for validation; training waits."""
        self._begin("val", pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the validation."""
        self._log("val", pl_module, on_step=False, on_epoch=True)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Training counts again."""
        self._end("val")

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count."""
        self._begin("test", pl_module)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the test."""
        self._log("test", pl_module, on_step=False, on_epoch=True)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the module as it was."""
        self._end("test")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was."""
        for stage in tuple(self._monitors):
            self._end(stage)

    def _begin(self, stage: str, pl_module: Any) -> None:
        monitor = SolveMonitor(pl_module)
        for other in self._monitors.values():
            other.detach()
        self._monitors[stage] = monitor

    def _end(self, stage: str) -> None:
        self._monitors.pop(stage).detach()
        for other in self._monitors.values():
            other.attach()

    def _log(self, stage: str, pl_module: Any, **when: bool) -> None:
        monitor = self._monitors[stage]
        figures = {f"{stage}/{name}": value for name, value in monitor.metrics().items()}
        pl_module.log_dict(figures, batch_size=1, **when)
        monitor.reset()
