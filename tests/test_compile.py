"""Within what `torch.compile` compiles a solve is left as it is; `torch.export` is told why not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import metabroyden as mb
from tests.helpers import refused

# torch looks at what goes into the second graph, the layer's value
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)
        self.drop = mb.VariationalDropout(0.3, (4,))

    def forward(self, z, x):
        return torch.tanh(0.5 * self.drop(self.map(z)) + x)


class Model(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.inject, self.deq, self.head = nn.Linear(3, 4), mb.DEQ(cell, warn=False), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.relu(self.deq(self.inject(x).sin())))


@pytest.fixture
def graphs():
    """The graphs that are compiled while a test lasts, by a backend that runs them as they are."""
    torch._dynamo.reset()
    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        seen.append(graph)
        return graph

    yield seen, backend
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["plain", "normalised"])
def test_a_model_with_a_deq_compiles_to_what_comes_before_and_after_it(kind, graphs):
    seen, backend = graphs
    cell = Cell() if kind == "plain" else mb.normalise(Cell(), "weight")
    model, x = Model(cell), torch.randn(5, 3)
    compiled = torch.compile(model, backend=backend)
    found = []
    for run in (model, compiled, compiled):
        torch.manual_seed(1)
        value = run(x)
        found.append((value, *torch.autograd.grad(value.square().sum(), list(model.parameters()))))
    assert len(seen) == 2
    for ours in found[1:]:
        assert_close(ours, found[0])
    assert model.deq.last_solution.converged.all()


def test_a_solve_within_a_compiled_function_is_left_as_it_is(graphs):
    seen, backend = graphs

    def f(x):
        y = 2 * x
        return mb.solve(lambda z, c: torch.tanh(0.5 * z + c), torch.zeros_like(y), y, solver=mb.Anderson()).z + 1

    x = torch.randn(3, 4)
    compiled = torch.compile(f, backend=backend)
    assert_close(compiled(x), f(x))
    compiled(2 * x)
    assert len(seen) == 2


def test_one_graph_with_a_solve_in_it_is_refused_and_the_way_out_named(graphs):
    _, backend = graphs
    with pytest.raises(torch._dynamo.exc.Unsupported, match="FixedBudget"):
        torch.compile(Model(Cell()), backend=backend, fullgraph=True)(torch.randn(5, 3))


def test_export_of_a_model_with_a_deq_says_why_not():
    export = lambda: torch.export.export(Model(Cell()).eval(), (torch.randn(5, 3),), strict=False)  # noqa: E731
    refused(r"torch\.export cannot take DEQ.*mb\.FixedBudget", export, RuntimeError)


def test_a_compiled_cell_drops_what_the_layer_holds(graphs):
    _, backend = graphs
    cell = Cell()
    deq = mb.DEQ(torch.compile(cell, backend=backend), rtol=1e-5)
    z = deq(torch.randn(5, 4))
    assert deq.last_solution.converged.all()
    z.sum().backward()
    assert cell.map.weight.grad is not None
