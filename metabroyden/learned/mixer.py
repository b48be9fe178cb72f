"""A linear map over canonical states, by layout."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from metabroyden.learned.layout import Layout
from metabroyden.learned.wiring import Wiring


class Mixer(nn.Module):
    """A linear map over canonical states that mixes channels and, by layout, near neighbours.

    Where places are padding, its value is zero.

    Args:
        layout: of the states: images and tokens have a convolution, sequences a causal one, vectors a dense map. Sets have a
            map of each element and, for a kernel wider than 1, of the mean of all (Zaheer et al., Deep Sets, NIPS 2017).
            Graphs have, beside these two, maps of what comes along the edges: polynomials in a matrix of edges, as in
            Defferrard et al., NIPS 2016.
        inputs: channels; so are outputs.
        kernel: odd width of the convolution.
        bias: whether it adds a learned constant.
        zero: whether its weights begin at zero.
        dilation: distance of the convolution's taps, of graphs in edges; 1 for vectors, sets and pyramids.
    """

    def __init__(
        self,
        layout: Layout,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 3,
        bias: bool = True,
        zero: bool = False,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        if dilation < 1 or (dilation > 1 and layout.kind in ("vector", "set", "pyramid")):
            raise ValueError(
                f"dilations must be at least 1, and are 1 for layouts 'vector', 'set' and 'pyramid'; got {dilation}"
            )
        self.past = (kernel - 1) * dilation if layout.causal else 0
        self.dilation, self.padding = dilation, kernel // 2 * dilation
        self.map: Any
        if layout.spatial:
            self.map = nn.Conv2d(inputs, outputs, kernel, padding=self.padding, dilation=dilation, bias=bias)
        elif layout.kind in ("set", "graph"):
            # taps: the element, the mean and, of graphs, what comes over `dilation` edges, twice as many, …
            taps = kernel + 1 if layout.kind == "graph" else 2
            self.map = nn.Conv1d(inputs, outputs, 1 if kernel == 1 else taps, bias=bias)
        elif layout.by_token:
            self.map = nn.Conv1d(inputs, outputs, kernel, dilation=dilation, bias=bias)
        else:
            self.map = nn.Linear(inputs, outputs, bias=bias)
        self.layout = layout
        if zero:
            for parameter in self.map.parameters():
                nn.init.zeros_(parameter)

    def forward(self, *parts: Tensor, wiring: Wiring | None = None) -> Tensor:
        """(R, inputs, *S) → (R, outputs, *S), for a value or what its channels are made of, in order, without joining it."""
        parts = tuple(part for part in parts if part.shape[1])
        if len(parts) == 1:
            return self._mapped(parts[0], self.map.weight, self.map.bias, wiring)
        weights = self.map.weight.split([part.shape[1] for part in parts], dim=1)
        biases = [self.map.bias, *[None] * (len(parts) - 1)]
        mapped = functools.partial(self._mapped, wiring=wiring)
        return functools.reduce(torch.add, map(mapped, parts, weights, biases))

    def _mapped(self, part: Tensor, weight: Tensor, bias: Any, wiring: Wiring | None) -> Tensor:
        found = self._unmasked(part, weight, bias, wiring)
        return found if wiring is None else wiring.blanked(found)

    def _unmasked(self, part: Tensor, weight: Tensor, bias: Any, wiring: Wiring | None) -> Tensor:
        if self.layout.spatial:
            return functional.conv2d(part, weight, bias, padding=self.padding, dilation=self.dilation)
        if self.layout.kind in ("set", "graph"):
            return self._equivariant(part, weight, bias, wiring)
        if not self.layout.by_token:
            return functional.linear(part, weight, bias)
        return self._along(part, weight, bias)

    def _along(self, value: Tensor, weight: Tensor, bias: Any) -> Tensor:
        """The convolution along tokens (R, C, T) by one product of matrices, a fraction of torch's time on a CPU.

        What is shifted is on the side of fewer channels: the taps' inputs, else what the taps give.
        """
        outputs, inputs, taps = weight.shape
        length = value.shape[2]
        ends = (self.past, 0) if self.layout.causal else (self.padding, self.padding)
        if inputs < outputs:
            wide = functional.pad(value, ends)
            seen = [wide.narrow(2, tap * self.dilation, length) for tap in range(taps)]
            found = weight.transpose(1, 2).reshape(outputs, -1) @ torch.cat(seen, dim=1)
        else:
            mapped = weight.permute(2, 0, 1).reshape(-1, inputs) @ value
            parts = functional.pad(mapped, ends).unflatten(1, (taps, outputs)).unbind(1)
            seen = [part.narrow(2, tap * self.dilation, length) for tap, part in enumerate(parts)]
            found = functools.reduce(torch.add, seen)
        return found if bias is None else found + bias.unsqueeze(1)

    def _equivariant(
        self, value: Tensor, weight: Tensor, bias: Any, wiring: Wiring | None, *, back: bool = False
    ) -> Tensor:
        """A map of each element (R, C, T), of the mean, and of what comes along edges: all commute with permutations."""
        own, *others = weight.unbind(2)
        hops = others[1:]
        elements = value.transpose(1, 2)
        if hops and len(weight) > weight.shape[1]:  # what goes along edges has few channels
            come = [elements]
            for _ in hops:
                come.append(_wired(wiring).carried(come[-1], self.dilation, back=back))
            found = functional.linear(torch.cat(come, dim=2), torch.cat([own, *hops], dim=1), bias)
        elif hops:
            here, *parts = functional.linear(elements, torch.cat([own, *hops])).split(len(weight), dim=2)
            found = here + self._summed(parts, wiring, back)
            found = found if bias is None else found + bias
        else:
            found = functional.linear(elements, own, bias)
        if others:
            found = found + functional.linear(_mean(value, wiring), others[0]).unsqueeze(1)
        return found.transpose(1, 2)

    def _summed(self, mapped: Sequence[Tensor], wiring: Wiring | None, back: bool) -> Tensor:
        """Σᵢ Âⁱᵈyᵢ, i = 1, 2, …, for yᵢ (R, T, k), by Horner's rule."""
        total = None
        for part in reversed(mapped):
            total = _wired(wiring).carried(part if total is None else part + total, self.dilation, back=back)
        assert total is not None
        return total

    def of_parts(self, parts: Sequence[Tensor], wiring: Wiring | None = None) -> Tensor:
        """The map (without bias) of a canonical value that comes in `Layout.parts`, which need not be brought together."""
        if len(parts) == 1:
            return self._mapped(parts[0], self.map.weight, None, wiring)
        weights = self.map.weight.split(self.layout.coarse_channels, dim=1)
        return functools.reduce(torch.add, map(_strided, parts, weights, self.layout.factors))

    def to_parts(self, value: Tensor, wiring: Wiring | None = None) -> list[Tensor]:
        """The map (without bias) of a value, as `Layout.parts` of the canonical one."""
        if self.layout.kind != "pyramid":
            return [self._mapped(value, self.map.weight, None, wiring)]
        maps = zip(self.map.weight.split(self.layout.coarse_channels, dim=0), self.layout.factors, strict=True)
        found = [(functional.conv2d(value, weight, padding=weight.shape[-1] // 2), n) for weight, n in maps]
        return [functional.pixel_shuffle(mapped, n) if n > 1 else mapped for mapped, n in found]

    def transpose(self, value: Tensor, wiring: Wiring | None = None) -> Tensor:
        """The transposed linear map (its bias left out), (R, outputs, *S) → (R, inputs, *S)."""
        found = self._transposed(value if wiring is None else wiring.blanked(value), wiring)
        return found if wiring is None else wiring.blanked(found)

    def _transposed(self, value: Tensor, wiring: Wiring | None) -> Tensor:
        weight = self.map.weight
        if self.layout.spatial:
            return functional.conv_transpose2d(value, weight, padding=self.padding, dilation=self.dilation)
        if self.layout.kind in ("set", "graph"):
            return self._equivariant(value, weight.transpose(0, 1), None, wiring, back=True)
        if self.layout.causal:
            return functional.conv_transpose1d(value, weight, dilation=self.dilation)[..., self.past :]
        if self.layout.by_token:
            return functional.conv_transpose1d(value, weight, padding=self.padding, dilation=self.dilation)
        return functional.linear(value, weight.T)


def _mean(value: Tensor, wiring: Wiring | None) -> Tensor:
    """(R, C) of the places of a value (R, C, T)."""
    return value.mean(dim=2) if wiring is None else wiring.mean(value)


def _wired(wiring: Wiring | None) -> Wiring:
    """The wiring that a graph has; ValueError without."""
    if wiring is None:
        raise ValueError("layout 'graph' needs the edges of these problems, mb.Graphs for their context")
    return wiring


def _strided(part: Tensor, weight: Tensor, n: int) -> Tensor:
    """What canonical channels that hold n × n finer pixels of an image add to a map, from the image as it is."""
    size = weight.shape[-1]
    finer = weight.unflatten(1, (-1, n, n)).permute(0, 1, 4, 2, 5, 3).reshape(len(weight), -1, size * n, size * n)
    return functional.conv2d(part, finer, stride=n, padding=size // 2 * n)
