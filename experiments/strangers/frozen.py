"""The trained strangers as someone would bring them: a map f, contexts to fit a solver to, contexts to measure it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from experiments.bench.runner import Row
from experiments.strangers.data import load_data
from experiments.strangers.model import Model, build
from experiments.strangers.suite import Spec, spec_of, split_of
from experiments.strangers.train import MODELS, path_of, take
from metabroyden import checkpoint
from metabroyden.checkpoint import load_weights
from metabroyden.comparison.problems import HeldOut
from metabroyden.nn.pin import pin

OTHER = 1000
"""Added to a stranger's seed, for other weights of the same shapes."""


@dataclass(frozen=True)
class Stranger:
    """A trained DEQ, frozen.

    Attributes:
        spec: how it was made.
        model: stem, DEQ and head, in evaluation mode.
        x_train: contexts of training samples, for `fit_solver`.
        x_test: contexts of 256 test samples.
        facts: its task's score, evaluations of classical solvers, seconds of training.
    """

    spec: Spec
    model: Model
    x_train: Any
    x_test: Any
    facts: Row

    @property
    def part(self) -> str:
        """The half of the suite that it belongs to."""
        return split_of(self.spec.name)

    @property
    def f(self) -> Any:
        """The cell: z⁺ = f(z, x)."""
        return self.model.deq.cell

    @property
    def z0(self) -> Callable[[Any], Any] | None:
        """x → start, for `fit_solver` and `compare`; None where theirs will do."""
        return getattr(self.f, "start", None)

    def starts(self, x: Any) -> Any:
        """Starts for contexts."""
        own: Any = self.z0 or getattr(self.f, "initial_state", torch.zeros_like)
        return own(x)

    def held(self, count: int, f: Any = None, x: Any = None) -> HeldOut:
        """The first test problems; of another map, or other contexts, where they are given."""
        x = take(self.x_test if x is None else x, slice(count))
        z0 = self.starts(x)
        f, x = pin(self.f if f is None else f, x, z0)
        return HeldOut(f, z0, x, name=self.spec.name)

    def other(self) -> Any:
        """An untrained cell of the same shape: another f for a solver that was fitted to this one."""
        made = build(self.spec, load_data(self.spec.data), self.spec.seed + OTHER)
        return made.eval().requires_grad_(False).deq.cell

    def scaled(self, factor: float) -> Any:
        """x_test with its injection scaled; of a dict the entry "x", so that masks and graphs stay as they are."""
        if isinstance(self.x_test, dict):
            return {**self.x_test, "x": factor * self.x_test["x"]}
        return pytree.tree_map(lambda part: factor * part, self.x_test)


@torch.no_grad()
def load(name: str, models: Path = MODELS) -> Stranger:
    """A frozen stranger with its contexts, the same at every call.

    Args:
        name: see `experiments.strangers.suite.names`.
        models: the folder of the frozen models.

    Raises:
        ValueError: no stranger of that name.
        FileNotFoundError: it was not trained, with the command that does; or its images are not installed.
        ImportError: the package that its data come with is not installed.
    """
    spec, path = spec_of(name), path_of(name, models)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: train it with `python -m experiments strangers --train`")
    tensors, header = checkpoint.read(path, "stranger")
    data = load_data(spec.data)
    model = build(spec, data)
    load_weights(model, tensors, path)
    model.eval().requires_grad_(False)
    x_train, x_test = (
        model.inject(take(part, slice(most))) for part, most in ((data.train, spec.contexts), (data.test, 256))
    )
    return Stranger(spec, model, x_train, x_test, header["facts"])
