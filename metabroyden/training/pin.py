"""One call of a DEQ, one map f: computed weights and dropout masks pinned to the values they have at its beginning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from metabroyden.solution import State
from metabroyden.state import Companion, check_state
from metabroyden.training.dropout import VariationalDropout, dropouts

_ABSENT = object()


def pin(cell: nn.Module, context: Any, z0: State) -> tuple[Callable[..., State], Any]:
    """(f, context) to solve with instead of (cell, context): the same ones where the cell has nothing to pin.

    Parametrized weights (`normalise`) are computed here, once, in the caller's grad mode: f uses these very tensors,
    under the no_grad of the solve and in the gradient, so that gradients reach the parameters behind them. Each
    `VariationalDropout` that is active draws a mask for every sample; masks travel beside the context, as the solve
    hands f only the rows at work, or, where there is no context, in f, which then always sees the full batch.
    """
    weights = _weights(cell)
    layers = dropouts(cell)
    if not weights and not layers:
        return cell, context
    masks: tuple[Tensor, ...] = ()
    if layers:
        check_state(z0, "z0")
        first = z0 if isinstance(z0, Tensor) else z0[0]
        masks = tuple(layer.draw(len(first), first.device) for layer in layers)
    pinned = _Pinned(cell, weights, layers, masks)
    return pinned, Companion(context, masks) if masks and context is not None else context


def _weights(cell: nn.Module) -> list[tuple[nn.Module, Tensor]]:
    """Every parametrization of a cell with the value it has now."""
    return [
        (made, getattr(layer, name))
        for layer in cell.modules()
        if parametrize.is_parametrized(layer)
        for name, made in layer.parametrizations.items()  # type: ignore[union-attr, operator]
    ]


class _Pinned:
    """The cell, its computed weights and masks in place for the time of each call."""

    def __init__(
        self,
        cell: nn.Module,
        weights: list[tuple[nn.Module, Tensor]],
        layers: list[VariationalDropout],
        masks: tuple[Tensor, ...],
    ) -> None:
        self.cell, self.layers, self.masks = cell, layers, masks
        # Not parametrize.cached(): that is global, and gives deep copies of a layer one another's weights.
        self.weights = [(vars(made), "forward", _constant(weight)) for made, weight in weights]

    def __call__(self, z: State, context: Any = None) -> State:
        """f(z) or f(z, context), for the rows whose masks are in the context."""
        x, masks = context if isinstance(context, Companion) else (context, self.masks)
        held = self.weights + [(vars(layer), "mask", mask) for layer, mask in zip(self.layers, masks, strict=True)]
        before = [attributes.get(name, _ABSENT) for attributes, name, _ in held]
        for attributes, name, value in held:
            attributes[name] = value
        try:
            return self.cell(z) if x is None else self.cell(z, x)
        finally:
            for (attributes, name, _), value in zip(held, before, strict=True):
                if value is _ABSENT:
                    del attributes[name]
                else:
                    attributes[name] = value


def _constant(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value
