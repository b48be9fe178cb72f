"""The one place where learn2learn is imported."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from typing import Any

import torch

_MISSING_OPERATOR = re.compile(r"operator torchvision::(\w+) does not exist")
_declared: list[torch.library.Library] = []  # a library that is collected takes its definitions along


def load() -> Any:
    """The learn2learn package; ImportError that says what to do where it is missing or does not load.

    learn2learn imports torchvision, whose registry build for CUDA does not load its operators beside a CPU-only torch
    ("operator torchvision::nms does not exist"). Nothing here calls them: declaring those it asks for is enough.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _import()
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            "learn2learn is needed here and could not be imported: install it with a C compiler present, "
            "pip install learn2learn==0.2.0 --config-settings='--build-option=build_ext' "
            f"({type(error).__name__}: {error})"
        ) from error


def _import() -> Any:
    while True:
        try:
            return importlib.import_module("learn2learn")
        except RuntimeError as error:
            missing = _MISSING_OPERATOR.search(str(error))
            if missing is None:
                raise
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{missing[1]}(Tensor unused) -> Tensor")  # RuntimeError if declared before: no endless loop
            _declared.append(library)
            for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "learn2learn")]:
                del sys.modules[name]
