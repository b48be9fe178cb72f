"""One call of a DEQ, one map f: computed weights and dropout masks pinned to the values they have at its beginning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metabroyden.function import FunctionWrapper
from metabroyden.nn.dropout import dropouts
from metabroyden.nn.hold import holding, parametrizations
from metabroyden.solution import Cell, State
from metabroyden.state import AugmentedContext, check_state


def pin(cell: Cell, context: Any, z0: State, *, dtype: torch.dtype | None = None) -> tuple[Cell, Any]:
    """(f, context) to solve with instead of (cell, context): the same ones where the cell has nothing to pin.

    Parametrized weights (`normalise`) are computed here, once, in the caller's grad mode. f uses these tensors in the solve
    and in the gradient, so that gradients reach the parameters behind them. Each active `VariationalDropout` draws a mask
    for every sample. Masks travel with the context (`AugmentedContext`), as the solve hands f only the rows at work;
    without a context they stay in f, which then always sees the full batch. With a dtype f hands the cell states of it.
    """
    module = cell if isinstance(cell, nn.Module) else nn.Identity()
    computed, layers = parametrizations(module), dropouts(module)
    if not computed and not layers and dtype is None:
        return cell, context
    weights = [getattr(layer, name) for layer, name, _ in computed]
    masks: tuple[Tensor, ...] = ()
    if layers:
        check_state(z0, "z0")
        first = z0 if isinstance(z0, Tensor) else z0[0]
        masks = tuple(layer.draw(len(first), first.device) for layer in layers)
    pinned = Pinned(cell, weights, ([made for _, _, made in computed], layers, masks), dtype)
    return pinned, AugmentedContext(context, masks) if masks and context is not None else context


class Pinned(FunctionWrapper):
    """The cell, its computed weights and masks held during each call, in the calling thread only.

    Attributes:
        cell: the map.
        weights: the values of its parametrized weights.
        dtype: of the states that the cell gets; None: any.
    """

    def __init__(self, cell: Cell, weights: list[Tensor], rest: Any, dtype: torch.dtype | None) -> None:
        self.cell = self.inner = cell
        self.weights, self.dtype = weights, dtype
        self._rest = rest  # the parametrizations of these weights, dropout layers, their masks

    def __call__(self, z: State, context: Any = None) -> State:
        """f(z) or f(z, context), for the rows whose masks are in the context."""
        return self.call(self.cell, self.weights, z, context)

    def call(self, cell: Cell, weights: Sequence[Tensor], z: State, context: Any) -> State:
        """f with these weights, and with `cell` in the place of the module."""
        if self.dtype is not None:
            z = pytree.tree_map(lambda part: part.to(self.dtype), z)
        made, layers, masks = self._rest
        x, masks = context if isinstance(context, AugmentedContext) else (context, masks)
        with holding([*zip(made, weights, strict=True), *zip(layers, masks, strict=True)]):
            return cell(z) if x is None else cell(z, x)

    def rewrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function of z, or of z and the context, with the cell's weights and masks in place."""
        return lambda z, context=None: self.call(function, self.weights, z, context)

    def detached(self) -> Pinned:
        """The same map without gradients towards its weights."""
        return Pinned(self.cell, [weight.detach() for weight in self.weights], self._rest, self.dtype)
