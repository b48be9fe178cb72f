"""Which weights a solver was fitted to, and a word when they have moved since."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

_TAG = "v2"
_ROUNDED = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def module_of(f: Any) -> nn.Module | None:
    """The module behind a callable: f itself, or the module whose method f is; None for other callables."""
    owner = getattr(f, "__self__", f)
    return owner if isinstance(owner, nn.Module) else None


def fingerprint(f: Any) -> str | None:
    """A short hash of the values of the parameters and buffers of the module behind f; None where there is no module.

    It depends neither on the tensors' names and order, nor on how often a tensor is held, nor on whether they are float32
    or float64: values are rounded to float32. Hashes of values rounded to half precision stand beside it. Compare with
    `same_weights`.
    """
    module = module_of(f)
    if module is None:
        return None
    held = module.state_dict().values()
    tensors = list({(tensor.data_ptr(), tensor.shape, tensor.dtype): tensor for tensor in held}.values())
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors} & set(_ROUNDED)
    hashes = [_of_values(tensors, dtype) for dtype in (torch.float32, *_ROUNDED.values())]
    return "-".join([_TAG, *hashes, ",".join(sorted(kinds))])


def same_weights(wanted: str, f: Any) -> bool:
    """Whether a fingerprint is that of the module behind f, of any name and floating dtype.

    Half precision counts as the same where the other side, rounded to it, is. Fingerprints of earlier versions depend on the
    tensors' names: they are compared by the rule that made them, in either precision.
    """
    module = module_of(f)
    if module is None:
        return True
    parts = wanted.split("-")
    if parts[0] != _TAG or len(parts) != 5:
        return wanted in {named_fingerprint(module, dtype) for dtype in (None, torch.float32, torch.float64)}
    _, theirs, *theirs_rounded, their_kinds = parts
    _, ours, *ours_rounded, our_kinds = str(fingerprint(module)).split("-")
    half = {*their_kinds.split(","), *our_kinds.split(",")}
    rounded = zip(_ROUNDED, theirs_rounded, ours_rounded, strict=True)
    return theirs == ours or any(kind in half and a == b for kind, a, b in rounded)


def named_fingerprint(f: Any, dtype: torch.dtype | None = None) -> str | None:
    """A short hash of names, dtypes and values, floating ones cast to `dtype` first; None where there is no module.

    What fingerprints were before they left the names out. It tells apart what `same_weights` takes for the same.
    """
    module = module_of(f)
    if module is None:
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()[:16]


def _of_values(tensors: list[Tensor], dtype: torch.dtype) -> str:
    """Hash of tensors in any order, the floating ones rounded to a dtype."""
    found = []
    for tensor in tensors:
        value = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        value = value.to(dtype).float() if value.is_floating_point() else value.long()
        found.append(hashlib.sha256(f"{tuple(value.shape)} {value.dtype}".encode() + _bytes(value)).digest())
    return hashlib.sha256(b"".join(sorted(found))).hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


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
        if not same_weights(wanted, f):
            self._warned = True
            warnings.warn(
                f"{type(solver).__name__} was fitted to other weights of f (fingerprint {wanted}): it stays safe, but "
                "may need more evaluations; fit it again with fit_solver (said once)",
                stacklevel=3,
            )
