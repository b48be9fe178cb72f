"""One command for a GPU, of at most eight minutes: its tests, solves at four batch sizes, compiled solves, meta-training.

Needs this checkout and the card's own torch, numpy, safetensors, matplotlib, rich, scikit-learn, scikit-image and
networkx; what else is missing there is left out, and the report says so.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from experiments.bench.options import Budgeted, OnDevice, OnModels
from experiments.bench.runner import Row, Run, at_least_one, known, threads
from experiments.gpu import rows as measurements
from experiments.gpu.cases import CASES
from experiments.gpu.report import write
from metabroyden.meta import distributed

SMALL = ("conv-digits", "graph-chains")
"""Models of a trial in small."""
FREE = ("models", "fits", "workloads", "device", "minutes")


@dataclass(frozen=True)
class Gpu(Budgeted, OnModels, OnDevice, command="gpu"):
    """Run the tests marked cuda, solve at several batch sizes, eager and compiled, meta-train; write results/gpu/."""

    only: tuple[str, ...] = tuple(CASES)
    """Which models, by name."""
    batches: tuple[int, ...] = (1, 32, 256, 1024)
    """Problems solved at once."""
    seconds: float = 45.0
    """Of a fit on the device, of models without a solver in the checkout."""
    minutes: float = 7.0
    """After which nothing new is begun."""
    smoke: bool = False
    """The same in small, to see whether it runs: a model of each kind, few problems, two steps of training."""
    fits: Path = Path("results/race/solvers")
    """Where the families' solvers are."""
    workloads: Path = Path("results/workloads/models")
    """Where the workloads' models are."""


def run(config: Gpu) -> None:
    """Model by model, the tests first. Interrupted, it goes on with the next one."""
    at_least_one(config, "budget")
    known("model", config.only, CASES)
    if min(config.batches, default=0) < 1:
        raise ValueError(f"batches must be of at least 1 problem, got {config.batches}")
    device = distributed.resolve(config.device)
    if config.smoke:
        small = tuple(name for name in config.only if name in SMALL)
        config = replace(config, only=small, batches=(1, 4), budget=16)
    job = Run(config, free=FREE, shared=("only", *FREE), inputs=[device.type])
    ends, found, late = time.perf_counter() + 60 * config.minutes, list[Row](), list[str]()
    pieces = {"tests": partial(measurements.tested, config)}
    pieces |= {name: partial(measurements.measured, config, name, device, ends) for name in config.only}
    with threads(torch.get_num_threads() if device.type == "cuda" else 1):
        for name, make in pieces.items():
            if not job.has(name) and time.perf_counter() > ends:
                late.append(name)
                continue
            began = time.perf_counter()
            found += job.unit(name, make)
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU, in place of a GPU"
    job.finish(found, write, card=card, cuda=torch.version.cuda, left_out=late)
