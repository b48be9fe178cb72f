"""The race's learned solvers: one call of `fit_solver` with its defaults for each family and seed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

import metabroyden as mb
from experiments.bench.problems import Family
from experiments.bench.runner import digest
from experiments.bench.solvers import Contestant
from metabroyden.comparison.figures import FLAGSHIP
from metabroyden.comparison.verdict import UNTUNED

IMAGES, TEXTS = 2000, 1024
"""Training contexts handed over, at most: of images the first ones, of texts random ones, each with a memory of its own."""
VERDICT = "race"
"""Where a file keeps whether the call returned its solver, in the solver's summary."""


def path_of(folder: Path, family: str, seed: int) -> Path:
    """The file of a solver."""
    return folder / f"{family}-seed{seed}.safetensors"


@torch.no_grad()
def contexts(family: Family, seed: int) -> Any:
    """What the owner of the model hands over: contexts of its cell."""
    if family.texts:
        return family.tasks(seed, pool=TEXTS).problems("train")[1]
    return family.model().inject(family.criterion.data.train.images[:IMAGES].to(family.device))  # type: ignore[union-attr]


def fit(family: Family, seed: int, path: Path) -> None:
    """Fit, and save the solver with what the call decided about it.

    Where it trains nothing, since there is nothing to gain, it is made to train all the same.
    """
    given = {"f": family.model().cell, "x_train": contexts(family, seed), "seed": seed, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a refusal is in the file
        returned, verdict = mb.fit_solver(**given, return_report=True)
        hopeless = verdict.name == UNTUNED
        solver = mb.fit_solver(**given, fallback=False) if hopeless else verdict.fitted
    reasons = ["there is nothing to gain"] if hopeless else list(verdict.failed_criteria)
    solver.summary[VERDICT] = {"returned": returned is solver, "reasons": reasons}
    mb.save_solver(solver, path)


def contestant(path: Path, seed: int, device: torch.device) -> Contestant:
    """The solver of a file."""
    return Contestant(FLAGSHIP, "learned", mb.load_solver(path).to(device), digest(path), seed)
