"""The models that run on a GPU: two families, and three whose f is dear. Their inputs need no data beside the checkout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import metabroyden as mb
from experiments.bench.problems import Family, HeldOut
from experiments.race import fitted
from experiments.workloads import graphs, puzzles, texts
from experiments.workloads.suite import model_of, path_of
from metabroyden import checkpoint
from metabroyden.checkpoint import load_weights
from metabroyden.deq import initial_state

WINDOWS = Path("results/gpu/windows.safetensors")
"""Segments of Shakespeare's plays in characters, (N, 128), to fit to and to solve: a GPU's machine may lack the plays."""
SEEN, DISTINCT = 600, 256
"""Problems to fit to; other ones to solve: batches that are larger repeat them."""


class Case(NamedTuple):
    """A trained model on a device.

    Attributes:
        held: problems to solve.
        x_train: contexts to fit to.
        solver: of the checkout; None where one is fitted on the device.
    """

    held: HeldOut
    x_train: Any
    solver: Any


def family(name: str, config: Any, device: torch.device) -> Case:
    """One of images, with the solver that `fit_solver` made in the race, where it is there."""
    one, path = Family(name, config.models, device), fitted.path_of(config.fits, name, 0)
    solver = mb.load_solver(path).to(device) if path.exists() else None
    return Case(one.problems("test", DISTINCT), None if solver else fitted.contexts(one, 0), solver)


def chains(config: Any, device: torch.device) -> Case:
    """Implicit graph networks on chains of up to 200 nodes."""
    task, model = graphs.TASKS["chains"], model_of("graph-chains", config.workloads).to(device)
    drawn = (task.draw(count, seed, seed == graphs.TEST) for count, seed in _counts(config, graphs))
    return _case(model.deq.cell, *(model.inject(*_to(tuple(one), device)) for one in drawn))


def sudoku(config: Any, device: torch.device) -> Case:
    """A looped transformer on Sudoku."""
    model = model_of("sudoku", config.workloads).to(device)
    drawn = (puzzles.puzzles(count, seed, seed == puzzles.TEST) for count, seed in _counts(config, puzzles))
    return _case(model.deq.cell, *(model.inject(*_to(one, device)) for one in drawn))


def wide(config: Any, device: torch.device) -> Case:
    """A DEQ-Transformer of width 256 on 128 characters; `model_of` would ask for the plays."""
    path = path_of("wide-transformer", config.workloads)
    tensors, _ = checkpoint.read(path, "workload")
    model = texts.Encoder(len(tensors["embed.weight"]), *texts.TASKS["wide-transformer"].sizes)
    load_weights(model, tensors, path)
    model = model.eval().requires_grad_(False).to(device)
    read, _ = checkpoint.read(WINDOWS, "gpu")
    seen, unseen = (
        read[name][:count].long().to(device)
        for name, (count, _) in zip(("train", "test"), _counts(config, texts), strict=True)
    )
    return _case(model.deq.cell, model.inject(seen), model.inject(unseen))


CASES: dict[str, Callable[[Any, torch.device], Case]] = {
    "conv-digits": lambda config, device: family("conv-digits", config, device),
    "sudoku": sudoku,
    "wide-transformer": wide,
    "graph-chains": chains,
    "multiscale-digits": lambda config, device: family("multiscale-digits", config, device),
}
"""By name, in the order in which they run."""


def repeated(held: HeldOut, count: int) -> HeldOut:
    """So many problems, the same ones again where there are not as many."""
    z0, x = held.take(torch.arange(count, device=held.device) % len(held))
    return replace(held, z0=z0, x=x, judge=None, predict=None)


def store_windows(path: Path = WINDOWS) -> None:
    """Write `WINDOWS` anew, from the plays."""
    draw = texts.TASKS["wide-transformer"].criterion.draw
    drawn = {
        name: draw(name, count, torch.Generator().manual_seed(seed))[0].byte()
        for name, count, seed in (("train", SEEN, texts.TRAIN), ("test", DISTINCT, texts.TEST))
    }
    checkpoint.write(path, "gpu/windows", drawn, {})


def _counts(config: Any, module: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """(count, seed) of problems to fit to and of those to solve."""
    return (40 if config.smoke else SEEN, module.TRAIN), (8 if config.smoke else DISTINCT, module.TEST)


@torch.no_grad()
def _case(f: Any, x_train: Any, x_test: Any) -> Case:
    return Case(HeldOut(f, initial_state(f, x_test), x_test), x_train, None)


def _to(values: Any, device: torch.device) -> Any:
    return pytree.tree_map_only(Tensor, lambda part: part.to(device), values)
