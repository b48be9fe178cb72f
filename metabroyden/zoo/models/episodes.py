"""Checkpoints along one training, in one file: the same DEQ at several ages, for generalisation over weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from metabroyden import checkpoint
from metabroyden.described import check
from metabroyden.zoo.models.fit import build_model

ENOUGH = 30_000_000  # bytes of a file above which some of more than `LEAST` episodes are left out
LEAST = 6


@dataclass(frozen=True)
class _Described:
    epochs: list[int]


class Episodes:
    """Collects a model's weights at `count` of its training's epochs.

    They lie closer together in the beginning, where the weights move most, and the last is the end.
    """

    def __init__(self, epochs: int, count: int = 8) -> None:
        if not 1 <= count <= epochs:
            raise ValueError(f"count must be from 1 to the {epochs} epochs, got {count}")
        wanted = {max(1, round(epochs * ((k + 1) / count) ** 2)) for k in range(count)}
        late = (epoch for epoch in range(epochs, 0, -1) if epoch not in wanted)
        while len(wanted) < count:  # early ones fell together
            wanted.add(next(late))
        self.epochs = tuple(sorted(wanted))

    def note(self, epoch: int, model: Any, folder: Path) -> None:
        """Keep the model's weights after this epoch, where it is one of those wanted."""
        if epoch in self.epochs:
            header = {"config": model.describe()}
            checkpoint.write(_at(folder, epoch), f"episode/{model.kind}", model.state_dict(), header)

    def collect(self, folder: Path, path: Path) -> Path:
        """Write what was kept into one file (`checkpoint.to_half`); of large models some episodes only.

        FileNotFoundError where one is missing.
        """
        tensors: dict[str, Tensor] = {}
        header: dict[str, Any] = {}
        for epoch in self.epochs:
            found, header = checkpoint.read(_at(folder, epoch), "episode")
            tensors |= {f"{epoch}/{name}": value for name, value in found.items()}
        tensors, epochs = checkpoint.to_half(tensors), list(self.epochs)
        while len(epochs) > LEAST and sum(value.nbytes for value in tensors.values()) > ENOUGH:
            left_out = f"{epochs.pop(1)}/"  # the first ones lie closest together
            tensors = {name: value for name, value in tensors.items() if not name.startswith(left_out)}
        kind = header["kind"].split("/")[1]
        return checkpoint.write(path, f"episodes/{kind}", tensors, {"config": header["config"], "epochs": epochs})


def episodes_in(path: str | Path) -> list[int]:
    """The epochs of the models in a file; errors as `load_episodes`."""
    return list(_read(path)[1]["epochs"])


def load_episodes(path: str | Path, **deq_options: Any) -> dict[int, Any]:
    """The models in a file, by epoch, in evaluation mode and float32; `deq_options` as for `load_model`.

    Raises FileNotFoundError, `CheckpointError`: no such file, or none of episodes.
    """
    tensors, header = _read(path)
    models = {}
    full = checkpoint.widened(tensors)
    for epoch in header["epochs"]:
        weights = checkpoint.under(full, f"{epoch}/")
        models[epoch] = build_model(header, weights, path, **deq_options)
    return models


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, header = checkpoint.read(path, "episodes")
    check(header, _Described, path)
    return tensors, header


def _at(folder: Path, epoch: int) -> Path:
    return folder / f"episode-{epoch}.safetensors"
