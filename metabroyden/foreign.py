"""Packages of others, by name: missing ones say what to install, those of torchvision go beside any build of torch."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

import torch

_MISSING_OPERATOR = re.compile(r"operator torchvision::(\w+) does not exist")
_declared: list[torch.library.Library] = []  # a library that is collected takes its definitions along


def load(package: str) -> Any:
    """Import torchvision, or a package that imports it, beside any build of torch.

    torchvision's registry build for CUDA does not load its operators beside a CPU-only torch ("operator torchvision::nms
    does not exist"). Where nothing calls them, declaring those it asks for is enough.
    """
    while True:
        try:
            return importlib.import_module(package)
        except RuntimeError as error:
            missing = _MISSING_OPERATOR.search(str(error))
            if missing is None:
                raise
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{missing[1]}(Tensor unused) -> Tensor")  # RuntimeError if declared before: no endless loop
            _declared.append(library)
            for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", package)]:
                del sys.modules[name]


def required(name: str, install: str) -> Any:
    """`load` of a package, or of a module in it; ImportError that says what to install where it is missing."""
    try:
        return load(name)
    except ImportError as error:
        package = name.split(".")[0]
        words = f"this needs {package}, which could not be imported: pip install {install} ({error})"
        raise ImportError(words) from error
