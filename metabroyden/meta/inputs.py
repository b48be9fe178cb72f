"""What is handed to `fit_solver` as `x_train`: one pytree, whether it came whole or in batches, checked before anything is
solved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from metabroyden.meta.tasks import count, rows, sampled
from metabroyden.shared import Shared, bare, is_shared
from metabroyden.state import check_context, concatenate

MOST = 2048
"""Samples that are taken from an iterable of batches."""
_CHUNK = 256  # samples of a data set read at once
_WHOLE = (Tensor, Shared, Mapping, tuple, list, str, bytes, np.ndarray)


def gathered(x_train: Any, *, name: str = "f", several: bool = False) -> Any:
    """x_train as one pytree of tensors with the samples first.

    A tensor, tuple, list, dict or other pytree is returned as it is, a mapping as a dict. A `DataLoader`, a `Dataset` and
    any other iterable are taken for batches, each a tensor or a pytree of them, and joined until there are `MOST` samples;
    those of a `Dataset` that has a length are evenly spaced. A batch that is a list of one tensor stands for that tensor.
    A list of several, which is what a DataLoader makes of (input, label) pairs, is refused unless `several` inputs are
    taken.

    Args:
        x_train: see above.
        name: of what will be called with it, for messages.
        several: whether that takes the entries of a list for separate inputs.

    Raises:
        TypeError: batches without a tensor.
        ValueError: no batch, lists of several entries, or batches that differ in structure, in per-sample shapes or in plain
            values.
    """
    if isinstance(x_train, Dataset):
        x_train = DataLoader(_spaced(x_train), batch_size=_CHUNK)
    if not isinstance(x_train, Iterable) or isinstance(x_train, _WHOLE) or type(x_train) in pytree.SUPPORTED_NODES:
        return dict(x_train) if isinstance(x_train, Mapping) and not isinstance(x_train, dict) else x_train
    parts: list[Any] = []
    found = 0
    for batch in x_train:
        parts.append(_as_context(batch, name, several))
        _check_alike(parts[0], parts[-1])
        found += count(parts[-1])
        if found >= MOST:
            break
    if not parts:
        raise ValueError("x_train has no batch to give: an iterator can be read once only")
    whole = concatenate(parts)
    return rows(whole, slice(MOST)) if found > MOST else whole


def _spaced(data: Dataset[Any]) -> Dataset[Any]:
    """At most `MOST` evenly spaced samples of a data set: it may be in the order of its classes."""
    size = 0 if isinstance(data, IterableDataset) or not isinstance(data, Sized) else len(data)
    return Subset(data, torch.linspace(0, size - 1, MOST).long().tolist()) if size > MOST else data


def _as_context(batch: Any, name: str, several: bool) -> Any:
    """One batch as a context."""
    batch = dict(batch) if isinstance(batch, Mapping) and not isinstance(batch, dict) else batch
    if type(batch) is list and len(batch) == 1:
        batch = batch[0]
    if type(batch) is list and not several:
        raise ValueError(
            f"the batches of x_train are lists of {len(batch)}, as a DataLoader makes of (input, label) pairs, and {name} "
            "takes one: give the inputs alone, (x for x, _ in loader), or (tuple(batch) for batch in loader) to hand over "
            "all of them as one tuple"
        )
    tensors = sampled(batch)
    if not tensors or tensors[0].dim() == 0:
        raise TypeError(
            "each batch of x_train must be a tensor, or a pytree of them, with the samples first; got a batch that is "
            f"{_described(batch)}"
        )
    check_context(batch, len(tensors[0]))
    return batch


def _check_alike(first: Any, other: Any) -> None:
    """ValueError where two batches cannot be joined."""
    (one, kind), (two, other_kind) = (pytree.tree_flatten(batch, is_leaf=is_shared) for batch in (first, other))
    if kind != other_kind or list(map(type, one)) != list(map(type, two)):
        raise ValueError(f"the batches of x_train differ in structure: {_described(first)}, then {_described(other)}")
    for leaf, later in zip(one, two, strict=True):
        if isinstance(leaf, Tensor):
            if leaf.shape[1:] != later.shape[1:]:
                raise ValueError(
                    f"the batches of x_train hold samples of shapes {tuple(leaf.shape[1:])} and {tuple(later.shape[1:])}: "
                    "pad them all to one shape"
                )
        elif not is_shared(leaf) and leaf != later:
            raise ValueError(
                f"the batches of x_train differ in a value that is no tensor's: {leaf!r:.40}, {later!r:.40}"
            )


def check_contexts(x_train: Any, *, zeros: bool = False) -> None:
    """TypeError or ValueError for what are no contexts to fit a solver to. zeros: whether the start is zeros like them."""
    leaves = sampled(x_train)
    for leaf in leaves:
        if leaf.is_nested or leaf.layout != torch.strided:
            raise ValueError(
                f"x_train must be dense, got {'a nested tensor' if leaf.is_nested else leaf.layout}: give it padded, or as "
                "mb.Shared(tensor) if all samples share it"
            )
    if not leaves or leaves[0].dim() < 1 or len(leaves[0]) < 10:
        raise ValueError(
            "x_train must be a tensor, a pytree of them or an iterable of batches, with at least 10 samples first, got "
            f"{_described(x_train)}"
        )
    check_context(x_train, len(leaves[0]))
    for leaf in pytree.tree_leaves(bare(x_train)):
        dense = isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.is_floating_point()
        if dense and not bool(torch.isfinite(leaf).all()) and (leaf is x_train or not _is_mask(leaf)):
            raise ValueError("x_train must be finite, got NaN or infinity in it; a mask may hold −inf beside zeros")
    if zeros:
        _check_zeros_like(x_train)


def _is_mask(leaf: Tensor) -> bool:
    """Whether these are zeros and −inf, as masks of attention are that are added to its logits."""
    return bool(((leaf == 0) | (leaf == -torch.inf)).all())


def _check_zeros_like(x_train: Any) -> None:
    dtype = x_train.dtype if isinstance(x_train, Tensor) else None
    if dtype in (torch.float16, torch.bfloat16) or (dtype is not None and dtype.is_complex):
        raise ValueError(
            f"x_train must be float32, float64 or of an integer dtype, got {dtype}; or give z0=, a map x → start"
        )
    if dtype is None or not dtype.is_floating_point:
        more = "; if it is a list of batches, give iter(batches)" if isinstance(x_train, list) else ""
        raise ValueError(
            f"x_train is {dtype or type(x_train).__name__}, so the state cannot be zeros like it: give z0=, a map x → "
            f"start, or f a method initial_state(x){more}"
        )


def _described(tree: Any) -> str:
    """The type of something, of a tensor its shape, of a container what is in it."""
    if isinstance(tree, Tensor):
        return str(tuple(tree.shape))
    kind = type(tree).__name__
    if not isinstance(tree, (tuple, list, dict)):
        return "None" if tree is None else kind
    inner = list(tree.values() if isinstance(tree, dict) else tree)
    shown = [*map(_described, inner[:4]), *(["…"] if len(inner) > 4 else [])]
    return f"{kind} of {', '.join(shown)}" if shown else f"empty {kind}"
