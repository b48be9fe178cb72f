"""How often a solve waits for its device, counted where there is none: every way from a tensor to the host is watched."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import metabroyden as mb
from metabroyden.fixed import FixedProblem
from metabroyden.learned.layout import Layout
from tests.helpers import normal, perturbed

SHAPE, BATCH = (4, 6, 6), 8
MODULES = {id(module): module for name, module in sys.modules.items() if name.startswith("metabroyden.")}.values()
"""Those that are imported here, each once: other tests import the package once more, and modules have old names."""
READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__",
         "nonzero", "argwhere", "masked_select", "unique", "equal", "allclose", "is_nonzero"}  # fmt: skip
"""Functions and methods that hand the host a value, or whose result has a shape that depends on values."""
CHECKED = {"linalg_solve", "linalg_inv", "linalg_cholesky", "linalg_eigh", "linalg_svd", "linalg_lstsq", "linalg_pinv"}
"""Those of linear algebra that look on the host whether they succeeded."""


class Waits(TorchFunctionMode):
    """Counts looks at the device by `to_host`, arrays sent there by `to_device`, and all other ways, by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.looks, self.sent, self.inside = 0, 0, False
        self.strays: Counter[str] = Counter()
        for module in MODULES:
            for name, own in (("to_host", self.look), ("to_device", self.send)):
                if name in vars(module):
                    monkeypatch.setattr(module, name, own(vars(module)[name]))

    def look(self, original: Any) -> Any:
        """`to_host`, counted; what is done within is no stray."""

        def counted(tensors: list[Tensor]) -> Any:
            self.looks, self.inside = self.looks + 1, True
            try:
                return original(tensors)
            finally:
                self.inside = False

        return counted

    def send(self, original: Any) -> Any:
        """`to_device`, counted."""

        def counted(*arguments: Any) -> Any:
            self.sent += 1
            return original(*arguments)

        return counted

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        by_mask = name in ("__getitem__", "__setitem__") and any(
            isinstance(part, Tensor) and part.dtype == torch.bool
            for part in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        if not self.inside and (name in READS | CHECKED or by_mask or (name == "where" and len(args) == 1)):
            self.strays[name] += 1
        return function(*args, **(kwargs or {}))


def rates(batch: int = BATCH) -> Tensor:
    """Contractions of different strength, so that samples end at different times."""
    return torch.linspace(0.5, 0.95, batch).view(-1, 1, 1, 1)


def f(z, x):
    return x[1] * torch.tanh(z.roll(1, 2)) + x[0]


def solved(solver, *, rtol, max_nfe, **options):
    x = normal(BATCH, *SHAPE), rates()
    return mb.solve(f, torch.zeros(BATCH, *SHAPE), x, solver=solver, rtol=rtol, max_nfe=max_nfe, throw=False, **options)


def learned(name, **options):
    return perturbed(mb.get_solver(name, layout=Layout("image", SHAPE), hidden=4, **options), 0.01).eval()


SOLVERS = {
    "picard": lambda: mb.Picard(), "anderson": lambda: mb.Anderson(), "broyden": lambda: mb.Broyden(),
    "meta-broyden": lambda: learned("meta-broyden", rank=4, learned_steps=6), "grouped": lambda: learned("grouped"),
    "universal": lambda: mb.load_solver("universal"),
}  # fmt: skip


@pytest.mark.parametrize("check_every", [1, 4])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_solve_looks_at_its_device_once_a_check_and_nowhere_else(name, check_every, monkeypatch):
    solver = SOLVERS[name]()
    with Waits(monkeypatch) as waits:
        found = solved(solver, rtol=1e-4, max_nfe=24, check_every=check_every)
    rounds = int(found.nfe.max())
    assert found.converged.any(), "samples that stop are a part of it"
    assert 0 < waits.looks <= -(-rounds // check_every) + 2
    assert sum(waits.strays.values()) <= 12, waits.strays  # at the start: is z0 finite, does f change what it is given
    # rows that go on, and those whose iterate is the best so far
    assert waits.sent <= 3 * waits.looks


@pytest.mark.parametrize("name", SOLVERS)
def test_more_evaluations_are_no_more_than_so_many_looks(name, monkeypatch):
    solver, found = SOLVERS[name](), {}
    for max_nfe in (6, 12):
        with monkeypatch.context() as patch, Waits(patch) as waits:
            solved(solver, rtol=0.0, max_nfe=max_nfe)
        found[max_nfe] = waits
    assert found[12].looks - found[6].looks <= 6
    assert found[12].strays == found[6].strays, "a step waits nowhere beside the look"


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "universal"])
def test_a_fixed_budget_waits_for_nothing(name, monkeypatch):
    def as_on_a_device(self, *arguments):
        begin(self, *arguments)
        self._readable = False  # on a CPU it looks, which costs nothing there

    begin = FixedProblem.__init__
    monkeypatch.setattr(FixedProblem, "__init__", as_on_a_device)
    run = mb.FixedBudget(f, SOLVERS[name](), max_nfe=12, compiled=False)
    x = normal(BATCH, *SHAPE), rates()
    with Waits(monkeypatch) as waits:
        found = run(torch.zeros(BATCH, *SHAPE), x)
    assert found.nfe.tolist() == [12] * BATCH
    assert (waits.looks, waits.sent) == (0, 0)
    assert waits.strays.pop("cpu") == 1, "the status, at the end"
    assert sum(waits.strays.values()) <= 12, waits.strays  # at the start, see above; not with compiled=True


def test_what_waits_is_seen(monkeypatch):
    with Waits(monkeypatch) as waits:
        tensor = torch.arange(3.0)
        assert tensor[tensor > 1].tolist() == [2.0]
        assert bool(tensor.any())
        torch.linalg.solve(torch.eye(3), tensor)
    assert waits.strays == {"__getitem__": 1, "tolist": 1, "__bool__": 1, "linalg_solve": 1}
