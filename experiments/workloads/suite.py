"""The workloads by name, and the files of their trained models."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import metabroyden as mb
from experiments.bench.runner import Row, threads
from experiments.workloads import graphs, imaging, puzzles, texts
from experiments.workloads.brought import Brought
from metabroyden import checkpoint
from metabroyden.checkpoint import load_weights

MODELS = Path("results/workloads/models")
COTRAINED = ("masked-encoder",)
"""Workloads that are measured after `mb.cotrain`, too."""


class Workload(NamedTuple):
    """One of them.

    Attributes:
        words: what it is.
        measure: what its metric is.
        build: the untrained model.
        train: (model, file) ↦ facts about its training, which goes on from that file where it was interrupted.
        bring: (model, test problems) ↦ what its owner would hand over.
        seconds: of a fit; None: fit_solver's own number of steps.
        lesson: arguments of `mb.cotrain` beside the model.
    """

    words: str
    measure: str
    build: Callable[[], Any]
    train: Callable[[Any, Path], Row]
    bring: Callable[[Any, int], Brought]
    seconds: float | None = None
    lesson: Callable[[], dict[str, Any]] | None = None


def at_once(train: Callable[[Any], Row]) -> Callable[[Any, Path], Row]:
    """A short training, of which nothing is kept on the way."""
    return lambda model, _: train(model)


WORKLOADS: dict[str, Workload] = {
    **{
        f"graph-{kind}": Workload(task.words, "accuracy", task.build, at_once(task.train), task.bring)
        for kind, task in graphs.TASKS.items()
    },
    **{
        name: Workload(task.words, task.measure, task.build, task.train, task.bring, task.seconds, task.lesson)
        for name, task in texts.TASKS.items()
    },
    "sudoku": Workload(puzzles.WORDS, "puzzles solved", puzzles.build, puzzles.train, puzzles.bring),
    **{
        name: Workload(words, "PSNR, dB", build, at_once(imaging.train), imaging.bring, imaging.SECONDS)
        for name, (words, build) in imaging.TASKS.items()
    },
}


def _cotrained(name: str) -> Workload:
    """The same after `mb.cotrain`."""
    original = WORKLOADS[name]
    assert original.lesson is not None
    lesson = original.lesson

    def train(model: Any, path: Path) -> Row:
        began, trained = time.perf_counter(), model_of(name, path.parent).requires_grad_(True)
        given = lesson()
        found = mb.cotrain(trained, **given, progress=False)
        model.load_state_dict(found.state_dict())
        return {"seconds": round(time.perf_counter() - began), "steps": given["steps"], "kept": found is not trained}

    return original._replace(words=f"{name}, co-trained", train=train, lesson=None)


WORKLOADS |= {f"{name}-cotrained": _cotrained(name) for name in COTRAINED}


def path_of(name: str, folder: Path = MODELS) -> Path:
    """The file of a trained model."""
    return folder / f"{name}.safetensors"


def model_of(name: str, folder: Path = MODELS) -> Any:
    """A trained model in evaluation mode, trained now where its file is missing."""
    work, path = WORKLOADS[name], path_of(name, folder)
    model = work.build()
    if not path.exists():
        going = path.with_suffix(".training")
        with threads(1):
            facts = work.train(model, going)
        checkpoint.write(path, f"workload/{name}", model.state_dict(), {"facts": facts})
        going.unlink(missing_ok=True)
    tensors, _ = checkpoint.read(path, "workload")
    load_weights(model, tensors, path)
    return model.eval().requires_grad_(False)


def facts_of(name: str, folder: Path = MODELS) -> Row:
    """What its training left behind."""
    return checkpoint.read(path_of(name, folder), "workload")[1]["facts"]
