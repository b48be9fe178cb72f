"""Warm starts: where a sample's equilibrium was when it was last seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metabroyden.solution import State
from metabroyden.state import like


class EquilibriumCache:
    """Remembers an equilibrium for every sample of a data set, by its number, as the start of the next epoch's solve.

    Between two visits of a sample the weights, and with them its equilibrium, move little: the old one is a better start
    than zeros. Of data that is augmented anew each epoch, the row is another image's.

    Args:
        size: number of samples, numbered from 0; None: grows with the numbers it meets.
        dtype: of the stored rows (float16 and bfloat16 halve the memory and round the start); None: that of the first
            state stored.
        device: of the stored rows; None: that of the first state stored.

    Raises:
        ValueError: a size below 1, a dtype that is not floating.

    `len(cache)` is the number of samples it knows.

    >>> import torch, metabroyden as mb
    >>> cache = mb.EquilibriumCache()
    >>> cache.store(torch.tensor([4]), torch.ones(1, 2))
    >>> cache.start(torch.tensor([4, 5]), torch.zeros(2, 2))
    tensor([[1., 1.],
            [0., 0.]])

    In a training loop: `z = deq(x, cache.start(i, zeros))`, then `cache.store(i, deq.last_solution.z)`.
    """

    def __init__(
        self, size: int | None = None, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        if size is not None and size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be floating, got {dtype}")
        self.size, self.dtype = size, dtype
        self.device = None if device is None else torch.device(device)
        self._rows: tuple[Tensor, ...] = ()
        self._known = torch.zeros(0, dtype=torch.bool, device="cpu" if device is None else device)
        self._single = True

    def __len__(self) -> int:
        return int(self._known.sum())

    def start(self, indices: Tensor | Sequence[int], default: State) -> State:
        """A start (B, ...) for samples `indices` (B,): the stored row where there is one, else the default's.

        Shaped like the default, with its dtype and device. ValueError, TypeError: indices that are no sample numbers, or
        a default that is shaped otherwise than what is stored.
        """
        parts = _parts(default, "default")
        index = self._index(indices, len(parts[0]))
        if not self._rows:
            return default
        self._compare(parts, isinstance(default, Tensor), "default")
        inside = index < len(self._known)
        index = torch.where(inside, index, 0)
        known = inside & self._known[index]
        found = []
        for rows, part in zip(self._rows, parts, strict=True):
            mine = known.to(part.device).reshape(-1, *[1] * (part.dim() - 1))
            found.append(torch.where(mine, rows[index].to(part), part))
        return found[0] if self._single else like(found, type(default))

    @torch.no_grad()
    def store(self, indices: Tensor | Sequence[int], z: State) -> None:
        """Keep z (B, ...) as the equilibria of samples `indices` (B,).

        Of a sample that occurs twice the last row counts. A row that is not finite in the dtype of the store is not stored:
        the sample's old row stays. ValueError, TypeError as in `start`.
        """
        parts = _parts(z, "z")
        index = self._index(indices, len(parts[0]))
        if self._rows:
            self._compare(parts, isinstance(z, Tensor), "z")
        else:
            self.device = parts[0].device if self.device is None else self.device
            self.dtype = parts[0].dtype if self.dtype is None else self.dtype
            self._single = isinstance(z, Tensor)
            self._rows = tuple(torch.zeros(0, *part.shape[1:], dtype=self.dtype, device=self.device) for part in parts)
            index = index.to(self.device)
        self._grow(int(index.max()) + 1)
        stored = [part.detach().to(self.device, self.dtype) for part in parts]
        good = torch.stack([torch.isfinite(part).flatten(1).all(dim=1) for part in stored]).all(dim=0)
        positions = good.nonzero().squeeze(1)
        samples, group = torch.unique(index[positions], return_inverse=True)
        chosen = torch.zeros_like(samples).scatter_reduce(0, group, positions, "amax", include_self=False)
        index = index[chosen]
        for rows, part in zip(self._rows, stored, strict=True):
            rows[index] = part[chosen]
        self._known[index] = True

    def state_dict(self) -> dict[str, Any]:
        """Its tensors (not copies) and plain values; `torch.load` takes them with weights_only."""
        return {"known": self._known, "rows": list(self._rows), "single": self._single}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy the rows of another cache; this one keeps its size, dtype and device where they were given.

        ValueError: not such a state, or samples that do not fit the size.
        """
        if set(state) != {"known", "rows", "single"}:
            raise ValueError(f"not the state of an EquilibriumCache: it holds {sorted(state)}")
        known, rows = state["known"], state["rows"]
        if self.size is not None and bool(known[self.size :].any()):
            raise ValueError(f"the state knows sample {int(known.nonzero().max())}, this cache has size {self.size}")
        if rows:
            self.dtype = rows[0].dtype if self.dtype is None else self.dtype
            self.device = rows[0].device if self.device is None else self.device
        known, rows = known[: self.size], [part[: self.size] for part in rows]
        self._known = known.to(self.device, copy=True)
        self._rows = tuple(part.to(self.device, self.dtype, copy=True) for part in rows)
        for part in self._rows:  # a narrower dtype may not hold what the wider one held
            self._known &= torch.isfinite(part).flatten(1).all(dim=1)
        self._single = bool(state["single"])

    def _index(self, indices: Tensor | Sequence[int], batch: int) -> Tensor:
        index = torch.as_tensor(indices, device=self._known.device)
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise TypeError(f"indices must be integers, got {index.dtype}")
        if index.shape != (batch,):
            raise ValueError(f"indices must have shape ({batch},) for as many samples, got {tuple(index.shape)}")
        low, high = int(index.min()), int(index.max())
        if low < 0 or (self.size is not None and high >= self.size):
            within = "0 or more" if self.size is None else f"0 to {self.size - 1}"
            raise ValueError(f"indices must be {within}, got {low if low < 0 else high}")
        return index.long()

    def _compare(self, parts: tuple[Tensor, ...], single: bool, name: str) -> None:
        wanted = [tuple(rows.shape[1:]) for rows in self._rows]
        got = [tuple(part.shape[1:]) for part in parts]
        if got != wanted or single != self._single:
            raise ValueError(f"{name} has samples of shape {got}, stored are {wanted}")

    def _grow(self, needed: int) -> None:
        have = len(self._known)
        if needed > have or not have:
            size = max(needed, 2 * have) if self.size is None else self.size
            self._known, *rows = (
                torch.cat([old.to(self.device), old.new_zeros(size - have, *old.shape[1:], device=self.device)])
                for old in (self._known, *self._rows)
            )
            self._rows = tuple(rows)


def _parts(z: State, name: str) -> tuple[Tensor, ...]:
    if not isinstance(z, Tensor) and not (isinstance(z, tuple) and z and all(isinstance(p, Tensor) for p in z)):
        raise TypeError(f"{name} must be a tensor or a non-empty tuple of tensors, got {type(z).__name__}")
    parts = (z,) if isinstance(z, Tensor) else z
    for part in parts:
        if not part.is_floating_point() or part.dim() == 0 or len(part) == 0 or len(part) != len(parts[0]):
            raise ValueError(
                f"{name} must be floating, batch first, with at least one sample and as many in each of its tensors; "
                f"got {[(tuple(p.shape), str(p.dtype)) for p in parts]}"
            )
    return parts
