"""Our solvers and layers in other libraries. Importing this imports none of those libraries."""

import importlib
from types import ModuleType

from metabroyden.integrations import deepinv, torchdeq
from metabroyden.integrations.loggers import MetricLogger, TensorBoardLogger, WandbLogger
from metabroyden.integrations.monitor import SolveMonitor

__all__ = ["MetricLogger", "SolveMonitor", "TensorBoardLogger", "WandbLogger", "deepinv", "lightning", "torchdeq"]


def __getattr__(name: str) -> ModuleType:
    """`lightning`, which imports the library, where it is asked for."""
    if name != "lightning":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.lightning")
