"""Padded tokens and graphs: padding counts in no norm and changes nothing; each graph stops on its own, in any order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import metabroyden as mb
from metabroyden.learned.layout import Layout
from metabroyden.learned.mixer import Mixer
from metabroyden.learned.preconditioner import Preconditioner
from metabroyden.learned.wiring import wiring_of
from metabroyden.meta.fit import make_learned
from metabroyden.zoo.data.graphs import NodeTask, chains, karate, renumbered, trees
from metabroyden.zoo.models.graph import GraphCell, GraphClassifier
from tests.helpers import DOUBLE, normal, perturbed, refused

LEARNED = mb.list_solvers(learned=True, splitting=False, adjoint=False)
W = 0.6 * torch.linalg.qr(normal(4, 4, dtype=DOUBLE)).Q


def by_mean(z, x):
    """A map of padded tokens that looks at real ones only; what it says of padding is not a number."""
    there = x.mask.unsqueeze(2)
    mean = (z * there).sum(1, keepdim=True) / there.sum(1, keepdim=True)
    return torch.where(there, torch.tanh(z @ W + 0.3 * mean + x.x), torch.nan)


def lengths(*each: int, most: int) -> torch.Tensor:
    return torch.arange(most) < torch.tensor(each)[:, None]


def tokens(most: int = 6) -> mb.Padded:
    """Three samples of 6, 4 and 2 tokens, with something in the padding."""
    mask = lengths(6, 4, 2, most=most)
    x = torch.full((3, most, 4), 9.0, dtype=DOUBLE)
    x[:, :6] = torch.where(mask[:, :6, None], normal(3, 6, 4, seed=1, dtype=DOUBLE), 9.0)
    return mb.Padded(x, mask)


def graphs() -> NodeTask:
    return trees(5, 0, sizes=(3, 30))


CELL = GraphCell(4, bound=0.9).requires_grad_(False)


# --- padding


@pytest.mark.parametrize("solver", [mb.Picard(), mb.Anderson(), mb.Broyden()])
def test_padding_is_zero_and_costs_nothing(solver):
    x = tokens()
    options = {"solver": solver, "rtol": 1e-4, "max_nfe": 60}
    whole = mb.solve(by_mean, torch.zeros_like(x.x), x, **options)
    assert whole.z[~x.mask].eq(0).all()
    assert torch.isfinite(whole.residual).all()
    for sample, size in enumerate((6, 4, 2)):
        alone = mb.Padded(x.x[sample : sample + 1, :size], torch.ones(1, size, dtype=torch.bool))
        one = mb.solve(by_mean, torch.zeros_like(alone.x), alone, **options)
        assert one.nfe[0] == whole.nfe[sample]
        torch.testing.assert_close(one.z[0], whole.z[sample, :size])


@pytest.mark.parametrize("layout", ["tokens", "set", "ntc"])
def test_more_padding_changes_nothing_that_a_learned_solver_does(layout):
    solver = perturbed(make_learned("meta-broyden", Layout(layout, (6, 4)), conditioning="input")).double()
    options = {"solver": solver, "rtol": 0.0, "max_nfe": 6, "throw": False}
    short, long = (mb.solve(by_mean, torch.zeros_like(x.x), x, **options) for x in map(tokens, (6, 9)))
    torch.testing.assert_close(short.z, long.z[:, :6], rtol=1e-4, atol=1e-5)
    assert long.z[:, 6:].eq(0).all()
    assert (short.trace.residual[-1] > 0).all()


def _rank(name):
    return {"rank": 3} if name == "universal" else {}


def test_a_padded_context_has_a_default_start_and_gradients_flow():
    x = tokens()
    leaf = x.x.clone().requires_grad_()
    deq = mb.DEQ(by_mean_zeroed, rtol=1e-5, backward=mb.Implicit(rtol=1e-5))
    deq(mb.Padded(leaf, x.mask)).pow(2).sum().backward()
    assert leaf.grad[x.mask].abs().min() > 0
    assert leaf.grad[~x.mask].abs().max() == 0


def by_mean_zeroed(z, x):
    return torch.nan_to_num(by_mean(z, x))


def test_a_mask_that_is_not_of_the_states_tokens_is_refused():
    x = mb.Padded(torch.ones(2, 3, 4), torch.ones(2, 4, dtype=torch.bool))
    refused(
        r"wants a state \(B, T, C\): the mask is \(2, 4\), the state's per-sample shape \(3, 4\)",
        lambda: mb.solve(lambda z, x: z, torch.zeros(2, 3, 4), x, solver=mb.Picard()),
    )


# --- graphs as contexts


def test_a_union_goes_there_and_back():
    task = graphs()
    made = mb.Graphs.of(task.x, task.edge_index, task.batch, y=task.y)
    assert torch.equal(made.nodes(made.x), task.x)
    assert torch.equal(made.nodes(made.y), task.y)
    assert torch.equal(made.padded(task.x), made.x)
    seen = []

    def cell(z, x, edge_index, batch, edge_weight):
        seen.append((x, edge_index, batch, edge_weight))
        return z + x

    value = mb.OnGraphs(cell)(torch.ones_like(made.x), made)
    x, edge_index, batch, weight = seen[0]
    assert torch.equal(x, task.x)
    assert torch.equal(batch, task.batch)
    assert set(map(tuple, edge_index.T.tolist())) == set(map(tuple, task.edge_index.T.tolist()))
    assert edge_index.shape == task.edge_index.shape
    assert weight.eq(1).all()
    assert torch.equal(made.nodes(value), 1 + task.x)
    assert value[~made.mask].eq(0).all()


def test_a_cell_on_graphs_sees_the_graphs_at_hand():
    edges = torch.tensor([[0, 1], [1, 2]])
    made = mb.Graphs.of(torch.ones(3, 1), edges, edge_weight=torch.tensor([1.0, 2.0]))
    f = mb.OnGraphs(
        lambda z, x, edge_index, edge_weight: torch.zeros_like(z).index_add(0, edge_index[1], edge_weight[:, None])
    )
    z = torch.zeros(1, 3, 1)
    assert f(z, made).flatten().tolist() == [0, 1, 2]
    assert f(z, made._replace(weight=2 * made.weight)).flatten().tolist() == [0, 2, 4]


def test_weights_follow_their_edges_and_objects_their_order():
    edge_index = torch.tensor([[0, 2, 1], [1, 1, 0]])
    one = SimpleNamespace(x=normal(3, 2), edge_index=edge_index, edge_weight=torch.tensor([1.0, 2.0, 3.0]))
    two = SimpleNamespace(x=normal(2, 2, seed=1), edge_index=torch.tensor([[0], [1]]))
    made = mb.Graphs.of([one, two])
    assert made.mask.sum(1).tolist() == [3, 2]
    assert made.source.tolist() == [[1, 0, 2], [0, 0, 0]]
    assert made.target.tolist() == [[0, 1, 1], [1, 3, 3]]
    assert made.weight.tolist() == [[3, 1, 2], [1, 0, 0]]
    assert made.y is None
    assert torch.equal(mb.Graphs.of(one).x[0], one.x)


def test_what_are_no_graphs_is_refused():
    x, edges = torch.ones(3, 2), torch.tensor([[0, 1], [1, 2]])
    refused(r"x must be \(N, F\)", lambda: mb.Graphs.of(torch.ones(3), edges))
    refused(r"edge_index must be \(2, E\) integers, got \(3, 2\)", lambda: mb.Graphs.of(x, torch.ones(3, 2).long()))
    refused("from 0 to 2, got some from 0 to 3", lambda: mb.Graphs.of(x, torch.tensor([[0], [3]])))
    refused(r"batch must be \(3,\)", lambda: mb.Graphs.of(x, edges, torch.tensor([0, 1, 0])))
    refused("some go from one to another", lambda: mb.Graphs.of(x, edges, torch.tensor([0, 0, 1])))
    refused(r"edge_weight must be \(2,\)", lambda: mb.Graphs.of(x, edges, edge_weight=torch.ones(3)))
    refused(r"y must be \(3, …\)", lambda: mb.Graphs.of(x, edges, y=torch.ones(2)))
    refused("objects with attributes x and edge_index; got list", lambda: mb.Graphs.of([x]), TypeError)
    refused("takes mb.Graphs for its context, got Tensor", lambda: mb.OnGraphs(CELL)(x, x), TypeError)
    refused("cell must be callable, got int", lambda: mb.OnGraphs(3), TypeError)
    solver = make_learned("meta-broyden", Layout("graph", (3, 2)))
    z = torch.zeros(2, 3, 2)
    refused("layout 'graph' needs the edges", lambda: mb.solve(lambda z, x: z, z, z, solver=solver))
    union = (torch.ones(12, 2), edges)
    refused(
        "the edges of graphs in mb.Graphs", lambda: mb.fit_solver(lambda z, c: z, union, z0=lambda c: 0 * c[0], steps=1)
    )
    refused("has no layout 'graph'", lambda: make_learned("adjoint", Layout("graph", (3, 2))))


def test_each_graph_stops_on_its_own():
    task = graphs()
    f, made = mb.OnGraphs(CELL), mb.Graphs.of(task.x, task.edge_index, task.batch)
    whole = mb.solve(f, f.initial_state(made), made, solver=mb.Anderson(), rtol=1e-5, max_nfe=100)
    assert whole.nfe.unique().numel() > 1
    for number in range(5):
        here = task.batch == number
        edges = task.edge_index[:, here[task.edge_index[0]]] - int(here.nonzero()[0])
        one = mb.Graphs.of(task.x[here], edges)
        alone = mb.solve(f, f.initial_state(one), one, solver=mb.Anderson(), rtol=1e-5, max_nfe=100)
        assert abs(alone.nfe[0] - whole.nfe[number]) <= 1, "but for rounding"
        torch.testing.assert_close(alone.z[0], made.nodes(whole.z)[here], rtol=1e-3, atol=1e-4)


def test_parts_of_a_large_graph_are_what_lies_round_a_node():
    x, path = torch.arange(50.0)[:, None], torch.stack([torch.arange(49), torch.arange(1, 50)])
    made = mb.Graphs.around(x, path, hops=3, count=20, y=-x, edge_weight=torch.arange(49.0) + 1)
    other = mb.Graphs.around(x, path, hops=3, count=20, y=-x, seed=1)
    assert len(made.x) == 20
    assert not torch.equal(made.x[:, 0], other.x[:, 0])
    for part in range(20):
        nodes = made.nodes(made.x)[made.mask.nonzero()[:, 0] == part].flatten().tolist()
        assert sorted(nodes) == list(range(max(0, round(nodes[0]) - 3), min(49, round(nodes[0]) + 3) + 1))
        ends = [made.x[part, end[part][made.target[part] < made.x.shape[1]], 0] for end in (made.source, made.target)]
        assert torch.equal(ends[1] - ends[0], torch.ones(len(nodes) - 1)), "all edges between them, as they go"
        assert torch.equal(made.weight[part][: len(nodes) - 1], ends[1])
    assert torch.equal(made.y, -made.x)
    few = mb.Graphs.around(x, path, hops=30, count=2, most=5)
    assert few.mask.sum(1).tolist() == [5, 5]
    assert (few.x - few.x[:, :1]).abs().max() <= 4, "the nearest"
    star = torch.stack([torch.zeros(49, dtype=torch.long), torch.arange(1, 50)])
    rays = mb.Graphs.around(x, star, hops=2, count=8, most=5)
    assert len(rays.nodes(rays.x).unique()) > 12, "those at equal distance at random"
    refused("takes x .* of one graph, got list", lambda: mb.Graphs.around([1], path, hops=1, count=2), TypeError)
    refused(
        "hops, count and most must be at least 1, got 0, 2 and 256", lambda: mb.Graphs.around(x, path, hops=0, count=2)
    )
    with pytest.raises(ValueError, match=r"mb\.Graphs\.around\(x, edge_index, .* takes parts of one large graph"):
        mb.fit_solver(mb.OnGraphs(CELL), mb.Graphs.of(normal(6, 4), path[:, :5]), progress=False)
    refused("edge_index must be", lambda: mb.Graphs.around(x, path.double(), hops=1, count=2))


# --- graphs in learned solvers


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("conditioning", ["initial_value", "input"])
def test_no_learned_solver_sees_the_numbers_of_nodes_or_the_padding(name, conditioning):
    task, f = graphs(), mb.OnGraphs(CELL)
    other = renumbered(task, 1)
    solver = perturbed(make_learned(name, Layout("graph", (30, 4)), conditioning=conditioning, **_rank(name)))
    options = {"solver": solver, "rtol": 0.0, "max_nfe": 6, "throw": False}
    found = {}
    for key, each in {"as it is": task, "renumbered": other}.items():
        made = mb.Graphs.of(each.x, each.edge_index, each.batch)
        found[key] = made.nodes(mb.solve(f, f.initial_state(made), made, **options).z)
    order = torch.argsort(task.batch + torch.rand(len(task.batch), generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(found["as it is"][order], found["renumbered"], rtol=1e-3, atol=1e-4)


def test_messages_go_along_the_edges_so_many_hops():
    edges = torch.stack([torch.arange(11), torch.arange(1, 12)])
    made = mb.Graphs.of(torch.zeros(12, 3), edges)
    layout = Layout("graph", (12, 3))
    wiring = wiring_of(made, layout, torch.zeros(1))
    for dilation, reach in ((1, [2, 3, 4]), (2, [2, 4, 6])):
        mixer = Mixer(layout, 3, 2, dilation=dilation, bias=False)
        mixer.map.weight.data.fill_(1.0)
        mixer.map.weight.data[:, :, 1] = 0  # the mean
        impulse = torch.zeros(1, 3, 12)
        impulse[..., 2] = 1
        assert mixer(impulse, wiring=wiring)[0, 0].nonzero().flatten().tolist() == reach
        back = torch.zeros(1, 2, 12)
        back[..., 8] = 1
        assert mixer.transpose(back, wiring)[0, 0].nonzero().flatten().tolist() == sorted(
            16 - 2 * 4 - r + 2 for r in reach
        )


def test_a_matrix_of_edges_has_both_degrees_in_it():
    made = mb.Graphs.of(
        torch.zeros(3, 1), torch.tensor([[0, 1, 0], [2, 2, 1]]), edge_weight=torch.tensor([1.0, -3.0, 2.0])
    )
    wiring = wiring_of(made, Layout("graph", (3, 1)), torch.zeros(1, dtype=DOUBLE))
    wanted = torch.zeros(3, 3, dtype=DOUBLE)
    wanted[2, 0], wanted[2, 1], wanted[1, 0] = 1 / (3 * 4) ** 0.5, -3 / (3 * 4) ** 0.5, 2 / (3 * 2) ** 0.5
    eye = torch.eye(3, dtype=DOUBLE).unsqueeze(0)
    torch.testing.assert_close(wiring.carried(eye, 1)[0], wanted)
    torch.testing.assert_close(wiring.carried(eye, 2)[0], wanted @ wanted)
    torch.testing.assert_close(wiring.carried(eye, 1, back=True)[0], wanted.T)


@pytest.mark.parametrize("kind", ["graph", "set", "tokens", "ntc"])
def test_maps_of_padded_states_have_their_transposes(kind):
    task = graphs()
    made = mb.Graphs.of(task.x.double(), task.edge_index, task.batch)
    rows, length = made.mask.shape
    layout = Layout(kind, (length, 4))
    wiring = wiring_of(made, layout, made.x)
    part = Preconditioner(layout, 4, 7, dilations=(1, 1)).double()
    nn.init.normal_(part.outward.map.weight)
    r, w, z = (normal(rows, 4, length, seed=seed, dtype=DOUBLE) for seed in range(3))
    gates = part.gates(z, z, wiring)
    r = wiring.blanked(r)
    torch.testing.assert_close((part(r, gates, wiring) * w).sum(), (r * part.transpose(w, gates, wiring)).sum())


# --- the zoo


def test_a_graph_solver_is_fitted_saved_and_used(tmp_path):
    task = chains(24, 0, lengths=(5, 12))
    made = mb.Graphs.of(task.x, task.edge_index, task.batch)
    f = mb.OnGraphs(GraphCell(4, bound=1.0).requires_grad_(False))
    solver = mb.fit_solver(f, made, steps=3, fallback=False, progress=False)
    assert solver.config.layout == "graph"
    assert solver.config.conditioning == "input"
    path = mb.save_solver(solver, tmp_path / "solver.safetensors") or tmp_path / "solver.safetensors"
    options = {"rtol": 1e-3, "max_nfe": 60}
    one, other = (
        mb.solve(f, f.initial_state(made), made, solver=each, **options) for each in (solver, mb.load_solver(path))
    )
    assert torch.equal(one.z, other.z)
    longer = chains(4, 1, lengths=(30, 40))
    more = mb.Graphs.of(longer.x, longer.edge_index, longer.batch)
    assert mb.solve(f, f.initial_state(more), more, solver=solver, **options).converged.all()


def test_a_graph_classifier_learns():
    torch.manual_seed(0)
    model = GraphClassifier(2, 2, 8, bound=0.9, rtol=1e-3)
    optimiser = torch.optim.Adam(model.parameters(), 2e-2)
    losses = []
    for step in range(15):
        task = karate(16, step)
        loss = nn.functional.cross_entropy(model(task.x, task.edge_index, task.batch), task.y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert (model.deq.cell.cell.weight.abs().sum(1) <= 0.9 + 1e-6).all()


def test_tasks_follow_from_their_seeds():
    for make in (chains, trees, karate):
        one, other, third = make(4, 0), make(4, 0), make(4, 1)
        assert all(map(torch.equal, one, other))
        assert not torch.equal(one.x[:20], third.x[:20])
    unseen = torch.bincount(chains(50, 0, held=True).batch)
    assert (unseen % 3 == 0).all()
    assert (torch.bincount(chains(50, 0).batch) % 3 > 0).all()
    assert karate(3, 0).edge_index.shape == (2, 3 * 2 * 78)
    task = trees(6, 0)
    assert torch.bincount(task.edge_index[1], minlength=len(task.y)).min() >= 1
    again = renumbered(task, 3)
    assert torch.equal(torch.bincount(task.y[task.edge_index[0]]), torch.bincount(again.y[again.edge_index[0]]))
