"""Values used in place of what a module would compute or draw, in one thread, during a `with` block."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList


class _Held(threading.local):
    values: dict[int, Tensor] | None = None


_HELD = _Held()


class holding:
    """Hold a value for each of some modules; an outer block's values for other modules stay.

    Nothing is written to the modules, so that other threads do not see the values.
    """

    def __init__(self, pairs: Iterable[tuple[nn.Module, Tensor]]) -> None:
        # by the module's dict, which a view of it shares (`gradients.view`)
        self.values = {id(module.__dict__): value for module, value in pairs}

    def __enter__(self) -> None:
        self._before = _HELD.values
        _HELD.values = {**self._before, **self.values} if self._before else self.values

    def __exit__(self, *_: object) -> None:
        _HELD.values = self._before


def held(module: nn.Module) -> Tensor | None:
    """The value held for a module in this thread; None where there is none."""
    values = _HELD.values
    return values.get(id(module.__dict__)) if values else None


class HeldParametrization(ParametrizationList):
    """A parametrization that returns the value held for it, where there is one."""

    def forward(self) -> Tensor:
        """The tensor."""
        value = held(self)
        return super().forward() if value is None else value


def parametrizations(cell: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """(layer, name, parametrization) of every parametrized tensor of a cell, whose values can be held from now on."""
    found = []
    for layer in cell.modules():
        made = dict(layer._modules.items()).get("parametrizations")  # TorchScript has tables of its own kind
        if isinstance(made, nn.ModuleDict):
            found += [(layer, name, item) for name, item in made.items() if isinstance(item, ParametrizationList)]
    for _, _, item in found:
        if type(item) is ParametrizationList:
            item.__class__ = HeldParametrization
    return found
