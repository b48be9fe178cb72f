"""The experiments by name: (config type, run)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments import (
    alternate,
    digits,
    drop_in,
    fit,
    generalise,
    gradients,
    lost,
    memory,
    meta,
    models,
    pes,
    race,
    solvers,
    specialise,
    throughput,
    tune_hyper,
)

EXPERIMENTS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "digits": (digits.Digits, digits.run),
    "solvers": (solvers.Solvers, solvers.run),
    "gradients": (gradients.Gradients, gradients.run),
    "memory": (memory.Memory, memory.run),
    "drop-in": (drop_in.DropIn, drop_in.run),
    "alternate": (alternate.Alternate, alternate.run),
    "models": (models.Models, models.run),
    "meta": (meta.Meta, meta.run),
    "fit": (fit.Fit, fit.run),
    "tune-hyper": (tune_hyper.TuneHyper, tune_hyper.run),
    "pes": (pes.Pes, pes.run),
    "generalise": (generalise.Generalise, generalise.run),
    "race": (race.Race, race.run),
    "lost": (lost.Lost, lost.run),
    "specialise": (specialise.Specialise, specialise.run),
    "throughput": (throughput.Throughput, throughput.run),
}
