"""The experiments by name: `run` of the module of that name, whose config's type is the command line."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

_NAMES = ("digits", "solvers", "gradients", "memory", "drop_in", "alternate", "models", "meta", "tune_hyper", "pes",
          "generalise", "race", "lost", "specialise", "strangers", "ablate", "cotrain", "streams", "workloads",
          "throughput", "physics", "scale", "gpu")  # fmt: skip
EXPERIMENTS: dict[str, Callable[[Any], None]] = {
    name.replace("_", "-"): importlib.import_module(f"experiments.{name}").run for name in _NAMES
}
