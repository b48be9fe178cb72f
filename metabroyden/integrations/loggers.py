"""Where figures by step go: TensorBoard, Weights & Biases, or anything with `log(metrics, step)`."""

from __future__ import annotations

import importlib
from os import PathLike
from typing import Any, Protocol


class MetricLogger(Protocol):
    """Takes named figures of a training step."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write the figures of this step."""


class TensorBoardLogger:
    """Writes figures as TensorBoard's scalars; close it, or use it as a context manager.

    Args:
        log_dir: folder of this run, made where it is not there; `tensorboard --logdir` shows it.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, log_dir: str | PathLike[str]) -> None:
        self._writer = _library("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(log_dir))

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write the figures of this step."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still held back."""
        self._writer.close()

    def __enter__(self) -> TensorBoardLogger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class WandbLogger:
    """Writes figures into a run of Weights & Biases; close it, or use it as a context manager, to end the run.

    wandb drops what is logged for a step smaller than one it has seen: count steps as your own calls of `wandb.log` do.

    Args:
        init: as in `wandb.init`: project, name, config, …

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, **init: Any) -> None:
        self._run = _library("wandb", "wandb").init(**init)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write the figures of this step."""
        self._run.log(metrics, step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()

    def __enter__(self) -> WandbLogger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs {package}, which is not installed: pip install {package}") from error
