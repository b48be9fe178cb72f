"""One call of a DEQ, one map f: computed weights and dropout masks pinned to the values they have at its beginning."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from metabroyden.ledger import Surroundings
from metabroyden.solution import State
from metabroyden.state import Companion, check_state
from metabroyden.training.dropout import VariationalDropout, dropouts

_ABSENT = object()
_LOCK = threading.RLock()


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
    pinned = Pinned(cell, [made for made, _ in weights], [weight for _, weight in weights], layers, masks)
    return pinned, Companion(context, masks) if masks and context is not None else context


def _weights(cell: nn.Module) -> list[tuple[nn.Module, Tensor]]:
    """Every parametrization of a cell with the value it has now."""
    return [
        (made, getattr(layer, name))
        for layer in cell.modules()
        if parametrize.is_parametrized(layer)
        for name, made in layer.parametrizations.items()  # type: ignore[union-attr, operator]
    ]


class Pinned(Surroundings):
    """The cell, its computed weights and masks in place for the time of each call.

    Attributes:
        cell: the module. weights: the values of its parametrized weights.
    """

    def __init__(
        self,
        cell: nn.Module,
        made: list[nn.Module],
        weights: list[Tensor],
        layers: list[VariationalDropout],
        masks: tuple[Tensor, ...],
    ) -> None:
        self.cell, self.weights = cell, weights
        self.inner = cell
        self._made, self._layers, self._masks = made, layers, masks

    def __call__(self, z: State, context: Any = None) -> State:
        """f(z) or f(z, context), for the rows whose masks are in the context."""
        return self.call(self.cell, self.weights, z, context)

    def call(self, cell: Callable[..., State], weights: Sequence[Tensor], z: State, context: Any) -> State:
        """f with these weights, and with `cell` doing what the module does."""
        x, masks = context if isinstance(context, Companion) else (context, self._masks)
        # Not parametrize.cached(): that is global, and gives deep copies of a layer one another's weights.
        held = [
            *((vars(made), "forward", _constant(weight)) for made, weight in zip(self._made, weights, strict=True)),
            *((vars(layer), "mask", mask) for layer, mask in zip(self._layers, masks, strict=True)),
        ]
        with _LOCK:  # another thread may be solving with the same modules
            before = [attributes.get(name, _ABSENT) for attributes, name, _ in held]
            for attributes, name, value in held:
                attributes[name] = value
            try:
                return cell(z) if x is None else cell(z, x)
            finally:
                for (attributes, name, _), value in zip(held, before, strict=True):
                    if value is _ABSENT:
                        del attributes[name]
                    else:
                        attributes[name] = value

    def alike(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function of z, or of z and the context, with the cell's weights and masks in place."""

        def run(z: Any, context: Any = None) -> Any:
            return self.call(function, self.weights, z, context)

        return run

    def detached(self) -> Pinned:
        """The same map without gradients towards its weights."""
        return Pinned(self.cell, self._made, [weight.detach() for weight in self.weights], self._layers, self._masks)


def _constant(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value
