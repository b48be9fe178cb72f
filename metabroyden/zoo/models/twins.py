"""What a deep equilibrium model is compared with: the same model round another map from a context to a state.

The weight-tied network of finite depth (`Unrolled`), the explicit network with weights for each layer (`Stack`) and the
Neural ODE (`Flow`) take the place of a model's `deq`; injection, cell and head stay what they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metabroyden.deq import initial_state
from metabroyden.gradients.base import evaluate, parts_of
from metabroyden.nn.pin import pin
from metabroyden.solution import State
from metabroyden.solvers.base import check_number
from metabroyden.state import like
from metabroyden.zoo.models.base import EquilibriumModel

_WIDEST = 2**13  # width at which the search for as many parameters ends


class Twin(nn.Module):
    """A map from a context to a state in the place of a model's DEQ.

    Attributes:
        kind: its name in a checkpoint.
        settings: names of the attributes that a checkpoint needs to build it again, beside the model's config.
        cell: the cell f(z, x), the first of several.
    """

    kind: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ("depth",)
    cell: nn.Module

    def describe(self) -> dict[str, Any]:
        """The kind and the settings."""
        return {"kind": self.kind, **{name: getattr(self, name) for name in self.settings}}


class Unrolled(Twin):
    """The weight-tied network: z ← f(z, x), `depth` times from the cell's initial state, with plain backpropagation.

    Bai, Kolter & Koltun, Deep Equilibrium Models, NeurIPS 2019, section 3: the network whose limit of depth a DEQ is.
    """

    kind = "unrolled"

    def __init__(self, cell: nn.Module, depth: int) -> None:
        super().__init__()
        check_number("Unrolled", "depth", depth, 0, 10**6, whole=True)
        self.cell, self.depth = cell, depth

    def forward(self, x: Any) -> State:
        """The state for a context."""
        z = initial_state(self.cell, x)
        f, context = pin(self.cell, x, z)
        for _ in range(self.depth):
            z = f(z, context)
        return z


class Stack(Twin):
    """The explicit network: z ← f_l(z, x) for each cell in turn, weights of its own in each, one injection for all."""

    kind = "explicit"

    def __init__(self, cells: list[nn.Module]) -> None:
        super().__init__()
        if not cells:
            raise ValueError("Stack needs at least one cell, got none")
        self.cells, self.depth = nn.ModuleList(cells), len(cells)

    @property
    def cell(self) -> nn.Module:  # type: ignore[override]
        """The first cell."""
        return self.cells[0]

    def forward(self, x: Any) -> State:
        """The state for a context."""
        z = initial_state(self.cell, x)
        for cell in self.cells:
            f, context = pin(cell, x, z)
            z = f(z, context)
        return z


class Flow(Twin):
    """The Neural ODE: z(T) with dz/dt = f(z, x) − z from the initial state (Chen et al., Neural Ordinary Differential
    Equations, NeurIPS 2018), by Runge–Kutta steps of order 4 (torchdiffeq) that are differentiated as they are.

    T → ∞ leads to the DEQ's equilibrium where that attracts. Memory grows with the steps, of four evaluations each. The
    adjoint method would not need it, but integrates the state back in time, which multiplies errors by some e^T where f
    contracts; with it a trained flow came to need steps of size zero (so too Gholami, Keutzer & Biros, ANODE, IJCAI 2019).
    ImportError where torchdiffeq is not installed.
    """

    kind, settings = "flow", ("time", "steps")

    def __init__(self, cell: nn.Module, time: float = 1.0, steps: int = 4) -> None:
        super().__init__()
        _odeint()
        check_number("Flow", "time", time, 0, 10**6)
        check_number("Flow", "steps", steps, 0, 10**6, whole=True)
        self.cell, self.time, self.steps = cell, time, steps

    def forward(self, x: Any) -> State:
        """The state at time T for a context."""
        z0 = initial_state(self.cell, x)
        f, context = pin(self.cell, x, z0)

        def velocity(t: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(fz - z for fz, z in zip(evaluate(f, parts, type(z0), context), parts, strict=True))

        parts = parts_of(z0)
        times = torch.linspace(0, self.time, self.steps + 1, dtype=parts[0].dtype, device=parts[0].device)
        path = _odeint()(velocity, parts, times, method="rk4")
        return like((part[-1] for part in path), type(z0))


def unrolled_twin(model: Any, depth: int) -> Any:
    """A copy of a model, with its weights, that applies the cell `depth` times where the model solves (`Unrolled`)."""
    return _copied(model, lambda cell: Unrolled(cell, depth))


def flow_twin(model: Any, time: float = 1.0, steps: int = 4) -> Any:
    """A copy of a model, with its weights, that integrates the cell's flow where the model solves (`Flow`)."""
    return _copied(model, lambda cell: Flow(cell, time, steps))


def _copied(model: Any, make: Callable[[nn.Module], Twin]) -> Any:
    twin = copy.deepcopy(model)
    twin.deq = make(twin.cell)
    return twin


def explicit_twin(
    model_class: Callable[[Any], EquilibriumModel], config: Any, depth: int, *, tolerance: float = 0.1
) -> Any:
    """A new model of `depth` cells with weights of their own (`Stack`), and as many parameters as the DEQ of this config.

    Its state is narrower: of the widths `config.narrowed(width)` the one with the nearest number of parameters. ValueError
    where that differs by a larger share than the tolerance.
    """
    check_number("explicit_twin", "depth", depth, 0, 10**6, whole=True)
    with torch.device("meta"):  # to count parameters takes none
        wanted = _parameters(model_class(config))
        narrowed = _nearest(model_class, config, depth, wanted, tolerance)
    return _stacked(model_class, narrowed, depth)


def build_twin(model_class: Callable[[Any], EquilibriumModel], config: Any, description: dict[str, Any]) -> Any:
    """The twin that `description` (of `Twin.describe`) and its own config tell, with new weights.

    KeyError, TypeError or ValueError for a description of no twin.
    """
    settings = dict(description)
    kind = settings.pop("kind")
    if kind == Stack.kind:
        return _stacked(model_class, config, **settings)
    makers: dict[str, Any] = {Unrolled.kind: unrolled_twin, Flow.kind: flow_twin}
    if kind not in makers:
        raise ValueError(f"unknown twin {kind!r}: known are {', '.join([*makers, Stack.kind])}")
    return makers[kind](model_class(config), **settings)


def _stacked(model_class: Callable[[Any], EquilibriumModel], config: Any, depth: int) -> Any:
    model = model_class(config)
    model.deq = Stack([model.cell, *(model_class(config).cell for _ in range(depth - 1))])
    return model


def _nearest(
    model_class: Callable[[Any], EquilibriumModel], config: Any, depth: int, wanted: int, tolerance: float
) -> Any:
    """The narrowed config whose explicit network has the number of parameters nearest to the wanted one."""
    best, nearest, tried = config, 0, None
    for width in range(1, _WIDEST):
        candidate = config.narrowed(width)
        if candidate == tried:  # several widths may round to one config
            continue
        tried, model = candidate, model_class(candidate)
        count = _parameters(model) + (depth - 1) * _parameters(model.cell)
        if nearest == 0 or abs(count - wanted) < abs(nearest - wanted):
            best, nearest = candidate, count
        if count > wanted:  # parameters grow with the width
            break
    if abs(nearest - wanted) > tolerance * wanted:
        raise ValueError(
            f"no width gives {depth} layers the {wanted} parameters of the DEQ within {tolerance:.0%}: "
            f"the nearest has {nearest}"
        )
    return best


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _odeint() -> Any:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError("Flow integrates with torchdiffeq: pip install torchdiffeq") from error
    return odeint
