"""What is handed to `fit_solver` as `x_train`, to `compare` as `x_test`: one pytree, whether it came whole or in batches,
checked before anything is solved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from metabroyden.meta.tasks import count, rows, sampled
from metabroyden.padded import Graphs, values_of
from metabroyden.shared import Shared, bare, is_shared
from metabroyden.state import check_context, concatenate

MOST = 2048
"""Samples that are taken from an iterable of batches."""
_CHUNK = 256  # samples of a data set read at once
_WHOLE = (Tensor, Shared, Mapping, tuple, list, str, bytes, np.ndarray)


def gathered(x: Any, *, name: str = "f", several: bool = False, given: str = "x_train") -> Any:
    """Contexts as one pytree of tensors with the samples first.

    A tensor, tuple, list, dict or other pytree is returned as it is, a mapping as a dict. A `DataLoader`, a `Dataset` and
    any other iterable are taken for batches, each a tensor or a pytree of them, and joined until there are `MOST` samples;
    those of a `Dataset` that has a length are evenly spaced. A batch that is a list of one tensor stands for that tensor.
    A list of several, which is what a DataLoader makes of (input, label) pairs, is refused unless `several` inputs are
    taken.

    Args:
        x: see above.
        name: of what will be called with it, for messages.
        several: whether that takes the entries of a list for separate inputs.
        given: the name of the argument, for messages.

    Raises:
        TypeError: batches without a tensor.
        ValueError: no batch, lists of several entries, or batches that differ in structure, in per-sample shapes or in plain
            values.
    """
    if isinstance(x, Dataset):
        x = DataLoader(_spaced(x), batch_size=_CHUNK)
    if not isinstance(x, Iterable) or isinstance(x, _WHOLE) or type(x) in pytree.SUPPORTED_NODES:
        return dict(x) if isinstance(x, Mapping) and not isinstance(x, dict) else x
    parts: list[Any] = []
    found = 0
    for batch in x:
        parts.append(_as_context(batch, name, several, given))
        _check_alike(parts[0], parts[-1], given)
        found += count(parts[-1])
        if found >= MOST:
            break
    if not parts:
        raise ValueError(f"{given} has no batch to give: an iterator can be read once only")
    whole = concatenate(parts)
    return rows(whole, slice(MOST)) if found > MOST else whole


def _spaced(data: Dataset[Any]) -> Dataset[Any]:
    """At most `MOST` evenly spaced samples of a data set: it may be in the order of its classes."""
    size = 0 if isinstance(data, IterableDataset) or not isinstance(data, Sized) else len(data)
    return Subset(data, torch.linspace(0, size - 1, MOST).long().tolist()) if size > MOST else data


def _as_context(batch: Any, name: str, several: bool, given: str) -> Any:
    """One batch as a context."""
    batch = dict(batch) if isinstance(batch, Mapping) and not isinstance(batch, dict) else batch
    if type(batch) is list and len(batch) == 1:
        batch = batch[0]
    if type(batch) is list and not several:
        raise ValueError(
            f"the batches of {given} are lists of {len(batch)}, as a DataLoader makes of (input, label) pairs, and {name} "
            "takes one: give the inputs alone, (x for x, _ in loader), or (tuple(batch) for batch in loader) to hand over "
            "all of them as one tuple"
        )
    tensors = sampled(batch)
    if not tensors or tensors[0].dim() == 0:
        raise TypeError(
            f"each batch of {given} must be a tensor, or a pytree of them, with the samples first; got a batch that is "
            f"{_described(batch)}"
        )
    check_context(batch, len(tensors[0]))
    return batch


def _check_alike(first: Any, other: Any, given: str) -> None:
    """ValueError where two batches cannot be joined."""
    (one, kind), (two, other_kind) = (pytree.tree_flatten(batch, is_leaf=is_shared) for batch in (first, other))
    if kind != other_kind or list(map(type, one)) != list(map(type, two)):
        raise ValueError(f"the batches of {given} differ in structure: {_described(first)}, then {_described(other)}")
    for leaf, later in zip(one, two, strict=True):
        if isinstance(leaf, Tensor):
            if leaf.shape[1:] != later.shape[1:]:
                raise ValueError(
                    f"the batches of {given} hold samples of shapes {tuple(leaf.shape[1:])} and {tuple(later.shape[1:])}: "
                    "pad them all to one shape"
                )
        elif not is_shared(leaf) and leaf != later:
            raise ValueError(
                f"the batches of {given} differ in a value that is no tensor's: {leaf!r:.40}, {later!r:.40}"
            )


def _more_of_few(x: Any, zeros: bool) -> str:
    """What to do where there are few contexts; zeros: of a plain f, whose start is zeros like them."""
    if isinstance(x, Graphs):
        return "make more of few: mb.Graphs.around(x, edge_index, hops=…, count=…) takes parts of one large graph"
    words = "make more of few, by noise, masks or parts of them"
    if zeros and isinstance(x, Tensor) and x.dim() == 3 and len(x) == 1:
        words += (
            f"; if its {x.shape[1]} points do not see one another, give lambda z, x: f(z[None], x[None])[0] and x[0]"
        )
    return words


def check_contexts(x: Any, *, zeros: bool = False, given: str = "x_train", least: int = 10) -> None:
    """TypeError or ValueError for what are no contexts to solve for.

    Args:
        x: the contexts.
        zeros: whether the start is zeros like them.
        given: the name of the argument, for messages.
        least: how many there must be.
    """
    leaves = sampled(x)
    for leaf in leaves:
        if leaf.is_nested or leaf.layout != torch.strided:
            raise ValueError(
                f"{given} must be dense, got {'a nested tensor' if leaf.is_nested else leaf.layout}: give it padded, or as "
                "mb.Shared(tensor) if all samples share it"
            )
    if not leaves or leaves[0].dim() < 1 or len(leaves[0]) < least:
        few = bool(leaves) and leaves[0].dim() > 0 and 0 < len(leaves[0]) < least
        more = f"; {_more_of_few(x, zeros)}: a solver is fitted to many problems" if few else ""
        raise ValueError(
            f"{given} must be a tensor, a pytree of them or an iterable of batches, with at least {least} sample"
            f"{'s' if least > 1 else ''} first, got {_described(x)}{more}"
        )
    check_context(x, len(leaves[0]))
    for leaf in pytree.tree_leaves(bare(x)):
        dense = isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.is_floating_point()
        if dense and not bool(torch.isfinite(leaf).all()) and (leaf is x or not _is_mask(leaf)):
            raise ValueError(f"{given} must be finite, got NaN or infinity in it; a mask may hold −inf beside zeros")
    if zeros:
        _check_zeros_like(x, given)


def _is_mask(leaf: Tensor) -> bool:
    """Whether these are zeros and −inf, as masks of attention are that are added to its logits."""
    return bool(((leaf == 0) | (leaf == -torch.inf)).all())


def _check_zeros_like(x: Any, given: str) -> None:
    x = values_of(x)
    dtype = x.dtype if isinstance(x, Tensor) else None
    if dtype in (torch.float16, torch.bfloat16) or (dtype is not None and dtype.is_complex):
        raise ValueError(
            f"{given} must be float32, float64 or of an integer dtype, got {dtype}; or give z0=, a map x → start"
        )
    if dtype is None or not dtype.is_floating_point:
        more = "; if it is a list of batches, give iter(batches)" if isinstance(x, list) else ""
        raise ValueError(
            f"{given} is {dtype or type(x).__name__}, so the state cannot be zeros like it: give z0=, a map x → "
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
