"""State layouts: which axes of a state are channels, space or time, and what a learned solver pools over.

A state (R, …) is brought to canonical form (R, C, *S), channels second. Groups, each with one LSTM cell, are the channels
of an image state (pooling over space), the tokens of a sequence state (pooling over channels, so that nothing crosses
time), and the whole sample of a plain vector. A state of several resolutions is brought to the coarsest: each finer pixel
becomes channels of the coarse one that it lies in, so that nothing is lost and scales are mixed where they overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from metabroyden.deprecated import current

KINDS = {"vector": 1, "nct": 2, "ntc": 2, "image": 3, "pyramid": 3}
"""Per-sample axes of each layout: vector; nct/ntc: sequence with channels first/last; image; pyramid: a tuple of
images, finest first, each side a multiple of the last one's."""
LARGEST_PACKED = 8192
"""Coordinates above which a state of several tensors is not taken for one vector unasked: maps of it are dense."""


@dataclass(frozen=True)
class Layout:
    """A layout with the per-sample shape it was fitted to.

    Attributes:
        kind: "vector", "nct", "ntc", "image" or "pyramid".
        shape: per-sample shape (for scales a tuple of them); a solver runs on other spatial or time extents too, not on
            other channel counts.
    """

    kind: str
    shape: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", current(self.kind))
        if self.kind not in KINDS:
            raise ValueError(f"layout must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "pyramid":
            _check_scales(self.shape)
        elif len(self.shape) != KINDS[self.kind]:
            raise ValueError(
                f"layout {self.kind!r} wants {KINDS[self.kind]} axes a sample, got shape {tuple(self.shape)}"
            )

    @property
    def channels(self) -> int:
        """Channels C."""
        if self.kind == "pyramid":
            return sum(part[0] * n**2 for part, n in zip(self.shape, self.factors, strict=True))
        return self.shape[-1] if self.kind == "ntc" else self.shape[0]

    @property
    def factors(self) -> list[int]:
        """How many times finer than the coarsest each scale is."""
        return [part[1] // self.shape[-1][1] for part in self.shape]

    @property
    def causal(self) -> bool:
        """Whether one axis is time."""
        return self.kind in ("nct", "ntc")

    def resolve(self, shape: Any) -> tuple[Any, ...]:
        """The per-sample shape to use for a state of this shape: its own, or the fitted one when it comes flattened.

        ValueError when the channels differ from the fitted ones.
        """
        several = bool(shape) and not isinstance(shape[0], int)
        if self.kind == "pyramid":
            scales = tuple(tuple(int(size) for size in part) for part in shape) if several else ()
            if not several and tuple(shape) == (sum(map(math.prod, self.shape)),):
                return self.shape
            if several and len(scales[-1]) == 3 and self.shape_like(scales[-1][1:]) == scales:
                return scales
            raise ValueError(f"this solver was fitted to a state of several scales {self.shape}, got {tuple(shape)}")
        if several and self.kind == "vector" and packed_layout(shape).shape == tuple(self.shape):
            return self.shape
        if several:
            raise ValueError(
                f"this solver was fitted to one tensor of shape {self.shape}, got a state of {len(shape)}: "
                f"{[tuple(part) for part in shape]}"
            )
        found = tuple(int(size) for size in shape)
        if len(found) == 1 and self.kind != "vector" and found[0] == math.prod(self.shape):
            return self.shape
        if len(found) == len(self.shape) and Layout(self.kind, found).channels == self.channels:
            return found
        raise ValueError(
            f"this solver was fitted to states of layout {self.kind!r} and per-sample shape {self.shape} "
            f"({self.channels} channels); got per-sample shape {found}"
        )

    def anywhere(self, shape: Any) -> tuple[Layout, Any]:
        """(layout, per-sample shape) of a state of any shape, for a solver without a weight of a channel.

        Its own layout where that fits, the same kind where the axes are as many, else a vector; several tensors as one.
        """
        try:
            return self, self.resolve(shape)
        except ValueError:
            pass
        if shape and not isinstance(shape[0], int):
            flat = (sum(math.prod(part) for part in shape),)
            return Layout("vector", flat), flat
        found = tuple(int(size) for size in shape)
        if self.kind != "pyramid" and len(found) == KINDS[self.kind]:
            return Layout(self.kind, found), found
        return Layout("vector", (math.prod(found),)), (math.prod(found),)

    def shape_like(self, extents: torch.Size | tuple[int, ...]) -> tuple[Any, ...]:
        """The per-sample shape of a state with these spatial or time extents."""
        if self.kind == "pyramid":
            return tuple(
                (part[0], *(extent * n for extent in extents)) for part, n in zip(self.shape, self.factors, strict=True)
            )
        return (*extents, self.channels) if self.kind == "ntc" else (self.channels, *extents)

    def canonical(self, flat: Tensor, shape: tuple[Any, ...]) -> Tensor:
        """(R, n) → (R, C, *S)."""
        if self.kind == "pyramid":
            parts = flat.split([math.prod(part) for part in shape], dim=1)
            images = [part.reshape(len(flat), *size) for part, size in zip(parts, shape, strict=True)]
            coarse = [functional.pixel_unshuffle(image, n) for image, n in zip(images, self.factors, strict=True)]
            return torch.cat(coarse, dim=1)
        full = flat.reshape(len(flat), *shape)
        return full.transpose(1, 2) if self.kind == "ntc" else full

    def flat(self, canonical: Tensor) -> Tensor:
        """(R, C, *S) → (R, n)."""
        if self.kind == "pyramid":
            counts = [part[0] * n**2 for part, n in zip(self.shape, self.factors, strict=True)]
            coarse = canonical.split(counts, dim=1)
            images = [functional.pixel_shuffle(part, n) for part, n in zip(coarse, self.factors, strict=True)]
            return torch.cat([image.flatten(1) for image in images], dim=1)
        ordered = canonical.transpose(1, 2) if self.kind == "ntc" else canonical
        return ordered.reshape(len(ordered), -1)

    def parts(self, flat: Tensor, shape: tuple[Any, ...]) -> list[Tensor]:
        """(R, n) → the images (R, C, H, W) of several resolutions, as views; of other layouts the canonical form alone."""
        if self.kind != "pyramid":
            return [self.canonical(flat, shape)]
        values = flat.split([math.prod(part) for part in shape], dim=1)
        return [value.unflatten(1, size) for value, size in zip(values, shape, strict=True)]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `parts`."""
        return torch.cat([part.flatten(1) for part in parts], dim=1) if self.kind == "pyramid" else self.flat(parts[0])

    def spread(self, weight: Tensor) -> list[Tensor]:
        """Weights of places (R, 1, *S) as weights of the pixels in each of the `parts`."""
        if self.kind != "pyramid":
            return [weight]
        return [weight.repeat_interleave(n, 2).repeat_interleave(n, 3) if n > 1 else weight for n in self.factors]

    @property
    def part_channels(self) -> list[int]:
        """Channels of each of the `parts`."""
        return [part[0] for part in self.shape] if self.kind == "pyramid" else [self.channels]

    def context(self, feature: Tensor, extents: tuple[int, ...]) -> Tensor:
        """A context tensor (R, …) in canonical form: an image finer than these extents becomes channels of the coarse."""
        if self.kind == "ntc" and feature.dim() == 3:
            return feature.transpose(1, 2)
        finer = feature.dim() == 4 and feature.shape[2] % extents[0] == 0
        if self.kind == "pyramid" and finer and feature.shape[3] * extents[0] == feature.shape[2] * extents[1]:
            return functional.pixel_unshuffle(feature, feature.shape[2] // extents[0])
        return feature

    def context_channels(self, context: Any, shape: Any) -> int:
        """Channels of a context (of a tuple its first tensor) in canonical form; 0 where it has not the state's extents."""
        first = context[0] if isinstance(context, tuple) and context else context
        if not isinstance(first, Tensor) or first.dim() < 2:
            return 0
        feature = self.context(first, self.extents(shape))
        return feature.shape[1] if feature.shape[2:] == self.extents(shape) else 0

    def extents(self, shape: tuple[Any, ...]) -> tuple[int, ...]:
        """The spatial or time extents S of a per-sample shape."""
        if self.kind == "pyramid":
            return shape[-1][1:]
        return shape[:1] if self.kind == "ntc" else shape[1:]

    def grouped(self, stack: Tensor) -> Tensor:
        """(R, C, K, *S) → (R, G, K, P): K values a coordinate, sorted into groups of P coordinates."""
        if self.spatial:
            return stack.flatten(3)
        return stack.permute(0, 3, 2, 1) if self.causal else stack.permute(0, 2, 1).unsqueeze(1)

    def ungrouped(self, value: Tensor, extents: tuple[int, ...]) -> Tensor:
        """(R, G, P) → (R, C, *S), S being the extents."""
        if self.spatial:
            return value.unflatten(2, extents)
        return value.transpose(1, 2) if self.causal else value.squeeze(1)

    def groups(self, extents: tuple[int, ...]) -> int:
        """Groups G of a state with these extents: channels, tokens, or one."""
        return self.channels if self.spatial else extents[0] if self.causal else 1

    @property
    def spatial(self) -> bool:
        """Whether the state is made of images."""
        return self.kind in ("image", "pyramid")

    @property
    def identities(self) -> int:
        """How many groups have an identity of their own (the channels of an image; tokens are alike)."""
        return self.channels if self.spatial else 1

    def scale(self, g: Tensor) -> Tensor:
        """Root mean square of a canonical residual, broadcastable over it.

        Per sample; for sequences the running one over past tokens, (R, 1, T), so that the future does not leak.
        """
        tiny = torch.finfo(g.dtype).tiny ** 0.5
        if self.causal:
            steps = torch.arange(1, g.shape[2] + 1, device=g.device, dtype=g.dtype)
            square = (g.square().mean(dim=1, keepdim=True).cumsum(dim=2) / steps).clamp_min(tiny)
        else:
            size = g[0].numel() ** 0.5
            return (
                (torch.linalg.vector_norm(g.flatten(1), dim=1) / size)
                .clamp_min(tiny**0.5)
                .view(-1, *[1] * (g.dim() - 1))
            )
        return square.sqrt()

    def scale_of(self, flat: Tensor, shape: tuple[Any, ...]) -> Tensor:
        """The `scale` of a residual (R, n)."""
        return self.scale(flat[:, :, None, None] if self.kind == "pyramid" else self.canonical(flat, shape))


class BackwardLayout(Layout):
    """The layout of an adjoint state: as its own, but time runs backwards, as it does for the cotangents of a sequence."""

    def canonical(self, flat: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(R, n) → (R, C, *S), the last token first."""
        found = super().canonical(flat, shape)
        return found.flip(2) if self.causal else found

    def flat(self, canonical: Tensor) -> Tensor:
        """(R, C, *S) → (R, n)."""
        return super().flat(canonical.flip(2) if self.causal else canonical)


def _check_scales(shape: Any) -> None:
    """ValueError unless these are at least two image shapes, finest first, with sides that are multiples of the last's."""
    images = len(shape) > 1 and all(isinstance(part, tuple) and len(part) == 3 for part in shape)
    if not images or any(h % shape[-1][1] or w * shape[-1][1] != h * shape[-1][2] for _, h, w in shape):
        raise ValueError(
            f"layout 'pyramid' wants at least two shapes (C, H, W), finest first, with sides that are multiples of the "
            f"last's, got {shape}"
        )


def guess_layout(shape: Any) -> Layout:
    """The layout of a per-sample shape, or of a tuple of them, where it is unambiguous; ValueError otherwise.

    One axis: a vector; three: an image. Several tensors: a pyramid, where they are images that fit together; else one vector
    of all of them, if that has at most `LARGEST_PACKED` coordinates.

    >>> guess_layout((16, 8, 8)).kind, guess_layout(((8, 8, 8), (16, 4, 4))).kind, guess_layout(((3,), (4, 5)))
    ('image', 'pyramid', Layout(kind='vector', shape=(23,)))
    """
    if len(shape) and not isinstance(shape[0], int):
        shapes = tuple(tuple(part) for part in shape)
        try:
            return Layout("pyramid", shapes)
        except ValueError as error:
            packed = packed_layout(shapes)
            if packed.channels > LARGEST_PACKED:
                raise ValueError(
                    f"no layout fits a state of several tensors {shapes}: {error}; and as one vector (layout='vector') it "
                    f"has {packed.channels} coordinates, more than {LARGEST_PACKED}"
                ) from None
            return packed
    kind = {1: "vector", 3: "image"}.get(len(shape))
    if kind is None:
        raise ValueError(f"layout= is needed for a state of per-sample shape {tuple(shape)}: one of {', '.join(KINDS)}")
    return Layout(kind, tuple(shape))


def packed_layout(shapes: Sequence[Sequence[int]]) -> Layout:
    """The layout of a state of several tensors, of these per-sample shapes, as one vector."""
    return Layout("vector", (sum(map(math.prod, shapes)),))


class Mixer(nn.Module):
    """A linear map over canonical states that mixes channels and, by layout, near neighbours.

    A convolution of odd width `kernel` for images (3×3), a causal one for sequences, a dense map for vectors. `dilation` is
    the distance of a convolution's taps; ValueError where there are none, or parts of several resolutions.
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
        if dilation < 1 or (dilation > 1 and layout.kind in ("vector", "pyramid")):
            raise ValueError(
                f"dilations must be at least 1, and are 1 for layouts 'vector' and 'pyramid'; got {dilation}"
            )
        self.past = (kernel - 1) * dilation if layout.causal else 0
        self.dilation = dilation
        self.map: nn.Module
        if layout.spatial:
            self.map = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2 * dilation, dilation=dilation, bias=bias)
        elif layout.causal:
            self.map = nn.Conv1d(inputs, outputs, kernel, dilation=dilation, bias=bias)
        else:
            self.map = nn.Linear(inputs, outputs, bias=bias)
        self.layout = layout
        if zero:
            for parameter in self.map.parameters():
                nn.init.zeros_(parameter)

    def forward(self, value: Tensor) -> Tensor:
        """(R, inputs, *S) → (R, outputs, *S)."""
        return self.apply_to(value)

    def apply_to(self, *parts: Tensor) -> Tensor:
        """The map of a value that comes in parts (R, inputs of each, *S), its channels in order, without joining them."""
        layer: Any = self.map
        found: Tensor | None = None
        begin = 0
        for part in (part for part in parts if part.shape[1]):
            weight = layer.weight[:, begin : begin + part.shape[1]]
            bias = layer.bias if begin == 0 else None
            begin += part.shape[1]
            if isinstance(layer, nn.Conv2d):
                mapped = nn.functional.conv2d(part, weight, bias, padding=layer.padding, dilation=self.dilation)
            elif isinstance(layer, nn.Conv1d):  # as an image one pixel high, padded on both sides: no copy of the input
                wide = nn.functional.conv2d(
                    part.unsqueeze(2), weight.unsqueeze(2), bias, padding=(0, self.past), dilation=(1, self.dilation)
                )
                mapped = wide[:, :, 0, : part.shape[2]]
            else:
                mapped = nn.functional.linear(part, weight, bias)
            found = mapped if found is None else found + mapped
        assert found is not None
        return found

    def of_parts(self, parts: Sequence[Tensor]) -> Tensor:
        """The map (without bias) of a canonical value that comes in `Layout.parts`, which need not be brought together."""
        if len(parts) == 1:
            return self.apply_to(parts[0])
        found: Tensor | None = None
        for part, weight, n in zip(parts, self._by_part(dim=1), self.layout.factors, strict=True):
            size = weight.shape[-1]
            finer = (
                weight.unflatten(1, (-1, n, n)).permute(0, 1, 4, 2, 5, 3).reshape(len(weight), -1, size * n, size * n)
            )
            mapped = functional.conv2d(part, finer, stride=n, padding=size // 2 * n)
            found = mapped if found is None else found + mapped
        assert found is not None
        return found

    def to_parts(self, value: Tensor) -> list[Tensor]:
        """The map (without bias) of a value, as `Layout.parts` of the canonical one."""
        if self.layout.kind != "pyramid":
            return [self.apply_to(value)]
        maps = zip(self._by_part(dim=0), self.layout.factors, strict=True)
        found = [(functional.conv2d(value, weight, padding=weight.shape[-1] // 2), n) for weight, n in maps]
        return [functional.pixel_shuffle(mapped, n) if n > 1 else mapped for mapped, n in found]

    def _by_part(self, dim: int) -> Sequence[Tensor]:
        counts = [channels * n**2 for channels, n in zip(self.layout.part_channels, self.layout.factors, strict=True)]
        weight: Any = self.map.weight
        return weight.split(counts, dim=dim)

    def transpose(self, value: Tensor) -> Tensor:
        """The transposed linear map (its bias left out), (R, outputs, *S) → (R, inputs, *S)."""
        weight: Any = self.map.weight
        if isinstance(self.map, nn.Conv2d):
            padding = weight.shape[-1] // 2 * self.dilation
            return nn.functional.conv_transpose2d(value, weight, padding=padding, dilation=self.dilation)
        if isinstance(self.map, nn.Conv1d):
            return nn.functional.conv_transpose1d(value, weight, dilation=self.dilation)[..., self.past :]
        return nn.functional.linear(value, weight.T)
