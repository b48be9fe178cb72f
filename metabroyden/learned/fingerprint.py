"""Which weights a solver was fitted to, and a word when they have moved since."""

from __future__ import annotations

import functools
import hashlib
import types
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_TAG = "v2"
_ROUNDED = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def module_of(f: Any) -> nn.Module | None:
    """The module behind a callable: f itself, or the module whose method f is; None for other callables."""
    owner = getattr(f, "__self__", f)
    return owner if isinstance(owner, nn.Module) else None


def fingerprint(f: Any) -> str | None:
    """A short hash of the values of the parameters and buffers of the module behind f; None where there is no module.

    Buffers are those that its `state_dict` holds, the persistent ones. The hash depends neither on the tensors' names and
    order, nor on how often a tensor is held, nor on whether they are float32 or float64: values are rounded to float32.
    Hashes of values rounded to half precision stand beside it, and one of the tensors' shapes. Compare with `same_weights`.
    """
    module = module_of(f)
    if module is None:
        return None
    tensors = _distinct(module)
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors} & set(_ROUNDED)
    hashes = [_of_values(tensors, dtype) for dtype in (torch.float32, *_ROUNDED.values())]
    return "-".join([_TAG, *hashes, ",".join(sorted(kinds)), _of_shapes(tensors)])


def same_weights(wanted: str, f: Any) -> bool:
    """Whether a fingerprint is that of the module behind f, of any name and floating dtype.

    Half precision counts as the same where the other side, rounded to it, is. Fingerprints of earlier versions depend on the
    tensors' names: they are compared by the rule that made them, in either precision.
    """
    module = module_of(f)
    if module is None:
        return True
    parts = wanted.split("-")
    if parts[0] != _TAG or len(parts) not in (5, 6):  # earlier ones have no shapes
        return wanted in {named_fingerprint(module, dtype) for dtype in (None, torch.float32, torch.float64)}
    _, theirs, *theirs_rounded, their_kinds = parts[:5]
    _, ours, *ours_rounded, our_kinds = str(fingerprint(module)).split("-")[:5]
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
    for name, tensor in sorted(_held(module), key=lambda item: item[0]):
        for part in _dense(tensor):
            value = part.to(dtype) if dtype is not None and part.is_floating_point() else part
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(_bytes(value))
    return digest.hexdigest()[:16]


def _held(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors of a module's state by name: an entry may be something else, or hold several (`get_extra_state`)."""
    found = [(name, leaf) for name, entry in module.state_dict().items() for leaf in pytree.tree_leaves(entry)]
    return [(name, leaf) for name, leaf in found if isinstance(leaf, Tensor)]


def _distinct(module: nn.Module) -> list[Tensor]:
    """What the tensors of a module's state are made of, each once."""
    held = [part for _, tensor in _held(module) for part in _dense(tensor)]
    return list({(tensor.data_ptr(), tensor.shape, tensor.dtype): tensor for tensor in held}.values())


def _of_shapes(tensors: list[Tensor]) -> str:
    """Hash of the shapes of tensors in any order: the same for other weights of one architecture."""
    shapes = sorted(f"{tuple(tensor.shape)} {tensor.is_floating_point()}" for tensor in tensors)
    return hashlib.sha256("; ".join(shapes).encode()).hexdigest()[:16]


def _dense(tensor: Tensor) -> list[Tensor]:
    """What a tensor is made of: itself, or of a sparse one where its values stand and the values."""
    if tensor.layout != torch.strided:
        sparse = tensor.detach().to_sparse_coo().coalesce()
        return [sparse.indices(), sparse.values()]
    plain = tensor.dequantize() if tensor.is_quantized else tensor
    return [plain.resolve_conj().resolve_neg()]


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
        module = module_of(f)
        self._compare(solver, [] if module is None else [module], stacklevel=4)

    def _compare(self, solver: Any, modules: list[nn.Module], stacklevel: int) -> None:
        """Warn where none of the modules has the weights that the solver was fitted to."""
        wanted = getattr(solver, "fingerprint", None)
        if wanted is None or not modules or self._warned:
            return
        held = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        seen = tuple((id(p), 0 if p.is_inference() else p._version) for p in held)
        if seen == self._seen:
            return
        self._seen = seen
        if not any(same_weights(wanted, module) for module in modules):
            self._warned = True
            warnings.warn(
                f"{type(solver).__name__} was fitted to other weights of f (fingerprint {wanted}): it stays safe, but "
                "may need more evaluations; fit it again with fit_solver (said once)",
                stacklevel=stacklevel,
            )


class ClosureWatch(FingerprintWatch):
    """A `FingerprintWatch` for functions of z alone, which may be new at every call: it looks at the modules behind them.

    Of these and their parts, the one counts whose tensors have the shapes of those that the solver was fitted to; of several
    such, the one that the solver fits when they are first seen. Where there is none nothing is said: a false alarm is worse.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: tuple[list[weakref.ref[nn.Module]], list[weakref.ref[nn.Module]]] | None = None

    def check(self, solver: Any, f: Any) -> None:
        """As `FingerprintWatch.check`."""
        parts = str(getattr(solver, "fingerprint", None)).split("-")
        if len(parts) == 6 and not self._warned:
            modules = list({id(module): module for module in modules_behind(f)}.values())
            self._compare(solver, self._counting(modules, solver.fingerprint, parts[5]), stacklevel=5)

    def _counting(self, modules: list[nn.Module], wanted: str, shapes: str) -> list[nn.Module]:
        """The module that counts among these and their parts, if any; found once for the same ones."""
        if self._known is not None and [known() for known in self._known[0]] == modules:
            return [module for module in (known() for known in self._known[1]) if module is not None]
        every = {id(part): part for module in modules for part in module.modules()}
        alike = {frozenset(tensor.data_ptr() for tensor in tensors): part for part in every.values()
                 if (tensors := _distinct(part)) and _of_shapes(tensors) == shapes}  # fmt: skip
        found = list(alike.values())
        if len(found) > 1:
            found = [module for module in found if same_weights(wanted, module)]
        self._known = [weakref.ref(module) for module in modules], [weakref.ref(module) for module in found]
        return found


_DEPTH = 6  # functions within functions


def modules_behind(f: Any, depth: int = _DEPTH) -> Iterator[nn.Module]:
    """The modules that a callable refers to: itself, its object, its arguments, what it closes over, globals that it reads.

    Callables among these are followed.
    """
    if isinstance(f, nn.Module):
        yield f
    elif depth and callable(f) and not isinstance(f, type):
        for value in _referred(f):
            yield from modules_behind(value, depth - 1)


def _referred(f: Any) -> list[Any]:
    """What a callable that is no module holds on to."""
    if isinstance(f, types.MethodType):
        owner = f.__self__
        return [owner] if isinstance(owner, nn.Module) else list(getattr(owner, "__dict__", {}).values())
    if isinstance(f, functools.partial):
        return [f.func, *f.args, *f.keywords.values()]
    if isinstance(f, types.FunctionType):
        named = [f.__globals__.get(name) for name in f.__code__.co_names]
        return [*_closed_over(f), *(f.__defaults__ or ()), *(value for value in named if isinstance(value, nn.Module))]
    return list(getattr(f, "__dict__", {}).values())


def _closed_over(f: types.FunctionType) -> list[Any]:
    """The values of a function's closure that are there."""
    found = []
    for cell in f.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    return found
