"""Any feedforward network as a DEQ whose state is the stack of all its activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metabroyden.convert import layers as rules
from metabroyden.convert.layers import MIXING, Layers, class_of
from metabroyden.convert.readout import Readout
from metabroyden.gradients import Implicit
from metabroyden.solution import State
from metabroyden.solvers.picard import Picard
from metabroyden.solvers.substitution import Substitution


class StackCell(nn.Module):
    """f(z, x) = (stage₁(x), stage₂(z₁), …, stage_L(z_{L−1})) for the state z = (z₁, …, z_L) of all activations.

    The weight-tied, input-injected form z⁺ = σ(W_z z + W_x x + b) of a network, W_z strictly block lower triangular
    (Bai, Kolter & Koltun, Deep Equilibrium Models, NeurIPS 2019, universality of weight-tied networks). The Jacobian in z
    is nilpotent: L iterations from any start give the network's activations exactly.

    Args:
        network: nn.Sequential; its layers are shared, not copied. A stage begins at each linear or convolutional layer
            and takes along what follows; what comes before the first of them belongs to stage 1.

    Attributes:
        stages: nn.ModuleList of the L stages, each an nn.Sequential of the network's own layers.

    Raises:
        TypeError: a network that cannot be converted, naming the layer and the reason; see `to_deq`.
        ValueError: a layer's options are not supported.
    """

    def __init__(self, network: nn.Sequential) -> None:
        super().__init__()
        layers = rules.flatten(network)
        if not layers:
            raise ValueError("network must have at least one layer, got an empty Sequential")
        for name, layer in layers:
            rules.check_layer(name, layer)
        self._groups = _stages(layers)
        self._modal = [(name, layer) for name, layer in layers if rules.has_modes(layer)]
        self._shapes: dict[tuple[int, ...], list[torch.Size]] = {}
        self.stages = nn.ModuleList(nn.Sequential(*(layer for _, layer in group)) for group in self._groups)

    def initial_state(self, x: Tensor) -> tuple[Tensor, ...]:
        """Zeros for each activation, (B, ...), in the dtype and on the device of the parameters (of x without any).

        Shapes come from the meta device, once for each shape of x: no layer is called. TypeError where x is no tensor,
        ValueError where a layer cannot take its input, reaches across samples, or can no longer be converted.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"a converted network takes one tensor, batch first, got {type(x).__name__}")
        for group in self._groups:
            for name, layer in group:
                rules.check_layer(name, layer)
        like = next((p for p in self.parameters() if p.is_floating_point()), x)
        key = tuple(x.shape[1:])
        if key not in self._shapes:
            dtype = like.dtype if x.is_floating_point() else x.dtype
            self._shapes[key] = self._trace(torch.empty(x.shape, dtype=dtype, device="meta"))
        return tuple(torch.zeros(len(x), *shape, dtype=like.dtype, device=like.device) for shape in self._shapes[key])

    def forward(self, z: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        """f(z, x), shaped like z. ValueError where a layer's mode has become one that cannot be converted."""
        for name, layer in self._modal:
            rules.check_mode(name, layer)
        for _, layer in self._groups[0]:
            if class_of(layer) in MIXING:
                break
            if getattr(layer, "inplace", False):  # it gets x itself, or a view of it
                x = x.clone()
                break
        return tuple(stage(source) for stage, source in zip(self.stages, (x, *z[:-1]), strict=True))

    def output(self, z: State) -> Tensor:
        """The network's output in a state: the last activation."""
        return z[-1]

    @torch.no_grad()
    def _trace(self, x: Tensor) -> list[torch.Size]:
        """Per-sample shapes of all activations, for x on the meta device."""
        shapes = []
        for group in self._groups:
            for name, layer in group:
                x = rules.output_shape(name, layer, x)
            if not x.shape[1:].numel():
                raise ValueError(f"the activation after layer {name} ({class_of(layer).__name__}) has no coordinate")
            shapes.append(x.shape[1:])
        return shapes


class ConvertedNetwork(Readout):
    """A feedforward network computed, and differentiated, as a DEQ; made by `to_deq`.

    `deq(x)` gives all its activations, `cell` is a `StackCell`.
    """


def to_deq(network: nn.Sequential, **deq_options: Any) -> ConvertedNetwork:
    """A feedforward network as a deep equilibrium model with the same parameters, output and gradients (`StackCell`).

    A chain of linear and convolutional layers (transposed ones too), activations, pooling, padding, reshaping and norms
    that treat samples apart; batch norm and dropout in eval mode; nested Sequentials are opened. The parameters are the
    network's own. The layers are those the network has now: replace one and convert again. Hooks on layers run at each
    evaluation, hooks on a Sequential never.

    Args:
        network: the network, batch first, in float32 or float64.
        deq_options: of `DEQ`. Defaults: `Substitution()`, backward `Picard()`, until no coordinate changes (rtol 0), in
            L + 1 evaluations and a few more where rounding delays it; max_nfe 2L + 10. With another solver rtol is 1e-12
            for a float64 network, else 1e-6. That is one tolerance for all activations together: the solve may stop before
            small ones among them are right.

    Returns:
        A module; its `deq` is the `DEQ`.

    Raises:
        TypeError: no Sequential, or a layer that cannot be known to treat samples apart and have one input.
        ValueError: a layer whose settings, dtype or mode forbid it (batch norm and dropout in training mode, at each call
            as well); max_nfe of L or less. Every message names the layer.

    Examples:
        >>> import torch, metabroyden as mb
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> deq, x = mb.to_deq(net), torch.randn(5, 3)
        >>> bool(torch.allclose(deq(x), net(x), atol=1e-5)), [len(part[0]) for part in deq.cell.initial_state(x)]
        (True, [8, 2])
    """
    cell = StackCell(network)
    depth = len(cell.stages)
    budget = deq_options.get("max_nfe")
    if isinstance(budget, int) and budget <= depth:
        raise ValueError(
            f"max_nfe must be more than the {depth} stages of the network, got {budget}: {depth} evaluations reach its "
            "output and one more verifies it"
        )
    most = 2 * depth + 10
    double = any(p.dtype == torch.float64 for p in network.parameters())
    defaults = {
        "solver": Substitution(),
        "backward": Implicit(solver=Picard(), rtol=0.0, max_nfe=most),
        "rtol": (1e-12 if double else 1e-6) if "solver" in deq_options else 0.0,
        "max_nfe": most,
    }
    return ConvertedNetwork(cell, **defaults | deq_options)


def _stages(layers: Layers) -> list[Layers]:
    groups: list[Layers] = [[]]
    for name, layer in layers:
        if class_of(layer) in MIXING and any(class_of(before) in MIXING for _, before in groups[-1]):
            groups.append([])
        groups[-1].append((name, layer))
    return groups
