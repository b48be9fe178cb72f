"""Which weights a solver was fitted to, and a word when they have moved since."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import torch
from torch import nn


def module_of(f: Any) -> nn.Module | None:
    """The module behind a callable: f itself, or the module whose method f is; None for other callables."""
    owner = getattr(f, "__self__", f)
    return owner if isinstance(owner, nn.Module) else None


def fingerprint(f: Any) -> str | None:
    """A short hash of the parameters and buffers of the module behind f; None where there is no module."""
    module = module_of(f)
    if module is None:
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class FingerprintWatch:
    """Warns once when a learned solver meets weights other than those it was fitted to; cheap while nothing moves."""

    def __init__(self) -> None:
        self._seen: tuple[Any, ...] | None = None
        self._warned = False

    def check(self, solver: Any, f: Any) -> None:
        """Compare the solver's fingerprint with f's weights, hashing them only when a tensor was written to (through
        `.data` that goes unseen, as torch does not note it)."""
        wanted, module = getattr(solver, "fingerprint", None), module_of(f)
        if wanted is None or module is None or self._warned:
            return
        seen = tuple((id(p), p._version) for p in (*module.parameters(), *module.buffers()))
        if seen == self._seen:
            return
        self._seen = seen
        if fingerprint(f) != wanted:
            self._warned = True
            warnings.warn(
                f"{type(solver).__name__} was fitted to other weights of f (fingerprint {wanted}): it stays safe, but "
                "may need more evaluations; fit it again with fit_solver (said once)",
                stacklevel=3,
            )
