"""Tensors in a context that have no batch axis: how a caller marks them, and a word where one was not marked."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False)
class Shared:
    """A tensor of a context that all samples share: it has no batch axis.

    f receives the tensor itself. It is never gathered, so that it may have any shape and any layout, and gradients reach it
    as they reach the rest of the context. A pytree node: whoever flattens a context meets the tensor.

    Args:
        tensor: what all samples share. TypeError for anything but a tensor.

    Examples:
        >>> import torch, metabroyden as mb
        >>> w, x = 0.1 * torch.ones(4, 4), torch.ones(3, 4)
        >>> solution = mb.solve(lambda z, c: z @ c[1] + c[0], 0 * x, (x, mb.Shared(w)), solver=mb.Broyden())
        >>> bool(torch.allclose(solution.z, torch.full((3, 4), 1 / 0.6), atol=1e-2))
        True
    """

    tensor: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.tensor, Tensor):
            raise TypeError(f"Shared marks a tensor, got {type(self.tensor).__name__}")


def is_shared(leaf: Any) -> bool:
    """Whether a node of a context is marked as shared: the `is_leaf` of walks that must tell."""
    return isinstance(leaf, Shared)


def _wrap(children: Any, _: Any) -> Shared:
    made = object.__new__(Shared)  # a walk may put anything in the tensor's place
    object.__setattr__(made, "tensor", next(iter(children)))
    return made


pytree.register_pytree_node(
    Shared, lambda node: ([node.tensor], None), _wrap, serialized_type_name="metabroyden.shared.Shared"
)


def bare(context: Any) -> Any:
    """The context as f takes it, with each shared tensor in the place of its mark; itself where nothing is marked."""
    if context is None or isinstance(context, Tensor):
        return context
    if not any(map(is_shared, pytree.tree_leaves(context, is_leaf=is_shared))):
        return context
    return pytree.tree_map(lambda leaf: leaf.tensor if is_shared(leaf) else leaf, context, is_leaf=is_shared)


class SharedWatch:
    """Warns of tensors that are gathered although they look shared.

    That is one which is a parameter of f, or which f was given before beside a batch of another size: that its first axis
    has the batch's size now is then a coincidence. Holds weak references only.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[Any, Any]] = {}

    def note(self, owner: Any, tensor: Tensor) -> None:
        """An f of this owner was given this tensor beside a batch that its first axis has not the size of."""
        key = id(owner), id(tensor)
        try:
            self._known[key] = tuple(weakref.ref(one, lambda _: self._known.pop(key, None)) for one in (owner, tensor))  # type: ignore[assignment]
        except TypeError:  # no weak references to such an f
            return

    def check(self, owner: Any, gathered: list[Tensor], stacklevel: int) -> None:
        """UserWarning where one of the tensors that are gathered looks shared."""
        for tensor in gathered:
            if self._known and (id(owner), id(tensor)) in self._known:
                self._warn(tensor, "was passed to this f before, beside a batch of another size", stacklevel)
        if isinstance(owner, nn.Module) and gathered:
            places = {_place(tensor): tensor for tensor in gathered}
            for name, parameter in owner.named_parameters():
                place = _place(parameter)
                if place in places:
                    self._warn(places[place], f"is the parameter {name!r} of f", stacklevel)

    @staticmethod
    def _warn(tensor: Tensor, why: str, stacklevel: int) -> None:
        warnings.warn(
            f"a context tensor of shape {tuple(tensor.shape)} {why}: its first axis is taken for the batch, and its rows "
            "are gathered. If all samples share it, pass mb.Shared(tensor)",
            stacklevel=stacklevel + 1,
        )


WATCH = SharedWatch()  # the one of this process


def _place(tensor: Tensor) -> int:
    """Where a tensor's memory begins; a number of its own for one without memory that can be told."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError, ValueError):  # sparse, not initialised, inside torch.func's transforms
        return id(tensor)
