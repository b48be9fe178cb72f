"""How f is called, by whoever solves: in the caller's mode, its arguments guarded, its value packed and checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metabroyden.padded import length_mask
from metabroyden.shared import bare
from metabroyden.solution import Cell, State
from metabroyden.state import Packing, callers_context

# calls of a solve after which z's memory itself is compared: a first z is often zero, which hides factors
_COMPARED = 2
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_SMALL = 1 << 16  # bytes up to which a tensor in host memory is compared by a copy


class FunctionWrapper:
    """A map that runs another one, `inner`, in some surroundings; `rewrap` runs a function in the same ones."""

    inner: Callable[..., Any]

    def rewrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """This function in the surroundings that `inner` is run in."""
        raise NotImplementedError


def rewrap(f: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function, run as f is run."""
    return f.rewrap(function) if isinstance(f, FunctionWrapper) else function


def cell_of(f: Any) -> Any:
    """The cell behind f, without f's surroundings."""
    while isinstance(f, FunctionWrapper):
        f = f.inner
    return f


def owner_of(f: Any) -> Any:
    """What stands behind f for good: its cell, or the object whose method that is."""
    return getattr(cell_of(f), "__self__", cell_of(f))


def method_of(f: Any, name: str) -> Callable[..., Any] | None:
    """A method of the cell behind f; None where the cell has none of this name."""
    method = getattr(cell_of(f), name, None)
    return method if callable(method) else None


def part_of(f: Any, name: str) -> Callable[..., Any]:
    """The method of this name that a solver wants; TypeError where the cell has none."""
    method = method_of(f, name)
    if method is None:
        raise TypeError(f"this solver uses parts of f, and {type(f).__name__} has no method {name!r}")
    return method


def check_map(f: Any) -> None:
    """TypeError for what is no map f(z) or f(z, context): no callable, or a layer that solves for its fixed point itself."""
    if not callable(f):
        raise TypeError(f"f must be callable, got {type(f).__name__}")
    if getattr(getattr(f, "__self__", f), "solves_its_cell", False):
        raise TypeError(
            f"f must be a map f(z, context), got a {type(f).__name__} that stands for its own fixed point, z = deq(x): "
            "pass its cell, deq.cell"
        )


class CallerMode(FunctionWrapper):
    """f run as the caller would run it, under autocast or inference mode, whatever the solver's own arithmetic runs in."""

    def __init__(self, f: Cell, device: str) -> None:
        self.f = self.inner = f
        self.device = device
        compiling = torch.compiler.is_compiling()  # a graph records no gradients anyway
        self.inference = not compiling and torch.is_inference_mode_enabled()
        self.autocast = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device) if self.autocast else None

    def __call__(self, *arguments: Any) -> State:
        """f."""
        if torch.compiler.is_compiling():
            return self.differentiable(*arguments)
        with torch.inference_mode(self.inference):
            return self.differentiable(*arguments)

    def differentiable(self, *arguments: Any) -> State:
        """f outside inference mode, in which forward AD does not work."""
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.autocast):
            return self.f(*arguments)

    def rewrap(self, function: Callable[..., Any]) -> CallerMode:
        """The function in these modes, and in the surroundings of f."""
        twin = copy.copy(self)
        twin.f = twin.inner = rewrap(self.f, function)
        return twin


def in_caller_mode(f: Cell, device: str) -> Cell:
    """f as the caller would run it; f itself where the caller is in neither mode."""
    wrapped = CallerMode(f, device)
    return wrapped if wrapped.inference or wrapped.autocast else f


class Given:
    """A context as f is handed it, and what stood in it before.

    Attributes:
        arguments: of f beside z: the context, its shared tensors as they are, or nothing where f takes none.
        tensors: all that are in the context; none known to a compiler, which keeps no versions.
        mask: (B, T) where tokens are, see `Padded`; None where nothing is padded.
        versions: those that have a version (inference tensors have none), with the one that they have now.
    """

    def __init__(self, context: Any) -> None:
        self.context = context
        self.arguments = () if context is None else (bare(context),)
        self.tensors: list[Tensor] = []
        if context is not None and not torch.compiler.is_compiling():
            leaves = [context] if isinstance(context, Tensor) else pytree.tree_leaves(context)
            self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.mask = length_mask(callers_context(context))
        self.versions = [(tensor, tensor._version) for tensor in self.tensors if not tensor.is_inference()]

    def blanked(self, value: Tensor, packing: Packing) -> Tensor:
        """What f returned, packed (R, n), zero where its context is padding; ValueError where the state is not (B, T, C)."""
        if self.mask is None:
            return value
        if not packing.single or packing.shapes[0][:1] != self.mask.shape[1:]:
            raise ValueError(
                f"a padded context with a mask (B, T) wants a state (B, T, C): the mask is {tuple(self.mask.shape)}, the "
                f"state's per-sample shape {tuple(packing.shape)}"
            )
        whole = value.unflatten(1, (self.mask.shape[1], -1))
        return torch.where(self.mask.unsqueeze(2), whole, 0.0).flatten(1)


NOTHING = Given(None)


class GuardedFunction:
    """Calls f at packed states, for a evaluator, a fixed budget or an unroll.

    f may change neither z nor its context. torch notes what is written through its operations: that is looked at after
    every call. What is written past them, through `.data` or NumPy, and what is written to an inference tensor, which has
    no version, is found by comparing memory: of z at the first two calls of f, of the context at the first one (a copy of
    small tensors in host memory, else a sum of all bits).

    Args:
        f: in its surroundings.
        packing: of the state.
        f_dtype: dtype that f takes; what it returns comes back in z's.
        attached: what f returns keeps its graph; else it is detached, and z as well should f have asked for its
            gradient.
        guarded: whether f is looked at, which a compiler cannot: by default, unless one is tracing now.
    """

    def __init__(
        self,
        f: Cell,
        packing: Packing,
        *,
        f_dtype: torch.dtype | None = None,
        attached: bool = False,
        guarded: bool = True,
    ) -> None:
        self.f, self.packing, self.f_dtype, self.attached = f, packing, f_dtype, attached
        self._guarded = guarded and not torch.compiler.is_compiling()
        self._plain = packing.is_flat and f_dtype is None  # f takes what solvers see
        self._calls = 0  # whose memory was compared

    def __call__(
        self, z: Tensor, given: Given = NOTHING, function: Cell | None = None, *, differentiable: bool = False
    ) -> Tensor:
        """f (or a function in its place) at z (R, n) and the context given, packed; `differentiable`: for forward AD.

        ValueError where f changes z or its context, or returns what is not shaped like z; TypeError where that is no state.
        """
        f = self.f if function is None else function
        if differentiable and isinstance(f, CallerMode):
            f = f.differentiable
        point = z if self.f_dtype is None else z.to(self.f_dtype)
        state = point if self._plain else self.packing.unpack(point)
        if not self._guarded:
            return given.blanked(self.packing.take(f(state, *given.arguments), z), self.packing)
        version = point._version
        compare = self._calls < _COMPARED and function is None and not differentiable
        before = self._memory(point, given) if compare else None
        value = given.blanked(self.packing.take(f(state, *given.arguments), z), self.packing)
        self._look(point, version, given)
        if before is not None:
            self._compare(before, point, given)
        if not self.attached:
            value = value.detach() if value.requires_grad else value
            if z.requires_grad:
                z.requires_grad_(False)
        return value.clone() if value.is_inference() else value

    def _look(self, point: Tensor, version: int, given: Given) -> None:
        """Whether torch has noted a write to z or to the context during this call."""
        if point._version != version:
            _refuse_point()
        for tensor, number in given.versions:
            if tensor._version != number:
                _refuse_context(tensor)

    def _memory(self, point: Tensor, given: Given) -> list[Any]:
        return [contents(tensor) for tensor in (point, *(() if self._calls else given.tensors))]

    def _compare(self, before: list[Any], point: Tensor, given: Given) -> None:
        """Whether memory is as it was before this call."""
        changed = [bool(was != now) for was, now in zip(before, self._memory(point, given), strict=True)]
        self._calls += 1
        if changed[0]:
            _refuse_point()
        for tensor, other in zip(given.tensors, changed[1:], strict=False):
            if other:
                _refuse_context(tensor)


def _refuse_point() -> None:
    raise ValueError("f changed its argument z in place: a fixed-point map must leave z as it was")


def _refuse_context(tensor: Tensor) -> None:
    raise ValueError(
        f"f changed its context in place, a tensor of shape {tuple(tensor.shape)} in it: a fixed-point map must leave its "
        "context as it was"
    )


def contents(tensor: Tensor) -> Any:
    """What stands in a tensor's memory, to be compared: a copy where that is small and on the host, else a checksum.

    None where memory cannot be read: of nested, compressed sparse and quantized tensors, and inside torch.func's transforms.
    """
    if tensor.is_nested or tensor.is_quantized or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return None
    tensor = (tensor._values() if tensor.layout is torch.sparse_coo else tensor).detach()
    if tensor.layout is not torch.strided or not tensor.numel():
        return None
    if tensor.is_complex():  # conj() twice undoes a lazy conjugation, whose memory is that of the tensor before
        tensor = torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)
    tensor = torch._neg_view(tensor) if tensor.is_neg() else tensor
    width = tensor.element_size()
    if tensor.numel() * width <= _SMALL and tensor.is_cpu:
        return tensor.view(_WORDS[width]).numpy().tobytes()
    for axis, stride in enumerate(tensor.stride()):
        if stride == 0:  # expanded
            tensor = tensor.narrow(axis, 0, 1)
    if tensor.is_contiguous() and tensor.numel() * width % 8 == tensor.storage_offset() * width % 8 == 0:
        return tensor.view(-1).view(torch.int64).sum()  # five times as fast as narrower words
    return tensor.view(_WORDS[width]).sum()
