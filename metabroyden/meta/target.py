"""What a solver is fitted to: a map f(z, x), the cell of a DEQ, or the cell of the DEQ inside a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metabroyden.deq import DEQ, default_start, initial_state
from metabroyden.learned.fingerprint import module_of
from metabroyden.opaque import opaque
from metabroyden.padded import values_of
from metabroyden.shared import bare
from metabroyden.solution import Cell, State
from metabroyden.solve import solve
from metabroyden.solvers.picard import Picard


class ModelMap(nn.Module):
    """The f(z, x) of the DEQ inside a model of another library, x being the model's raw inputs, see `call_arguments`.

    Such a model solves a closure z → f(z), so that solvers are given no context.
    """

    model: nn.Module


ADAPTERS: list[Callable[[Any], ModelMap | None]] = []
"""Integrations add to them: each makes a `ModelMap` of a model with a DEQ of its library in it, and None of all else."""


class Target(NamedTuple):
    """A family of fixed-point problems."""

    f: Cell  # z⁺ = f(z, x)
    encode: Callable[[Any], Any] | None = None  # what is given for a problem → the context x; None: that is x
    z0: Callable[[Any], State] | None = None  # x → start; None: zeros like x
    whole: nn.Module | None = None  # in evaluation mode while the fit lasts; None: f is taken as it is
    model: nn.Module | None = None  # whose inputs are given for problems; None: what is given is the context x

    def prepare(self, raw: Any) -> tuple[State, Any]:
        """(start, context) of what is given for problems."""
        x = raw if self.encode is None else self.encode(raw)
        return (torch.zeros_like(values_of(x)) if self.z0 is None else self.z0(bare(x))), x


def target_of(f: Any) -> Target:
    """The problems that f stands for, where f is what people hand to `fit_solver`.

    A map f(z, x) is taken as it is, a `DEQ` for its cell, and a module with a DEQ in it, ours or one that `ADAPTERS` know,
    for a model whose inputs are given for contexts: see `Inside` and `ModelMap`.

    Raises:
        TypeError: no callable.
        ValueError: a model with several DEQs.
    """
    if not callable(f) or isinstance(f, type):
        given = f"the class {f.__name__}: give an instance of it" if isinstance(f, type) else type(f).__name__
        raise TypeError(f"f must be callable, a map f(z, x) or a model with a DEQ in it, got {given}")
    f = getattr(f, "_orig_mod", f)  # what torch.compile wraps
    f = f.module if isinstance(f, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else f
    owner = module_of(f)
    if owner is not None and getattr(f, "__name__", "") == "forward":
        f = owner
    if isinstance(owner, DEQ) and type(owner).forward is DEQ.forward:
        return Target(owner.cell, None, lambda x: initial_state(owner.cell, x), owner)
    layers = deqs_in(f)
    foreign = next((made for adapt in ADAPTERS if (made := adapt(f)) is not None), None)
    if layers and foreign is not None:
        raise ValueError(
            f"{type(f).__name__} holds DEQs of torchdeq and of ours ({', '.join(layers)}): hand over one of them"
        )
    f = f if foreign is None else foreign
    if layers:
        inside = Inside(f)
        return Target(inside.deq.cell, inside.context, inside.start, f, f)
    model = f.model if isinstance(f, ModelMap) else None
    _check_takes_two(f)
    return Target(f, None, getattr(f, "initial_state", None), model=model)


def _check_takes_two(f: Any) -> None:
    """TypeError for a callable that is no map f(z, x)."""
    signature = _signature(f)
    if signature is None:
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        name = _named(f)
        if _binds_one(signature):
            raise TypeError(f"{name} takes one argument and {_NO_DEQ}") from None
        called = "forward" if isinstance(f, nn.Module) else ""
        raise TypeError(
            f"{name} holds no DEQ, ours or torchdeq's, so that it is taken for a map f(z, x), and its {called}{signature} "
            f"is none: {error}"
        ) from None


_NO_DEQ = "has no DEQ in it: give its cell, a map f(z, x), or put the cell into mb.DEQ"


def _named(f: Any) -> str:
    return type(f).__name__ if isinstance(f, nn.Module) else getattr(f, "__name__", type(f).__name__)


def _binds_one(signature: inspect.Signature) -> bool:
    try:
        signature.bind(None)
    except TypeError:
        return False
    return True


def _second_is_setting(f: Any) -> bool:
    """Whether f is a module whose `forward` takes one input, its second argument being a number with a default."""
    signature = _signature(f) if isinstance(f, nn.Module) else None
    second = [] if signature is None else list(signature.parameters.values())[1:2]
    return any(isinstance(parameter.default, int | float) for parameter in second)


def first_call(f: Cell, z0: State, x: Any) -> None:
    """Call f(z0, x) once, before anything is made of it.

    Raises:
        ValueError: f fails at zeros like x, see `default_start`.
        TypeError: f fails, and is a model without a DEQ rather than a map.
    """
    try:
        with default_start(f, z0, x):
            solve(f, z0, x, solver=Picard(), rtol=0.0, max_nfe=1, throw=False)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if not _second_is_setting(f):
            raise
        raise TypeError(f"{_named(f)} takes one input, forward{_signature(f)}, and {_NO_DEQ}") from error


def takes_several(model: nn.Module | None) -> bool:
    """Whether a model's `forward` takes more than one positional argument; not a `DEQ`, whose second one is its start."""
    signature = None if model is None or isinstance(model, DEQ) else _signature(model)
    if signature is None:
        return False
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return inspect.Parameter.VAR_POSITIONAL in kinds or sum(kind in positional for kind in kinds) > 1


def call_arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The (positional, keyword) arguments that a model is called with, by the signature of its `forward`.

    Where `forward` takes more than one argument, a tuple or list means positional arguments; one with a single entry hands
    that over as it is. A dict means keyword arguments where all its keys are names of such. All else is one argument: a
    tensor, a named tuple, a dict of other keys, and whatever is given to a `forward` of one argument.

    Raises:
        TypeError: `forward` cannot be called so, or takes some keys of a dict and not the others.
    """
    signature = None if isinstance(model, DEQ) else _signature(model)
    if signature is None:
        return (inputs,), {}
    one: tuple[tuple[Any, ...], dict[str, Any]] = ((inputs,), {})
    ways = [one]
    several = takes_several(model)
    if type(inputs) in (tuple, list) and several:
        ways = [(tuple(inputs), {})]
    elif isinstance(inputs, dict) and all(isinstance(name, str) for name in inputs):
        part = several and any(name in signature.parameters for name in inputs)
        ways = [((), inputs)] if part else [((), inputs), one]
    for positional, named in ways:
        try:
            signature.bind(*positional, **named)
        except TypeError as error:
            complaint = error
        else:
            return positional, named
    size = f" of {len(inputs)}" if isinstance(inputs, (tuple, list)) else ""
    size = f" of {', '.join(map(str, inputs))}" if isinstance(inputs, dict) else size
    raise TypeError(
        f"{type(model).__name__}.forward{signature} cannot be called with a {type(inputs).__name__}{size} ({complaint}): "
        "leave out what it does not take, such as labels, or give (inputs,) to hand over the whole as one argument"
    )


def _signature(f: Any) -> inspect.Signature | None:
    """That of a model's `forward`, or of another callable; None where Python cannot tell."""
    try:
        return inspect.signature(f.forward if isinstance(f, nn.Module) else f)
    except (TypeError, ValueError):
        return None


def deqs_in(model: Any) -> dict[str, DEQ]:
    """The DEQs of a model by name, without those inside another one's cell; none where it is no module."""
    if not isinstance(model, nn.Module) or isinstance(model, ModelMap):
        return {}
    found = {name: module for name, module in model.named_modules() if isinstance(module, DEQ)}
    inner = {id(module) for deq in found.values() for module in deq.modules() if module is not deq}
    return {name: deq for name, deq in found.items() if id(deq) not in inner}


def check_start(start: Any) -> None:
    """ValueError for a start in half precision."""
    for leaf in pytree.tree_leaves(start):
        if isinstance(leaf, Tensor) and leaf.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"the solve starts from z0(x) in {leaf.dtype}, and a solver is fitted in float32 or float64: fit it before "
                "the layer or model is taken to half precision (`.float()` takes it back). It then serves in both"
            )


class Inside:
    """What a model hands to the DEQ inside it.

    The model runs on its inputs, in evaluation mode and without gradients, up to the moment it calls its DEQ. What the DEQ
    is called with is the context and, where the model gives one, the start. A model that calls its DEQ more than once is
    taken at its first call.

    Args:
        model: the model; how it is called with its inputs says `call_arguments`.

    Raises:
        ValueError: no DEQ in the model, or several.
    """

    def __init__(self, model: nn.Module) -> None:
        found = deqs_in(model)
        if len(found) != 1:
            raise ValueError(
                f"{type(model).__name__} has {len(found)} DEQs ({', '.join(found)}): give one of them (such as "
                f"model.{next(iter(found), 'deq')}) with the contexts that it is called with"
            )
        (self.name, self.deq), self.model = *found.items(), model
        self._last: tuple[Any, State | None] = (None, None)  # a context, and the start that the model gave with it

    def context(self, inputs: Any) -> Any:
        """The context that the DEQ is called with for these inputs."""
        self._last = self._call(inputs)
        return self._last[0]

    def start(self, context: Any) -> State:
        """The start that the DEQ is called with, for a context that `context` has just made."""
        made, z0 = self._last
        leaves = pytree.tree_leaves(made), pytree.tree_leaves(context)
        same = len(leaves[0]) == len(leaves[1]) and all(one is other for one, other in zip(*leaves, strict=True))
        return z0 if same and z0 is not None else initial_state(self.deq.cell, context)

    def _call(self, inputs: Any) -> tuple[Any, State | None]:
        try:  # what forward and states, and those of subclasses, come to
            (x, z0, _), _ = run_until(self.deq, "_equilibrium", self.model, bare(inputs), f"DEQ ({self.name})")
        except (TypeError, AttributeError) as error:
            more = "; of a list of batches give iter(batches)" if isinstance(inputs, list) else ""
            raise TypeError(
                f"{type(self.model).__name__} holds a DEQ ({self.name}), so that it is taken for a model and called with x: "
                f"{error}. For a map f(z, x) with a DEQ inside give `lambda z, x: f(z, x)`{more}"
            ) from error
        return x, z0


class _Called(BaseException):
    """The way out of a model. No Exception: those a model may catch."""


def _leave(*arguments: Any, **options: Any) -> Any:
    raise _Called(arguments, options)


def run_until(deq: nn.Module, name: str, model: nn.Module, inputs: Any, known_as: str) -> Any:
    """(arguments, keywords) of the first call of `deq.name` where the model runs on these inputs, in evaluation mode.

    ValueError where it is not called; TypeError where the model cannot be called with them.
    """
    positional, named = call_arguments(model, inputs)
    attributes = deq.__dict__  # where an entry hides a method or a module of that name
    usual = {name: attributes[name]} if name in attributes else {}
    attributes[name] = opaque(_leave)
    try:
        with torch.inference_mode(False), torch.no_grad(), resting(model):
            model(*positional, **named)
    except _Called as called:
        return called.args
    finally:
        del attributes[name]
        attributes.update(usual)
    raise ValueError(f"{type(model).__name__} did not call its {known_as} when run on x in evaluation mode")


@contextmanager
def resting(module: nn.Module | None) -> Iterator[None]:
    """While it lasts the module, if any, is in evaluation mode."""
    busy = [] if module is None else [part for part in module.modules() if part.training]
    if module is not None:
        module.eval()
    try:
        yield
    finally:
        for part in busy:
            part.training = True


@contextmanager
def frozen(f: Any) -> Iterator[None]:
    """While it lasts, the parameters of f (where it is a module) do not require gradients."""
    module = module_of(f)
    parameters = [] if module is None else [p for p in module.parameters() if p.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
