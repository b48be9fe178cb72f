"""Values that stand in for what a module would compute or draw, in one thread and for the time of a `with` block."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList


class _Held(threading.local):
    values: dict[int, Tensor] | None = None


_HELD = _Held()


class holding:
    """Hold a value for each of some modules; what a block outside it holds for others stays.

    Nothing is written to the modules, so that other threads do not see it.
    """

    def __init__(self, pairs: Iterable[tuple[nn.Module, Tensor]]) -> None:
        # by the module's dict, which a view of it shares (`gradients.view`)
        self.values = {id(module.__dict__): value for module, value in pairs}

    def __enter__(self) -> None:
        self._before = _HELD.values
        _HELD.values = {**self._before, **self.values} if self._before else self.values

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _HELD.values = self._before


def held(module: nn.Module) -> Tensor | None:
    """What is held for a module in this thread; None where nothing is."""
    values = _HELD.values
    return values.get(id(module.__dict__)) if values else None


class HeldParametrization(ParametrizationList):
    """A parametrization that gives the value that is held for it, where one is."""

    def forward(self) -> Tensor:
        """The tensor."""
        value = held(self)
        return super().forward() if value is None else value


def parametrizations(cell: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """(layer, name, parametrization) of every parametrized tensor of a cell; from now on their values can be held."""
    found = []
    for layer in cell.modules():
        made = dict(layer._modules.items()).get("parametrizations")  # TorchScript has tables of its own kind
        if isinstance(made, nn.ModuleDict):
            found += [(layer, name, item) for name, item in made.items() if isinstance(item, ParametrizationList)]
    for _, _, item in found:
        if type(item) is ParametrizationList:
            item.__class__ = HeldParametrization
    return found
