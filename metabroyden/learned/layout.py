"""State layouts: which axes of a state are channels, space or time, and what a learned solver pools over.

A state (R, …) is brought to canonical form (R, C, *S), channels second. Groups, each with one LSTM cell, are the channels
of an image (pooling over space), the tokens of a sequence or set (pooling over channels, so that nothing crosses time), and
the whole sample of a vector. A pyramid is brought to its coarsest resolution: each finer pixel becomes channels of the
coarse one that it lies in, so that nothing is lost and resolutions are mixed where they overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from metabroyden.deprecated import current

KINDS = {"vector": 1, "nct": 2, "ntc": 2, "tokens": 2, "set": 2, "graph": 2, "image": 3, "pyramid": 3}
"""Per-sample axes of each layout: vector; nct/ntc: sequence in which nothing looks ahead, channels first/last; tokens:
sequence in which tokens see one another, channels last; set: the same without an order; graph: with edges, see `Graphs`;
image; pyramid: a tuple of images, finest first, each side a multiple of the last one's."""
LARGEST_PACKED = 8192
"""Coordinates above which a state of several tensors is not taken for one vector unasked: maps of it are dense."""


@dataclass(frozen=True)
class Layout:
    """A layout with the per-sample shape it was fitted to.

    Attributes:
        kind: one of `KINDS`.
        shape: per-sample shape (of a pyramid a tuple of them); a solver runs on other spatial or time extents too, not on
            other channel counts.
        reverse: whether time runs backwards, as it does for the cotangents of a sequence.

    Examples:
        >>> Layout("image", (16, 8, 8)).channels
        16
    """

    kind: str
    shape: Any
    reverse: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", current(self.kind))
        if self.kind not in KINDS:
            raise ValueError(f"layout must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "pyramid":
            _check_pyramid(self.shape)
        elif len(self.shape) != KINDS[self.kind]:
            raise ValueError(
                f"layout {self.kind!r} wants {KINDS[self.kind]} axes a sample, got shape {tuple(self.shape)}"
            )

    @property
    def channels(self) -> int:
        """Channels C."""
        return sum(self.coarse_channels) if self.kind == "pyramid" else self.shape[self.channel_axis]

    @property
    def channel_axis(self) -> int:
        """Which axis of a sample has the channels."""
        return 1 if self.kind in ("ntc", "tokens", "set", "graph") else 0

    @property
    def causal(self) -> bool:
        """Whether one axis is time, in which nothing looks ahead."""
        return self.kind in ("nct", "ntc")

    @property
    def by_token(self) -> bool:
        """Whether one axis is that of tokens."""
        return KINDS[self.kind] == 2

    @property
    def spatial(self) -> bool:
        """Whether the state is made of images."""
        return self.kind in ("image", "pyramid")

    @property
    def factors(self) -> list[int]:
        """How many times finer than the coarsest each image of a pyramid is."""
        return [part[1] // self.shape[-1][1] for part in self.shape]

    @property
    def coarse_channels(self) -> list[int]:
        """Canonical channels that each image of a pyramid becomes."""
        return [part[0] * n**2 for part, n in zip(self.shape, self.factors, strict=True)]

    @property
    def part_channels(self) -> list[int]:
        """Channels of each of the `parts`."""
        return [part[0] for part in self.shape] if self.kind == "pyramid" else [self.channels]

    @property
    def identities(self) -> int:
        """How many groups have an identity of their own (the channels of an image; tokens are alike)."""
        return self.channels if self.spatial else 1

    def resolve(self, shape: Any) -> tuple[Any, ...]:
        """The per-sample shape to use for a state of this shape: its own, or the fitted one when it comes flattened.

        ValueError when the channels differ from the fitted ones.
        """
        if shape == self.shape:  # the usual case, without ceremony
            return self.shape
        found: Any = tuple(map(tuple, shape)) if _several(shape) else tuple(int(size) for size in shape)
        pyramid = self.kind == "pyramid"
        flattened = packed_layout(self.shape if pyramid else [self.shape]).shape
        if found == flattened or (
            self.kind == "vector" and _several(found) and packed_layout(found).shape == flattened
        ):
            return self.shape
        if pyramid and _several(found) and len(found[-1]) == 3 and self.shape_like(found[-1][1:]) == found:
            return found
        sizes = found if not pyramid and not _several(found) and len(found) == KINDS[self.kind] else ()
        if sizes and sizes[self.channel_axis] == self.channels:
            return sizes
        raise ValueError(self._misfit(found))

    def _misfit(self, found: tuple[Any, ...]) -> str:
        if self.kind == "pyramid":
            return f"this solver was fitted to a state of several scales {self.shape}, got {found}"
        if _several(found):
            return f"this solver was fitted to one tensor of shape {self.shape}, got a state of {len(found)}: {list(found)}"
        return (
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
        if _several(shape):
            layout = packed_layout(shape)
        elif self.kind != "pyramid" and len(shape) == KINDS[self.kind]:
            layout = Layout(self.kind, tuple(shape))
        else:
            layout = packed_layout([shape])
        return layout, layout.shape

    def shape_like(self, extents: torch.Size | tuple[int, ...]) -> tuple[Any, ...]:
        """The per-sample shape of a state with these spatial or time extents."""
        if self.kind == "pyramid":
            pairs = zip(self.part_channels, self.factors, strict=True)
            return tuple((channels, *(extent * n for extent in extents)) for channels, n in pairs)
        return (*extents, self.channels) if self.channel_axis else (self.channels, *extents)

    def extents(self, shape: tuple[Any, ...]) -> tuple[int, ...]:
        """The spatial or time extents S of a per-sample shape."""
        if self.kind == "pyramid":
            return shape[-1][1:]
        return shape[:1] if self.channel_axis else shape[1:]

    def canonical(self, flat: Tensor, shape: tuple[Any, ...]) -> Tensor:
        """(R, n) → (R, C, *S)."""
        if self.kind == "pyramid":
            images = zip(self.parts(flat, shape), self.factors, strict=True)
            return torch.cat([functional.pixel_unshuffle(image, n) for image, n in images], dim=1)
        full = flat.reshape(-1, *shape)
        found = full.transpose(1, 2) if self.channel_axis else full
        return found.flip(2) if self.reverse and self.causal else found

    def flat(self, canonical: Tensor) -> Tensor:
        """(R, C, *S) → (R, n)."""
        if self.kind == "pyramid":
            coarse = zip(canonical.split(self.coarse_channels, dim=1), self.factors, strict=True)
            return self.joined([functional.pixel_shuffle(part, n) for part, n in coarse])
        forward = canonical.flip(2) if self.reverse and self.causal else canonical
        ordered = forward.transpose(1, 2) if self.channel_axis else forward
        return ordered.flatten(1)

    def parts(self, flat: Tensor, shape: tuple[Any, ...]) -> list[Tensor]:
        """(R, n) → the images (R, C, H, W) of a pyramid, as views; of other layouts the canonical form alone."""
        if self.kind != "pyramid":
            return [self.canonical(flat, shape)]
        values = flat.split([math.prod(part) for part in shape], dim=1)
        return [value.unflatten(1, size) for value, size in zip(values, shape, strict=True)]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `parts`."""
        return torch.cat([part.flatten(1) for part in parts], dim=1) if self.kind == "pyramid" else self.flat(parts[0])

    def spread(self, weight: Tensor) -> list[Tensor]:
        """Weights of places (R, 1, *S) as weights of the pixels in each of the `parts`."""
        factors = self.factors if self.kind == "pyramid" else [1]
        return [weight.repeat_interleave(n, 2).repeat_interleave(n, 3) if n > 1 else weight for n in factors]

    def context(self, feature: Tensor, extents: tuple[int, ...]) -> Tensor:
        """A context tensor (R, …) in canonical form: an image finer than these extents becomes channels of the coarse."""
        if self.channel_axis and feature.dim() == 3:
            return feature.transpose(1, 2)
        finer = self.kind == "pyramid" and feature.dim() == 4 and feature.shape[2] % extents[0] == 0
        if finer and feature.shape[3] * extents[0] == feature.shape[2] * extents[1]:
            return functional.pixel_unshuffle(feature, feature.shape[2] // extents[0])
        return feature

    def context_channels(self, context: Any, shape: Any) -> int:
        """Channels of a context (of a tuple its first tensor) in canonical form; 0 where it has not the state's extents."""
        first = context[0] if isinstance(context, tuple) and context else context
        if not isinstance(first, Tensor) or first.dim() < 2:
            return 0
        feature = self.context(first, self.extents(shape))
        return feature.shape[1] if feature.shape[2:] == self.extents(shape) else 0

    def groups(self, extents: tuple[int, ...]) -> int:
        """Groups G of a state with these extents: channels, tokens, or one."""
        return self.channels if self.spatial else extents[0] if self.by_token else 1

    def grouped(self, stack: Tensor) -> Tensor:
        """(R, C, K, *S) → (R, G, K, P): K values a coordinate, sorted into groups of P coordinates."""
        if self.spatial:
            return stack.flatten(3)
        return stack.permute(0, 3, 2, 1) if self.by_token else stack.permute(0, 2, 1).unsqueeze(1)

    def ungrouped(self, value: Tensor, extents: tuple[int, ...]) -> Tensor:
        """(R, G, P) → (R, C, *S), S being the extents."""
        if self.spatial:
            return value.unflatten(2, extents)
        return value.transpose(1, 2) if self.by_token else value.squeeze(1)

    def scale(self, g: Tensor) -> Tensor:
        """Root mean square of a canonical residual, broadcastable over it.

        Per sample; for causal sequences the running one over past tokens, (R, 1, T), so that the future does not leak.
        """
        tiny = torch.finfo(g.dtype).tiny ** 0.5
        if self.causal:
            steps = torch.arange(1, g.shape[2] + 1, device=g.device, dtype=g.dtype)
            return (g.square().mean(dim=1, keepdim=True).cumsum(dim=2) / steps).clamp_min(tiny).sqrt()
        norm = torch.linalg.vector_norm(g.flatten(1), dim=1) / g[0].numel() ** 0.5
        return norm.clamp_min(tiny**0.5).view(-1, *[1] * (g.dim() - 1))

    def scale_of(self, flat: Tensor, shape: tuple[Any, ...]) -> Tensor:
        """The `scale` of a residual (R, n)."""
        return self.scale(flat[:, :, None, None] if self.kind == "pyramid" else self.canonical(flat, shape))


def _several(shape: Any) -> bool:
    """Whether these are shapes of several tensors rather than the sizes of one."""
    return len(shape) > 0 and not isinstance(shape[0], int)


def _check_pyramid(shape: Any) -> None:
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

    Examples:
        >>> guess_layout((16, 8, 8)).kind, guess_layout(((8, 8, 8), (16, 4, 4))).kind, guess_layout(((3,), (4, 5)))
        ('image', 'pyramid', Layout(kind='vector', shape=(23,)))
    """
    if _several(shape):
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
    if kind is None and len(shape) == 2:
        one, two = shape
        raise ValueError(
            f"layout= is needed for a state of per-sample shape {tuple(shape)}: 'nct' if that is {one} channels × {two} "
            f"tokens (or times), 'ntc' if it is {one} tokens × {two} channels, none of which looks ahead; 'tokens' if they "
            "see one another both ways, 'set' if they have no order; or give the cell an attribute layout"
        )
    if kind is None:
        raise ValueError(
            f"no layout has {len(shape)} axes a sample, as the state of per-sample shape {tuple(shape)}: let f take and "
            f"return it reshaped to one of {', '.join(KINDS)}"
        )
    return Layout(kind, tuple(shape))


def packed_layout(shapes: Sequence[Sequence[int]]) -> Layout:
    """The layout of a state of several tensors, of these per-sample shapes, as one vector."""
    return Layout("vector", (sum(map(math.prod, shapes)),))
