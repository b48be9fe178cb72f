"""Inputs with their targets: pairs and batches of them, their losses and scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from metabroyden.meta.target import call_arguments
from metabroyden.meta.tasks import count, rows, sampled
from metabroyden.state import concatenate

CHUNK, MOST = 256, 2048
"""Validation samples that go through the model at once, and in all at most."""
IGNORED = -100
"""Integer targets that count in no loss and no score, as in torch's cross-entropy."""


class Batches:
    """(inputs, targets) without end: drawn from a pair, or read again and again from an iterable.

    Attributes:
        sample: (inputs, targets) of the first samples.
    """

    def __init__(self, data: Any, size: int, seed: int) -> None:
        self.data, self.size = data, size
        self.generator = torch.Generator().manual_seed(seed)
        self.sample = read(data, "data")

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        if _is_pair(self.data):
            total, size = count(self.data), min(self.size, count(self.data))
            while True:
                order = torch.randperm(total, generator=self.generator, device="cpu")
                for index in order[: total // size * size].split(size):
                    yield rows(self.data, index)
        while True:
            found = None
            for found in self.data:
                yield _pair(found, "data")
            if found is None:
                raise ValueError("data has no batch to give")


class Task:
    """Loss and score of outputs and targets."""

    def __init__(self, loss: Any, score: Any) -> None:
        for name, given in {"loss": loss, "score": score}.items():
            if given is not None and not callable(given):
                raise TypeError(f"{name} must be a function of outputs and targets, got {type(given).__name__}")
        self._loss, self._score = loss, score

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """A scalar with its graph."""
        if self._loss is not None:
            found = self._loss(outputs, targets)
        elif are_classes(outputs, targets):
            found = functional.cross_entropy(outputs.flatten(0, -2), targets.flatten().long(), ignore_index=IGNORED)
        else:
            found = functional.mse_loss(outputs, targets)
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise ValueError("loss must give a scalar tensor: (outputs, targets) → the mean loss of a batch")
        return found.reshape(())

    def score(self, outputs: Any, targets: Any) -> Tensor:
        """(B,) scores, or () their mean."""
        if self._score is not None:
            found = self._score(outputs, targets)
            if not isinstance(found, Tensor | float | int):
                raise TypeError(f"score must give a tensor or a number, got {type(found).__name__}")
            found = torch.as_tensor(found).detach().double().cpu()
            if found.dim() > 1 or (found.dim() == 1 and len(found) != count(targets)):
                given = tuple(found.shape)
                raise ValueError(f"score must give ({count(targets)},) numbers, or their mean, got {given}")
            return found
        if not are_classes(outputs, targets):
            return -(outputs - targets).double().square().reshape(len(targets), -1).mean(dim=1).cpu()
        counted = (targets != IGNORED).reshape(len(targets), -1)
        hits = (outputs.argmax(dim=-1) == targets).reshape(len(targets), -1) & counted
        shares = hits.double().sum(dim=1) / counted.double().sum(dim=1).clamp_min(1)
        known = torch.isfinite(outputs).reshape(len(outputs), -1).all(dim=1)
        return shares.where(known, torch.nan).cpu()  # the largest of what is not finite is no answer


def beside(model: nn.Module, batch: tuple[Any, Any]) -> tuple[Any, Any]:
    """A batch where the model is."""
    device = next(model.parameters()).device
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), batch)


def run_on(model: nn.Module, inputs: Any) -> Any:
    """Outputs of a model for inputs, which may be named."""
    positional, named = call_arguments(model, inputs)
    return model(*positional, **named)


def are_classes(outputs: Any, targets: Any) -> bool:
    """Whether targets are integers; TypeError or ValueError where the usual loss and score do not fit."""
    if not isinstance(targets, Tensor) or not isinstance(outputs, Tensor):
        kinds = f"outputs {type(outputs).__name__}, targets {type(targets).__name__}"
        raise TypeError(f"{kinds}: give loss= and score=, functions of outputs and targets")
    classes = not targets.is_floating_point()
    wanted = outputs.shape[:-1] if classes else outputs.shape
    if targets.shape != wanted:
        what = "integer targets must be one for each row of class logits" if classes else "targets must be like outputs"
        raise ValueError(
            f"{what}, shape {tuple(wanted)}, got {tuple(targets.shape)}; or give loss= and score=, functions of both"
        )
    return classes


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple) and len(data) == 2


def _pair(found: Any, given: str) -> tuple[Any, Any]:
    """(inputs, targets), cut off from any graph; TypeError or ValueError for what is no such pair."""
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        kind = type(found).__name__
        raise TypeError(f"{given} must be (inputs, targets), or batches of such pairs, got a batch that is {kind}")
    for part, name in zip(found, ("inputs", "targets"), strict=True):
        if not sampled(part):
            raise TypeError(f"{given}: {name} must be a tensor or a pytree of them, got {type(part).__name__}")
    if count(found[0]) != count(found[1]):
        raise ValueError(f"{given} has {count(found[0])} inputs and {count(found[1])} targets")
    return pytree.tree_map_only(Tensor, Tensor.detach, (found[0], found[1]))


def _checked(data: Any, given: str) -> Any:
    """A pair of inputs and targets, or what can be read for such pairs more than once; TypeError or ValueError else."""
    if _is_pair(data):
        return _pair(data, given)
    if isinstance(data, (Tensor, str, dict)) or not isinstance(data, Iterable):
        raise TypeError(f"{given} must be (inputs, targets), or batches of such pairs, got {type(data).__name__}")
    if iter(data) is data:
        raise ValueError(
            f"{given} is a {type(data).__name__}, which can be read once only: give a list or a DataLoader"
        )
    return data


def split(data: Any, validation: Any, seed: int) -> tuple[Any, Any]:
    """(training, validation) data: as given, or four fifths and one of a pair, drawn by the seed."""
    data = _checked(data, "data")
    if validation is not None:
        return data, _checked(validation, "validation")
    if not _is_pair(data):
        raise ValueError("of batches cotrain cannot hold out a part: give validation=, batches or a pair of their own")
    total = count(data)
    if total < 20:
        raise ValueError(f"data must be of at least 20 samples, got {total}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed), device="cpu")
    return rows(data, order[total // 5 :]), rows(data, order[: total // 5])


def read(data: Any, given: str) -> tuple[Any, Any]:
    """(inputs, targets) of the first samples, at most `MOST`; of batches as many as are needed are read, once."""
    parts: list[tuple[Any, Any]] = [data] if _is_pair(data) else []
    for batch in () if parts else data:
        parts.append(_pair(batch, given))
        shapes = [[tuple(leaf.shape[1:]) for leaf in sampled(part)] for part in (parts[0], parts[-1])]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the batches of {given} hold samples of shapes {shapes[0]} and {shapes[1]}: pad them to one"
            )
        if sum(map(count, parts)) >= MOST:
            break
    if not parts or count(parts[0]) == 0:
        raise ValueError(f"{given} has no batch to give")
    return rows(concatenate(parts) if len(parts) > 1 else parts[0], slice(MOST))


def chunks(data: tuple[Any, Any]) -> list[tuple[Any, Any]]:
    """Batches of a pair."""
    return [rows(data, index) for index in torch.arange(count(data), device="cpu").split(CHUNK)]
