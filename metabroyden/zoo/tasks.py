"""The families of `metabroyden.zoo.models.families` as tasks: contexts of held-out images and of held-out plays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from metabroyden.deq import initial_state
from metabroyden.meta.tasks import TaskSet
from metabroyden.zoo.data.text import TextData, TextSplit
from metabroyden.zoo.models.base import LanguageModel, Memory
from metabroyden.zoo.models.criteria import Images, NextToken, OfFamily, device_of

_WINDOWS = {"train": 8192, "validation": 256, "test": 256}


def family_tasks(model: Any, criterion: OfFamily) -> TaskSet:
    """A trained model's fixed-point problems, with disjoint train, validation and test contexts.

    Raw contexts are images, or consecutive segments, tokens (N, back + 2·length): the memory that belongs to the last is
    that of the one before, solved as `model.deq` solves, and the `back` tokens before them that the model's stem looks at.

    Args:
        model: from `load_model`, or any `EquilibriumModel`.
        criterion: of its family (`get_family(name).criterion()`); TypeError for another one.
    """
    if isinstance(criterion, Images):
        raw = {name: getattr(criterion.data, name).images for name in _WINDOWS}
        encode, augment = model.inject, criterion.augment
    elif isinstance(criterion, NextToken):
        raw = {name: text_windows(criterion.data, name, criterion.length, model.stem.back)[0] for name in _WINDOWS}
        encode, augment = (lambda tokens: second_half(model, tokens, criterion.length)), None
    else:
        raise TypeError(f"criterion must be Images or NextToken, got {type(criterion).__name__}")
    return TaskSet(
        model.cell,
        *raw.values(),
        encode=lambda inputs: encode(inputs.to(device_of(model))),
        augment=augment,
        z0=lambda x: initial_state(model.cell, x),
    )


def text_windows(data: TextData, name: str, length: int, back: int = 0) -> tuple[Tensor, Tensor]:
    """(tokens (N, back + 2·length), targets of the last `length` (N, length)), evenly spaced over a split.

    The first `back` are what was read before, −1 where the split had not begun.
    """
    split: TextSplit = getattr(data, name)
    room = len(split.tokens) - 2 * length - 1
    count = min(_WINDOWS[name], room // (2 * length))
    starts = torch.linspace(0, room, count).long()
    read = functional.pad(split.tokens, (back, 0), value=-1)
    windows = read[starts[:, None] + torch.arange(back + 2 * length + 1)]
    return windows[:, :-1], windows[:, -length:]


@torch.no_grad()
def read_on(model: LanguageModel, tokens: Tensor, length: int) -> tuple[Tensor, Memory]:
    """The last segments of tokens (B, back + 2·length), and their memory: that of the segments before."""
    before, first, second = tokens.split([tokens.shape[1] - 2 * length, length, length], dim=1)
    memory = model.beginning(len(tokens))._replace(tokens=before)
    return second, model.remember(model.deq(model.inject(first, memory)), first, memory)


@torch.no_grad()
def second_half(model: LanguageModel, tokens: Tensor, length: int) -> Any:
    """The context of the last segments of tokens (B, back + 2·length), their memory that of the segments before."""
    return model.inject(*read_on(model, tokens, length))
