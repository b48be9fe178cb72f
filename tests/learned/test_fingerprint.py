"""A solver knows the weights that it was fitted to, whatever they are called and however they are held."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch

import metabroyden as mb
from metabroyden.learned.fingerprint import ClosureWatch, fingerprint, modules_behind, named_fingerprint, same_weights


class Cell(torch.nn.Module):
    layout = "vector"

    def __init__(self, width: int = 6):
        super().__init__()
        self.linear = torch.nn.Linear(width, width)
        self.norm = torch.nn.BatchNorm1d(width)  # with buffers, an integer among them

    def forward(self, z, x):
        return torch.tanh(0.5 * self.linear(z) + x)


class Outer(torch.nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.a, self.b = cell, cell

    def forward(self, z, x):
        return self.a(z, x)


def moved(cell, by: float = 1e-3):
    other = copy.deepcopy(cell)
    other.linear.weight.data[0, 0] += by
    return other


def told(f, cell) -> bool:
    """Whether a DEQ of f warns of a solver that was fitted to the cell."""
    solver, dtype = mb.load_solver("universal"), next(f.parameters()).dtype
    solver.fingerprint = fingerprint(cell)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mb.DEQ(f, solver=solver.to(dtype))(torch.randn(3, 6, dtype=dtype))
    return any("fitted to other weights" in str(one.message) for one in said)


@pytest.mark.parametrize("change", [Outer, copy.deepcopy, lambda cell: copy.deepcopy(cell).double()])
def test_the_same_weights_under_another_name_or_in_float64_are_the_same(change):
    cell = Cell()
    other = change(cell)
    assert same_weights(fingerprint(cell), other)
    assert same_weights(fingerprint(other), cell)
    assert not told(other.eval(), cell)
    assert told(moved(cell).eval(), cell)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_weights_rounded_to_half_precision_are_the_same_and_others_are_not(half):
    for cell in (Cell(), Cell().double()):
        rounded, other = copy.deepcopy(cell).to(half), moved(cell, 0.1)
        assert same_weights(fingerprint(cell), rounded)
        assert same_weights(fingerprint(rounded), cell)
        assert same_weights(fingerprint(rounded), copy.deepcopy(rounded).float())
        assert not same_weights(fingerprint(cell), other.to(half))
        assert not same_weights(fingerprint(rounded), other)


def test_a_change_that_half_precision_does_not_see_is_seen_in_single_and_buffers_count_too():
    cell = Cell()
    assert not same_weights(fingerprint(cell), moved(cell, 1e-6))
    for name in ("running_mean", "num_batches_tracked"):
        other = copy.deepcopy(cell)
        getattr(other.norm, name).add_(1)
        assert not same_weights(fingerprint(cell), other)


def test_a_fingerprint_of_an_earlier_version_is_compared_as_it_was_made():
    cell = Cell()
    old = named_fingerprint(cell)
    assert len(old) == 16
    assert same_weights(old, copy.deepcopy(cell))
    assert same_weights(old, copy.deepcopy(cell).double())
    assert not same_weights(old, moved(cell))


def test_the_fingerprints_in_the_repository_are_known_still():
    """By the rule of earlier versions: names, shapes, dtypes and bytes."""
    cell = torch.nn.Linear(2, 1)
    cell.weight.data, cell.bias.data = torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])
    assert same_weights("9e5e7fa027254811", cell)


def test_what_is_no_module_has_no_fingerprint_and_is_never_warned_of():
    assert fingerprint(torch.cos) is None
    assert same_weights(fingerprint(Cell()), torch.cos)


class Graph(torch.nn.Module):
    """A cell with a sparse adjacency among its buffers, and a state of its own that is no tensor."""

    def __init__(self, edge: float = 0.1):
        super().__init__()
        self.register_buffer("adjacency", torch.diag(torch.full((5,), edge), 1).to_sparse())
        self.register_buffer("rows", torch.diag(torch.full((5,), edge), 1).to_sparse_csr())

    def get_extra_state(self):
        return {"version": 1, "scale": torch.ones(2)}

    def set_extra_state(self, state):
        pass

    def forward(self, z, x):
        return torch.tanh((self.adjacency @ z.T).T + x)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_module_with_sparse_buffers_and_a_state_of_its_own_has_a_fingerprint():
    wanted = fingerprint(Graph())
    assert same_weights(wanted, Graph())
    assert not same_weights(wanted, Graph(edge=0.2))
    assert named_fingerprint(Graph()) == named_fingerprint(Graph()) != named_fingerprint(Graph(edge=0.2))
    solver = mb.fit_solver(Graph(), torch.randn(30, 6), steps=2, progress=False, fallback=False)
    assert solver.fingerprint == wanted


def test_a_layer_made_in_inference_mode_takes_a_fitted_solver():
    solver = mb.load_solver("universal")
    solver.fingerprint = fingerprint(Cell())
    with torch.inference_mode():
        layer = mb.DEQ(Cell(), solver=solver).eval()
        with pytest.warns(UserWarning, match="fitted to other weights"):
            assert layer(torch.randn(3, 6)).isfinite().all()


# --- the module behind a closure

GLOBAL = Cell()


class Plain:
    """An object that is no module and holds one."""

    def __init__(self, cell):
        self.cell = cell

    def __call__(self, z):
        return self.cell(z, 0)

    def step(self, z):
        return self.cell(z, 0)


CLOSURES = {
    "a lambda": lambda cell: lambda z: cell(z, 0),
    "a lambda in a lambda": lambda cell: (lambda f: lambda z: f(z))(lambda z: cell(z, 0)),
    "a default": lambda cell: lambda z, f=cell: f(z, 0),
    "a partial": lambda cell: functools.partial(cell, x=0),
    "a module's method": lambda cell: cell.forward,
    "an object": Plain,
    "an object's method": lambda cell: Plain(cell).step,
    "a part of what is held": lambda cell: (lambda model: lambda z: model[0](z, 0))(
        torch.nn.Sequential(cell, torch.nn.Linear(3, 2))
    ),
}


def said(watch, solver, f) -> bool:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        watch.check(solver, f)
    return any("fitted to other weights" in str(one.message) for one in found)


def fitted_to(cell):
    solver = mb.load_solver("universal")
    solver.fingerprint = fingerprint(cell)
    return solver


@pytest.mark.parametrize("form", CLOSURES)
def test_weights_that_move_behind_a_closure_are_seen_once(form):
    cell, watch = Cell(), ClosureWatch()
    solver, make = fitted_to(cell), CLOSURES[form]
    assert list(modules_behind(make(cell)))
    assert not said(watch, solver, make(cell))
    with torch.no_grad():
        cell.linear.weight.add_(1e-3)
    assert said(watch, solver, make(cell))
    assert not said(watch, solver, make(cell)), "said once"
    assert said(ClosureWatch(), solver, make(moved(cell))), "another module of these shapes"


def test_a_module_of_a_global_name_is_found():
    assert list(modules_behind(lambda z: GLOBAL(z, 0))) == [GLOBAL]


def test_there_is_no_false_alarm_where_the_fitted_module_cannot_be_told():
    cell, layer = Cell(), torch.nn.Linear(6, 6)
    whole = torch.nn.Sequential(cell, torch.nn.Linear(6, 2))
    pair = [torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)]
    for fitted, f in (
        (whole, lambda z: cell(z, 0)),  # a part of what it was fitted to
        (layer, torch.cos),  # nothing behind it
        (layer, lambda z: pair[0](pair[1](z))),  # two of these shapes, neither of which it was fitted to
        (layer, lambda z: pair),
    ):
        assert not said(ClosureWatch(), fitted_to(fitted), f)
    old = fitted_to(cell)
    old.fingerprint = old.fingerprint.rsplit("-", 1)[0]  # a file of an earlier version, without shapes
    assert not said(ClosureWatch(), old, lambda z: moved(cell)(z, 0))
    assert same_weights(old.fingerprint, cell)
    assert not same_weights(old.fingerprint, moved(cell))


def test_of_several_modules_of_these_shapes_the_one_that_fits_is_watched():
    model, watch = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)), ClosureWatch()
    solver, f = fitted_to(model[1]), lambda z: model(z)
    assert not said(watch, solver, f)
    with torch.no_grad():
        model[0].weight.add_(1)
        assert not said(watch, solver, f)
        model[1].weight.add_(1)
    assert said(watch, solver, f)
