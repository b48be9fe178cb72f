"""A module with other tensors in the place of its own: `torch.func.functional_call` without writing to the module.

`functional_call` puts the tensors into the module during the call, where other threads would read them.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

Tables = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
_CACHE = "_metabroyden_view"  # in a class: the class of its views


def seen_with(module: nn.Module, values: Mapping[tuple[int, str], Tensor]) -> nn.Module:
    """A view of a module, with these tensors in the place of its parameters and buffers.

    `values` has them by the id of the module that holds one and its name there. Plain attributes are the module's own,
    written to as well as read. Modules that stand in several places have one view. TorchScript modules are left as they
    are, and those that `torch.compile` made are seen as they were before.
    """
    return _seen(module, values, {})


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` runs a module."""
    return _is_optimized(module) or getattr(module, "_compiled_call_impl", None) is not None


def _is_optimized(module: Any) -> bool:
    # importing the compiler takes seconds; a compiled module has imported it
    return "torch._dynamo" in sys.modules and isinstance(module, torch._dynamo.OptimizedModule)


def _seen(module: nn.Module, values: Mapping[tuple[int, str], Tensor], views: dict[int, nn.Module]) -> nn.Module:
    if id(module) in views:
        return views[id(module)]
    if isinstance(module, torch.jit.ScriptModule):
        return module
    if _is_optimized(module):
        inner: Any = module._orig_mod
        return _seen(inner, values, views)
    view: Any = object.__new__(_view_class(type(module)))
    origin = _kept(module)[0] if isinstance(module, _View) else module  # a view of a view
    views[id(module)] = views[id(origin)] = view
    object.__setattr__(view, "__dict__", module.__dict__)
    own = [
        {name: values.get((id(module), name), tensor) for name, tensor in table.items()}
        for table in (module._parameters, module._buffers)
    ]
    children = {name: None if child is None else _seen(child, values, views) for name, child in module._modules.items()}
    vars(type(view))["_kept"].__set__(view, (origin, views, (*own, children)))
    return view


class _View:
    """Mixin of a view's class: tables of its own hide those of the module."""

    __slots__ = ()

    def __init_subclass__(cls, **options: Any) -> None:
        pass  # the module's own `__init_subclass__` must not see classes of views

    def __getattribute__(self, name: str) -> Any:
        if name in _NUMBER:
            return _kept(self)[2][_NUMBER[name]]
        if name == "_compiled_call_impl":  # would run the module itself
            return None
        if name == "_flat_weights" and isinstance(self, nn.RNNBase):
            return [getattr(self, each) for each in self._flat_weights_names]
        value = super().__getattribute__(name)
        return value if name.startswith("__") else _moved(value, _kept(self)[1])

    def __getattr__(self, name: str) -> Any:
        for table in _kept(self)[2]:
            if name in table:
                return table[name]
        return _moved(super().__getattr__(name), _kept(self)[1])  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        for table in _kept(self)[2]:
            if name in table:
                table[name] = value
                return
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _itself, (_kept(self)[0],)  # copies are of the module


def _itself(module: nn.Module) -> nn.Module:
    return module


def _kept(view: Any) -> tuple[nn.Module, dict[int, nn.Module], Tables]:
    """The module that a view is of, all the views by the ids of their modules, and the view's tables."""
    return vars(type(view))["_kept"].__get__(view)


_NUMBER = {"_parameters": 0, "_buffers": 1, "_modules": 2}


def _view_class(cls: type) -> type:
    """The class of the views of a class: made once, kept in the class."""
    made = cls if issubclass(cls, _View) else vars(cls).get(_CACHE)
    if made is None:
        names = {"__slots__": ("_kept",), "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        made = type(cls)(cls.__name__, (_View, cls), names)
        setattr(cls, _CACHE, made)
    return made


def _moved(value: Any, views: dict[int, nn.Module]) -> Any:
    """A plain attribute as a view shows it: modules of the tree, their methods, lists and dicts of these are the views'."""
    if isinstance(value, nn.Module):
        return views.get(id(value), value)
    if isinstance(value, MethodType) and id(value.__self__) in views:
        return MethodType(value.__func__, views[id(value.__self__)])
    if type(value) in (list, tuple) and any(_owner(item) in views for item in value):
        return type(value)(_moved(item, views) for item in value)
    if type(value) in (dict, OrderedDict) and any(_owner(item) in views for item in value.values()):
        return type(value)((key, _moved(item, views)) for key, item in value.items())
    return value


def _owner(item: Any) -> int:
    """The id of what an item is, or is a method of."""
    return id(item.__self__ if isinstance(item, MethodType) else item)
