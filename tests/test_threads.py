"""One layer in several threads: each evaluates its own map, and gets its own gradients."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import metabroyden as mb
from metabroyden.gradients.view import seen_with
from metabroyden.nn import held_masks


class Cell(nn.Module):
    def __init__(self, n: int = 6, p: float = 0.0) -> None:
        super().__init__()
        self.map = nn.Linear(n, n)
        self.drop = mb.VariationalDropout(p, (n,))
        nn.init.orthogonal_(self.map.weight, gain=0.6)
        self.double()

    def forward(self, z, x):
        return self.drop(torch.tanh(self.map(z) + x))


CELLS = {
    "plain": Cell,
    "normalised": lambda: mb.normalise(Cell(), "weight"),
    "spectral": lambda: mb.normalise(Cell(), "spectral"),
    "dropout": lambda: Cell(p=0.3),
}


def together(*jobs: Callable[[], None]) -> None:
    """Run these at the same time; the first error of any is raised."""
    errors: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def beside(again: Callable[[], None], job: Callable[[], None]) -> None:
    """Run the job while the other one is run again and again in another thread."""
    over = threading.Event()

    def repeat() -> None:
        while not over.is_set():
            again()

    def once() -> None:
        try:
            job()
        finally:
            over.set()

    together(repeat, once)


@pytest.mark.parametrize("kind", CELLS)
def test_two_threads_may_train_one_layer(kind):
    deq = mb.DEQ(CELLS[kind](), warn=False)

    def gradient(rows: int) -> list[torch.Tensor]:
        x = torch.linspace(-1, 1, rows * 6, dtype=torch.float64).reshape(rows, 6)
        return torch.autograd.grad(deq(x).sum(), list(deq.parameters()))

    def work(rows: int) -> None:
        for _ in range(10):
            found = gradient(rows)
            if kind in ("plain", "normalised"):
                assert_close(found, want[rows])
            assert all(bool(part.isfinite().all()) and float(part.abs().sum()) > 0 for part in found)

    want = {rows: gradient(rows) for rows in (5, 7)}
    together(lambda: work(5), lambda: work(7))


@pytest.mark.parametrize("kind", CELLS)
def test_a_thread_that_evaluates_takes_no_gradients_from_one_that_trains(kind):
    deq, x = mb.DEQ(CELLS[kind](), warn=False), torch.randn(5, 6, dtype=torch.float64)

    def evaluate() -> None:
        with torch.no_grad():
            assert not deq(x[:3]).requires_grad

    def train() -> None:
        for _ in range(15):
            deq.zero_grad(set_to_none=True)
            deq(x).sum().backward()
            assert all(p.grad is not None for p in deq.parameters())

    beside(evaluate, train)


@pytest.mark.parametrize("kind", ["plain", "normalised", "dropout"])
def test_double_backward_in_one_thread_leaves_plain_ones_in_another_alone(kind):
    deq, x = mb.DEQ(CELLS[kind](), rtol=1e-8, backward=mb.Implicit(rtol=1e-8), warn=False), torch.randn(5, 6).double()
    weights = list(deq.parameters())

    def plain() -> None:
        for part in torch.autograd.grad(deq(x).sum(), weights):
            assert part.is_leaf
            assert float(part.abs().sum()) > 0

    def double() -> None:
        for _ in range(5):
            first = torch.autograd.grad(deq(x).pow(2).sum(), weights, create_graph=True)
            torch.autograd.grad(sum(part.square().sum() for part in first), weights)

    beside(plain, double)
    assert all(a is b for a, b in zip(deq.parameters(), weights, strict=True))


def test_each_thread_draws_and_holds_masks_of_its_own():
    layer = mb.VariationalDropout(0.5, (1000,))
    meet, masks = threading.Barrier(2), {}

    def draw(name: str) -> None:
        with held_masks(layer, 1):
            meet.wait()
            masks[name] = layer.mask
            assert torch.equal(layer(torch.ones(1, 1000)) > 0, masks[name])
            meet.wait()
        assert layer.mask is None

    together(lambda: draw("a"), lambda: draw("b"))
    assert not torch.equal(masks["a"], masks["b"])


# --- a module seen with other tensors


class Counting(nn.Module):
    """Counts its calls, and reaches its parts by every way there is."""

    instances: int = 0

    def __init_subclass__(cls, **options) -> None:
        super().__init_subclass__(**options)
        Counting.instances += 1

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3, bias=False)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.inner.weight
        self.again = self.inner
        self.recurrent = nn.GRU(3, 3, batch_first=True)
        self.register_buffer("shift", torch.ones(3))
        self.listed, self.method = [self.inner], self._affine
        self.calls = 0

    def _affine(self, x):
        return self.listed[0](x) + self.shift

    def forward(self, x):
        self.calls += 1
        assert isinstance(self, Counting)
        return self.method(x) + self.tied(x) + self.again(x) + self.recurrent(x[:, None])[0][:, 0]


def held(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def test_a_view_sees_other_tensors_and_its_module_keeps_its_own():
    module, x = Counting(), torch.randn(2, 3)
    others = {id(tensor): torch.randn_like(tensor) for tensor in held(module)}
    before, want, subclasses, seen = module(x), copy.deepcopy(module), Counting.instances, []
    with torch.no_grad():
        for tensor, other in zip(held(want), others.values(), strict=True):
            tensor.copy_(other)
    view = seen_with(
        module,
        {
            (id(owner), name): others[id(tensor)]
            for owner in module.modules()
            for table in (owner._parameters, owner._buffers)
            for name, tensor in table.items()
            if tensor is not None
        },
    )
    handle = view.inner.register_forward_hook(lambda *_: seen.append(1))
    assert_close(view(x), want(x))
    handle.remove()
    assert len(seen) == 2
    assert Counting.instances == subclasses
    assert (type(view).__name__, module.calls) == ("Counting", 2)
    assert view.inner is view.again
    assert [id(p) for p in held(view)] == [id(other) for other in others.values()]
    assert torch.equal(module(x), before)
    for copied in (copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        assert type(copied) is Counting
        assert torch.equal(copied(x), before)


def test_a_view_evaluates_what_was_compiled_or_scripted():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.compiled = torch.compile(nn.Linear(2, 2, bias=False), backend="eager")
            self.also = nn.Linear(2, 2, bias=False)
            self.also.compile(backend="eager")

        def forward(self, x):
            return self.compiled(x), self.also(x)

    net, x, w = Net(), torch.randn(3, 2), torch.randn(2, 2)
    view = seen_with(net, {(id(net.compiled._orig_mod), "weight"): w, (id(net.also), "weight"): w})
    assert_close(view(x), (x @ w.T, x @ w.T))
