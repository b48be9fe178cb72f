"""Packing of a DEQ state (one tensor, or several scales) into a (batch, n) matrix and back; pytrees of context."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metabroyden.solution import State

T = TypeVar("T")


class Companion(NamedTuple):
    """A caller's context and what else f needs of every sample, batch first: solvers see the former only."""

    context: Any
    beside: tuple[Tensor, ...]


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
            return z.reshape(len(z), -1)
        return torch.cat([part.reshape(len(part), -1) for part in z], dim=1)

    def take(self, value: Any, z: Tensor) -> Tensor:
        """What f returned at z (R, n), packed and in z's dtype.

        TypeError for what is no tensor or tuple of tensors, ValueError for what is not shaped like the state.
        """
        if self.single and isinstance(value, Tensor) and value.dtype == z.dtype and value.shape[1:] == self.shapes[0]:
            if value.shape == z.shape:  # the usual case, without ceremony
                return value
            if value.shape[0] == z.shape[0]:
                return value.reshape(z.shape)
        parts = (value,) if isinstance(value, Tensor) else value
        if not isinstance(parts, tuple) or not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(f"f must return a tensor or a tuple of tensors like z, got {type(value).__name__}")
        wanted = [(len(z), *shape) for shape in self.shapes]
        got = [tuple(part.shape) for part in parts]
        if got != wanted or not all(part.is_floating_point() for part in parts):
            kinds = [str(part.dtype) for part in parts]
            raise ValueError(f"f must return what z is shaped like: wanted {wanted} floating, got {got} {kinds}")
        return self.pack(value).to(z.dtype)

    def unpack(self, flat: Tensor) -> State:
        """The state of a (B, n) matrix, as the user's f takes it."""
        if self.single:
            return flat if self.is_flat else flat.reshape(len(flat), *self.shapes[0])
        pieces = flat.split([shape.numel() for shape in self.shapes], dim=1)
        return like(
            (piece.reshape(len(flat), *shape) for piece, shape in zip(pieces, self.shapes, strict=True)), self.kind
        )


def like(parts: Iterable[Tensor], kind: type) -> tuple[Tensor, ...]:
    """The parts of a state as a tuple of a kind: a named one where the user's is."""
    return kind._make(parts) if hasattr(kind, "_make") else tuple(parts)


def check_state(z: Any, name: str) -> None:
    """Refuse what is no state: TypeError for a foreign type, ValueError for a bad shape, dtype or value."""
    if not isinstance(z, Tensor) and not (isinstance(z, tuple) and z and all(isinstance(p, Tensor) for p in z)):
        raise TypeError(f"{name} must be a tensor or a non-empty tuple of tensors, got {type(z).__name__}")
    parts = (z,) if isinstance(z, Tensor) else z
    first = parts[0]
    for part in parts:
        if part.dim() == 0:
            raise ValueError(f"{name} must have a batch axis first, got a 0-dimensional tensor")
        if not part.is_floating_point():
            raise ValueError(f"{name} must be of a floating dtype, got {part.dtype}")
        if part.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{name} must be float32 or float64, got {part.dtype}: iterates are kept in at least float32; "
                "f may compute in half precision, what it returns is converted"
            )
        if part.shape[0] == 0 or part.numel() == 0:
            raise ValueError(f"{name} must hold at least one sample and one coordinate, got shape {tuple(part.shape)}")
        if (part.shape[0], part.dtype, part.device) != (first.shape[0], first.dtype, first.device):
            raise ValueError(
                f"the tensors of {name} must agree in batch size, dtype and device, got "
                f"{(part.shape[0], part.dtype, part.device)} beside {(first.shape[0], first.dtype, first.device)}"
            )
        low, high = torch.aminmax(part.detach())  # NaN passes through
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{name} must be finite, got NaN or infinity in it")


def check_context(context: Any, batch: int) -> None:
    """Refuse a context with a tensor that has not the batch on its first axis (ValueError), or with something else that
    may hold the batch and could not be gathered (TypeError)."""
    for leaf in pytree.tree_leaves(context):
        if not isinstance(leaf, (Tensor, bool, int, float, str, type(None))):
            raise TypeError(
                "context must be a pytree (tuples, lists, dicts) of tensors and plain values, "
                f"got {type(leaf).__name__} in it"
            )
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.shape[0] != batch):
            raise ValueError(
                f"every tensor of context must have the batch first: wanted {batch} rows as in z0, "
                f"got shape {tuple(leaf.shape)}"
            )


def gather(tree: T, index: Tensor) -> T:
    """The rows `index` of every tensor in a pytree (a context, a solver state); what is no tensor passes through."""
    if isinstance(tree, Tensor):  # the usual case, without ceremony
        return tree.index_select(0, index)  # type: ignore[return-value]
    return pytree.tree_map(lambda leaf: leaf.index_select(0, index) if isinstance(leaf, Tensor) else leaf, tree)
