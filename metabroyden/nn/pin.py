"""One call of a DEQ, one map f: computed weights and dropout masks pinned to the values they have at its beginning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metabroyden.function import FunctionWrapper
from metabroyden.nn.dropout import VariationalDropout, dropouts
from metabroyden.nn.hold import holding, parametrizations
from metabroyden.solution import State
from metabroyden.state import AugmentedContext, check_state, like


def pin(
    cell: Callable[..., State], context: Any, z0: State, *, dtype: torch.dtype | None = None
) -> tuple[Callable[..., State], Any]:
    """(f, context) to solve with instead of (cell, context): the same ones where the cell has nothing to pin.

    Parametrized weights (`normalise`) are computed here, once, in the caller's grad mode: f uses these very tensors,
    under the no_grad of the solve and in the gradient, so that gradients reach the parameters behind them. Each
    `VariationalDropout` that is active draws a mask for every sample; masks travel beside the context, as the solve
    hands f only the rows at work, or, where there is no context, in f, which then always sees the full batch. With a
    dtype f hands the cell states in that dtype, whatever it gets.
    """
    computed = parametrizations(cell) if isinstance(cell, nn.Module) else []
    layers = dropouts(cell) if isinstance(cell, nn.Module) else []
    if not computed and not layers and dtype is None:
        return cell, context
    weights = [getattr(layer, name) for layer, name, _ in computed]
    masks: tuple[Tensor, ...] = ()
    if layers:
        check_state(z0, "z0")
        first = z0 if isinstance(z0, Tensor) else z0[0]
        masks = tuple(layer.draw(len(first), first.device) for layer in layers)
    pinned = Pinned(cell, [made for _, _, made in computed], weights, layers, masks, dtype)
    return pinned, AugmentedContext(context, masks) if masks and context is not None else context


class Pinned(FunctionWrapper):
    """The cell, its computed weights and masks held for the time of each call, in the calling thread only.

    Attributes:
        cell: the module. weights: the values of its parametrized weights. dtype: that the cell gets states in; None: any.
    """

    def __init__(
        self,
        cell: Callable[..., State],
        made: list[nn.Module],
        weights: list[Tensor],
        layers: list[VariationalDropout],
        masks: tuple[Tensor, ...],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.cell, self.weights, self.dtype = cell, weights, dtype
        self.inner = cell
        self._made, self._layers, self._masks = made, layers, masks

    def __call__(self, z: State, context: Any = None) -> State:
        """f(z) or f(z, context), for the rows whose masks are in the context."""
        return self.call(self.cell, self.weights, z, context)

    def call(self, cell: Callable[..., State], weights: Sequence[Tensor], z: State, context: Any) -> State:
        """f with these weights, and with `cell` doing what the module does."""
        if self.dtype is not None:
            z = z.to(self.dtype) if isinstance(z, Tensor) else like((part.to(self.dtype) for part in z), type(z))
        x, masks = context if isinstance(context, AugmentedContext) else (context, self._masks)
        with holding([*zip(self._made, weights, strict=True), *zip(self._layers, masks, strict=True)]):
            return cell(z) if x is None else cell(z, x)

    def rewrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function of z, or of z and the context, with the cell's weights and masks in place."""

        def run(z: Any, context: Any = None) -> Any:
            return self.call(function, self.weights, z, context)

        return run

    def detached(self) -> Pinned:
        """The same map without gradients towards its weights."""
        weights = [weight.detach() for weight in self.weights]
        return Pinned(self.cell, self._made, weights, self._layers, self._masks, self.dtype)
