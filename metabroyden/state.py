"""Packing of a DEQ state (one tensor, or several scales) into a (batch, n) matrix and back; pytrees of context."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metabroyden.shared import WATCH, Shared, is_shared
from metabroyden.solution import State

T = TypeVar("T")


class AugmentedContext(NamedTuple):
    """A caller's context and what else f needs of every sample, batch first: solvers see the former only."""

    context: Any
    extra: tuple[Tensor, ...]


def callers_context(context: Any) -> Any:
    """The context as the caller gave it, without what else f needs."""
    return context.context if isinstance(context, AugmentedContext) else context


@dataclass(frozen=True)
class Packing:
    """How a state is laid out: per-sample shapes (batch axis left out) of its tensors, in order.

    `single` says that the user handed one bare tensor and gets one back, `kind` what sort of tuple (a named one, say).
    """

    shapes: tuple[torch.Size, ...]
    single: bool
    kind: type = tuple

    @classmethod
    def of(cls, z: State, name: str = "z0") -> Packing:
        """The packing of z; ValueError when z is no valid state (see `check_state`)."""
        check_state(z, name)
        parts = (z,) if isinstance(z, Tensor) else z
        single = isinstance(z, Tensor)
        return cls(tuple(part.shape[1:] for part in parts), single, tuple if single else type(z))

    @property
    def is_flat(self) -> bool:
        """Whether the state is one tensor (B, n) already."""
        return self.single and len(self.shapes[0]) == 1

    @property
    def shape(self) -> torch.Size | tuple[torch.Size, ...]:
        """Per-sample shape of the state as the user sees it."""
        return self.shapes[0] if self.single else self.shapes

    def pack(self, z: State) -> Tensor:
        """(B, n) matrix of the state; a view where z is one contiguous tensor."""
        if isinstance(z, Tensor):
            return _flat(z)
        return torch.cat([_flat(part) for part in z], dim=1)

    def take(self, value: Any, z: Tensor) -> Tensor:
        """What f returned at z (R, n), packed and in z's dtype.

        TypeError for what is no tensor or tuple of tensors, ValueError for what is not shaped like the state.
        """
        if self.single and isinstance(value, Tensor) and self._fits(value, z):  # the usual case, without ceremony
            return value if value.shape == z.shape else value.reshape(z.shape)
        parts = (value,) if isinstance(value, Tensor) else value
        if not isinstance(parts, tuple) or not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(f"f must return a tensor or a tuple of tensors like z, got {type(value).__name__}")
        for part in parts:
            _check_dense(part, "what f returns")
            _check_real(part, "what f returns")
        wanted = [(z.shape[0], *shape) for shape in self.shapes]
        got = [tuple(part.shape) for part in parts]
        if got != wanted or not all(part.is_floating_point() for part in parts):
            kinds = [str(part.dtype) for part in parts]
            raise ValueError(f"f must return what z is shaped like: wanted {wanted} floating, got {got} {kinds}")
        return self.pack(value).to(z.dtype)

    def _fits(self, value: Tensor, z: Tensor) -> bool:
        """Whether a tensor is that of a state of one tensor, of z (R, n), as it stands."""
        if value.dtype != z.dtype or value.layout != torch.strided or value.is_nested:
            return False
        return value.shape[1:] == self.shapes[0] and value.shape[0] == z.shape[0]

    def unpack(self, flat: Tensor) -> State:
        """The state of a (B, n) matrix, as the user's f takes it."""
        if self.single:
            return flat if self.is_flat else flat.reshape(flat.shape[0], *self.shapes[0])
        pieces = flat.split([shape.numel() for shape in self.shapes], dim=1)
        parts = (piece.reshape(flat.shape[0], *shape) for piece, shape in zip(pieces, self.shapes, strict=True))
        return like(parts, self.kind)


def _flat(z: Tensor) -> Tensor:
    """(B, n), of an empty batch too."""
    return z.reshape(z.shape[0], math.prod(z.shape[1:]))


def like(parts: Iterable[Tensor], kind: type) -> Any:
    """The state that has these parts, as a state of this type has them: a tensor, a tuple or a named tuple."""
    if issubclass(kind, Tensor):
        return next(iter(parts))
    return kind._make(parts) if hasattr(kind, "_make") else tuple(parts)


def check_state(z: Any, name: str) -> None:
    """Refuse what is no state: TypeError for a foreign type, ValueError for a bad shape, dtype or value."""
    if not isinstance(z, Tensor) and not (isinstance(z, tuple) and z and all(isinstance(p, Tensor) for p in z)):
        raise TypeError(f"{name} must be a tensor or a non-empty tuple of tensors, got {type(z).__name__}")
    parts = (z,) if isinstance(z, Tensor) else z
    first = parts[0]
    for part in parts:
        _check_part(part, name)
        if (part.shape[0], part.dtype, part.device) != (first.shape[0], first.dtype, first.device):
            raise ValueError(
                f"the tensors of {name} must agree in batch size, dtype and device, got "
                f"{(part.shape[0], part.dtype, part.device)} beside {(first.shape[0], first.dtype, first.device)}"
            )
        if part.shape[0] == 0 or torch.compiler.is_compiling():  # a compiler or torch.export knows no values
            continue
        low, high = torch.aminmax(part.detach())  # NaN passes through
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{name} must be finite, got NaN or infinity in it")


def _check_part(part: Tensor, name: str) -> None:
    _check_dense(part, name)
    if part.dim() == 0:
        raise ValueError(f"{name} must have a batch axis first, got a 0-dimensional tensor")
    _check_real(part, name)
    if not part.is_floating_point():
        raise ValueError(f"{name} must be of a floating dtype, got {part.dtype}")
    if part.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"{name} must be float32 or float64, got {part.dtype}: iterates are kept in at least float32; "
            "f may compute in half precision, what it returns is converted"
        )
    if 0 in part.shape[1:]:
        raise ValueError(f"{name} must hold at least one coordinate a sample, got shape {tuple(part.shape)}")


def _check_dense(part: Tensor, name: str) -> None:
    if part.is_nested or part.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {_layout(part)}")


def _check_real(part: Tensor, name: str) -> None:
    if part.is_complex():
        raise ValueError(
            f"{name} must be real, got {part.dtype}: solve for torch.view_as_real(z), and let f take "
            "torch.view_as_complex of it and return torch.view_as_real of its value"
        )


def _layout(tensor: Tensor) -> str:
    return f"a nested tensor, layout {tensor.layout}" if tensor.is_nested else f"layout {tensor.layout}"


def check_context(context: Any, batch: int, owner: Any = None) -> None:
    """Refuse what could not be gathered: ValueError for a tensor without the batch on its first axis or of a layout that
    has no rows, TypeError for something else that may hold the batch.

    Warns of tensors that look shared (see `SharedWatch`, and `owner_of` for the owner of f), at the caller of the caller.
    """
    gathered = []
    for leaf in [context] if isinstance(context, Tensor) else pytree.tree_leaves(context, is_leaf=is_shared):
        if isinstance(leaf, Shared):
            if leaf.tensor.is_nested or leaf.tensor.dim() == 0 or leaf.tensor.shape[0] != batch:
                WATCH.note(owner, leaf.tensor)
            continue
        if not isinstance(leaf, (Tensor, bool, int, float, str, type(None))):
            raise TypeError(
                "context must be a pytree (tuples, lists, dicts) of tensors and plain values, "
                f"got {type(leaf).__name__} in it"
            )
        if isinstance(leaf, Tensor):
            _check_rows(leaf, batch, owner)
            gathered.append(leaf)
    if not torch.compiler.is_compiling():
        WATCH.check(owner, gathered, stacklevel=5)


def _check_rows(leaf: Tensor, batch: int, owner: Any) -> None:
    if leaf.is_nested or leaf.layout not in (torch.strided, torch.sparse_coo):
        raise ValueError(
            f"a tensor of context cannot be gathered by rows, got {_layout(leaf)}: pass it dense (padded, with its lengths) "
            "or as torch.sparse_coo, or as mb.Shared(tensor) if all samples share it"
        )
    if leaf.dim() == 0 or leaf.shape[0] != batch:
        WATCH.note(owner, leaf)
        edges = leaf.dim() == 2 and len(leaf) == 2 and leaf.dtype == torch.long
        raise ValueError(
            f"every tensor of context must have the batch first: wanted {batch} rows as in z0, "
            f"got shape {tuple(leaf.shape)}; if all samples share it, pass mb.Shared(tensor)"
            + (", and the edges of graphs in mb.Graphs" if edges else "")
        )


def gather(tree: T, index: Tensor) -> T:
    """The rows `index` of every tensor in a pytree (a context, a solver state); what is no tensor, or is shared by all
    samples, passes through."""
    if isinstance(tree, Tensor):  # the usual case, without ceremony
        return tree.index_select(0, index)  # type: ignore[return-value]
    if isinstance(tree, tuple) and (type(tree) is tuple or hasattr(tree, "_make")):
        return like((gather(part, index) for part in tree), type(tree))
    return pytree.tree_map(
        lambda leaf: leaf.index_select(0, index) if isinstance(leaf, Tensor) else leaf, tree, is_leaf=is_shared
    )


def concatenate(trees: Sequence[T]) -> T:
    """The rows of several pytrees of one structure, one after another; what is shared, or is no tensor, is the first's."""
    return pytree.tree_map(
        lambda first, *rest: torch.cat([first, *rest]) if isinstance(first, Tensor) else first,
        *trees,
        is_leaf=is_shared,
    )


def in_dtype_of(context: Any, z: Tensor) -> Any:
    """The context as a solver sees it: floating tensors in the iterates' dtype (f's own may be half precision), and shared
    tensors as they are, without their mark."""

    def seen(leaf: Any) -> Any:
        tensor = leaf.tensor if isinstance(leaf, Shared) else leaf
        return tensor.to(z.dtype) if isinstance(tensor, Tensor) and tensor.is_floating_point() else tensor

    return seen(context) if isinstance(context, Tensor) else pytree.tree_map(seen, context, is_leaf=is_shared)
