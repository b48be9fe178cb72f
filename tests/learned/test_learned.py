"""Learned solvers: they start as Picard, run on every layout, and never strand a sample."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import metabroyden as mb
from metabroyden.deq import initial_state
from metabroyden.learned import GroupedConfig, LearnedConfig, Safeguard
from metabroyden.learned.base import apart
from metabroyden.learned.layout import Layout, guess_layout
from metabroyden.learned.mixer import Mixer
from metabroyden.learned.preconditioner import SHUT, Preconditioner
from metabroyden.learned.secants import Secants
from metabroyden.meta.defaults import dilations, gated_steps
from metabroyden.meta.fit import make_learned
from metabroyden.meta.orthogonal import is_matrix
from metabroyden.meta.unroll import UnrolledProblem, unroll
from metabroyden.zoo.models.cells import make_cell
from tests.conftest import tanh
from tests.helpers import DOUBLE, normal, perturbed, refused, vector

SHAPES = {"vector": (12,), "nct": (4, 6), "ntc": (6, 4), "tokens": (6, 4), "set": (6, 4), "image": (4, 5, 5)}


def problem_of(kind: str, batch: int = 5, gain: float = 0.7, dtype: torch.dtype = torch.float32):
    """A contraction over states of this layout that mixes channels, with its contexts."""
    layout = Layout(kind, SHAPES[kind])
    c = layout.channels
    w = gain * torch.linalg.qr(normal(c, c)).Q.to(dtype)

    def f(z, x):
        mixed = z @ w if kind in ("vector", "ntc", "tokens", "set") else torch.einsum("bc...,cd->bd...", z, w)
        return torch.tanh(mixed + x)

    x = normal(batch, *layout.shape, seed=1).to(dtype)
    return layout, f, torch.zeros_like(x), x


BY_LSTM, BY_SECANTS = "meta-broyden by LSTM", "neural-fixed-point by secants"
LEARNED = mb.list_solvers(learned=True, splitting=False, adjoint=False)
EVERY = [*LEARNED, BY_LSTM, BY_SECANTS]
CASES = [(name, kind) for name in EVERY for kind in SHAPES]
by_both = pytest.mark.parametrize("name", ["meta-broyden", BY_LSTM])
of_each_layout = pytest.mark.parametrize("kind", SHAPES)
either_way = pytest.mark.parametrize("conditioning", ["initial_value", "input"])


def made(name, layout, *, learned_steps=None, **options):
    """An untrained solver, with dilated maps where states have extents."""
    if name.startswith("meta-broyden"):
        given = {"learned_steps": learned_steps} if learned_steps else {}
        reach = (1, 1) if layout.kind in ("vector", "set", "pyramid") else (1, 2)
        options = {"coefficients": "lstm" if name == BY_LSTM else "schedule", "dilations": reach, **given, **options}
    if name == BY_SECANTS:
        options = {"form": "secant", "memory": 3, **options}
    return make_learned(name.split(" by ")[0], layout, **options)


@pytest.mark.parametrize(("name", "kind"), CASES)
@either_way
def test_untrained_it_is_a_classical_solver(name, kind, conditioning):
    layout, f, z0, x = problem_of(kind)
    solver = made(name, layout, conditioning=conditioning, learned_steps=60)  # then come its secants
    twin = mb.Anderson(memory=10, ridge=1e-2) if name == "universal" else mb.Picard()
    ours = mb.solve(f, z0, x, solver=solver, rtol=1e-4)
    classical = mb.solve(f, z0, x, solver=twin, rtol=1e-4)
    torch.testing.assert_close(ours.trace.residual, classical.trace.residual, rtol=1e-4, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(ours.nfe, classical.nfe)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_with_any_weights_it_hands_over_and_converges(name, kind):
    layout, f, z0, x = problem_of(kind)
    solver = perturbed(made(name, layout), 1.0)
    solution = mb.solve(f, z0, x, solver=solver, rtol=1e-5, max_nfe=120)
    assert (solution.trace.phase > 0).any(), "weights this bad must be handed over"
    assert torch.isfinite(solution.z).all()


class Poison(torch.nn.Module):
    """A learned step that goes non-finite on some samples, diverges on others, and never helps."""

    def __init__(self, safeguard: Safeguard) -> None:
        super().__init__()
        self.fallback_plan = safeguard

    def phases(self):
        return self.fallback_plan.phases(self)

    def start(self, z0, problem):
        return z0 + 3

    def init(self, z, g, problem):
        return ()

    def step(self, z, g, state, problem):
        kind = torch.arange(len(z)) % 2 == 0
        return mb.solvers.Step(torch.where(kind[:, None], torch.nan, z * 7), state)


def test_given_what_was_already_spent_it_never_fails_where_broyden_converges():
    f, z0, x = (problem := tanh(batch=40, n=16, gain=1.6, seed=3)).f, problem.z0, problem.x
    safeguard, options = Safeguard(horizon=6, patience=3, resume_below=100.0), {"rtol": 1e-7, "throw": False}
    alone = mb.solve(f, z0, x, solver=safeguard.fallback(), max_nfe=60, **options)
    assert alone.converged.any()
    helped = mb.solve(f, z0, x, solver=Poison(safeguard), max_nfe=60 + 200, **options)
    assert helped.converged[alone.converged].all()
    again = mb.relative_residual(helped.z, f(helped.z, x))
    torch.testing.assert_close(again, helped.residual, rtol=1e-5, atol=1e-14)  # cohorts did not mix up their samples
    assert (helped.trace.phase == 1).any()


def test_a_resumed_phase_that_stalls_starts_again_from_z0_and_repeats_broydens_own_path():
    f, z0, x = (problem := tanh(batch=12, n=16, gain=2.5)).f, problem.z0, problem.x
    safeguard, options = Safeguard(2, 1, resumed_patience=1, resume_below=100.0), {"rtol": 1e-8, "max_nfe": 200}
    trace = mb.solve(f, z0, x, solver=Poison(safeguard), throw=False, **options).trace
    broyden = mb.solve(f, z0, x, solver=safeguard.fallback(), **options)
    restarted = (trace.phase == 2).any(dim=0).nonzero().flatten().tolist()
    assert len(restarted) >= 3
    for sample in restarted:
        last, own = trace.residual[trace.phase[:, sample] == 2, sample], broyden.trace.residual[:, sample]
        own = own[~own.isnan()]
        torch.testing.assert_close(last[: len(own)], own[: len(last)])


def test_hand_over_costs_no_evaluation(nonlinear):
    torch.manual_seed(0)
    solver = vector("grouped", 12, conditioning="input", safeguard=Safeguard(horizon=3, patience=None))
    trace = mb.solve(nonlinear.f, nonlinear.z0, nonlinear.x, solver=solver, rtol=1e-9, max_nfe=60).trace
    assert trace.phase[:5, 0].tolist() == [0, 0, 0, 0, 1]
    assert trace.nfe[:5, 0].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", ["nct", "ntc"])
@pytest.mark.parametrize("name", sorted({*EVERY} - {"hyper-anderson", "universal"}))  # which weigh whole samples
def test_a_sequence_solver_does_not_look_ahead(name, kind):
    """With a causal f, what happens at the last tokens changes nothing at earlier ones before secants are taken."""
    layout, f, z0, x = problem_of(kind)
    solver = perturbed(made(name, layout, learned_steps=3, safeguard=Safeguard(horizon=50, patience=None)))
    changed, time = x.clone(), 2 if kind == "nct" else 1
    changed.narrow(time, 4, 2).add_(1)
    found = [mb.solve(f, z0, at, solver=solver, rtol=0.0, max_nfe=6, throw=False) for at in (x, changed)]
    # the driver returns the best iterate of the sample, so compare it where both picked the same one
    one, other = (solution.trace.residual.argmin(dim=0) for solution in found)
    assert (one == other).any()
    early, late = ([solution.z[one == other].narrow(time, *part) for solution in found] for part in ((0, 4), (4, 2)))
    torch.testing.assert_close(*early, rtol=1e-5, atol=1e-6)
    assert (late[0] - late[1]).abs().min() > 0


@pytest.mark.parametrize("name", EVERY)
def test_a_set_solver_does_not_see_the_order(name):
    """f couples the elements of a set by their mean; solving them in another order gives the same in that order."""
    layout, f, z0, x = problem_of("set")

    def coupled(z, x):
        return f(0.7 * z + 0.3 * z.mean(dim=1, keepdim=True), x)

    solver = perturbed(made(name, layout, learned_steps=3))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    options = {"solver": solver, "rtol": 0.0, "max_nfe": 5, "throw": False}
    one, other = mb.solve(coupled, z0, x, **options), mb.solve(coupled, z0, x[:, order], **options)
    torch.testing.assert_close(one.z[:, order], other.z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "reach"), [("tokens", [2, 3, 4, 5, 6, 7, 8]), ("set", list(range(12)))])
def test_tokens_and_sets_are_seen_both_ways(kind, reach):
    layout = Layout(kind, (12, 3))
    p = make_learned("meta-broyden", layout, dilations=(1, 2) if kind == "tokens" else (1, 1)).preconditioner
    for weight in p.parameters():
        weight.data.fill_(1.0)
    impulse = torch.zeros(1, 3, 12)
    impulse[..., 5] = 1
    seen = p(impulse, torch.ones(1, p.inward.map.weight.shape[0], 12))[0, 0].nonzero().flatten().tolist()
    assert seen == reach


def half(z, x=None):
    return 0.5 * z + (1 if x is None else x)


def test_it_runs_on_other_extents_and_flattened_but_on_no_other_state():
    image = Layout("image", (4, 5, 5))
    solver, x = make_learned("grouped", image), torch.randn(2, 4, 7, 3)
    assert mb.solve(half, torch.zeros_like(x), x, solver=solver).converged.all()
    _, f, z0, x = problem_of("image")
    flat = mb.solve(lambda z, x: f(z.reshape(x.shape), x).flatten(1), z0.flatten(1), x, solver=solver, rtol=1e-5)
    torch.testing.assert_close(flat.z, mb.solve(f, z0, x, solver=solver, rtol=1e-5).z.flatten(1))
    wrong = torch.zeros(2, 3, 5, 5)
    refused(r"4 channels\); got per-sample shape \(3, 5, 5\)", lambda: mb.solve(half, wrong, wrong, solver=solver))
    pair = (torch.zeros(2, 3), torch.zeros(2, 3))
    refused("fitted to one tensor", lambda: mb.solve(lambda z: z, pair, solver=solver))
    native, one = make_learned("grouped", image, conditioning="input"), torch.ones(2, 4, 5, 5)
    refused("conditioning='input'", lambda: mb.solve(half, one, solver=native))
    words = r"needs a context tensor with 4 channels.*got shape \(2, 7, 5, 5\)"
    refused(words, lambda: mb.solve(lambda z, x: 0.5 * z, one, torch.ones(2, 7, 5, 5), solver=native))
    single, z0 = make_learned("grouped", Layout("vector", (3,))), torch.zeros(2, 3, dtype=DOUBLE)
    words = r"weights are torch.float32, the state is torch.float64: solver.to\("
    refused(words, lambda: mb.solve(half, z0, solver=single))
    assert mb.solve(half, z0, solver=single.to(DOUBLE)).converged.all()


def test_layouts_are_guessed_only_where_unambiguous():
    assert guess_layout((7,)).kind == "vector"
    assert guess_layout((3, 8, 8)).kind == "image"
    refused("layout= is needed", lambda: guess_layout((5, 6)))


SCALES = Layout("pyramid", ((2, 4, 4), (3, 2, 2)))
VECTOR = {"layout": "vector", "shape": (3,)}
DILATED = "dilations must be at least 1, and are 1 for layouts 'vector', 'set' and 'pyramid'; got 2"
REFUSED = [
    ("layout must be one of", lambda: Layout("nhwc", (8, 8, 3))),
    ("wants 3 axes", lambda: Layout("image", (8, 8))),
    ("multiples of the last", lambda: Layout("pyramid", ((2, 5, 5), (3, 2, 2)))),
    ("must be", lambda: LearnedConfig(**VECTOR, conditioning="x")),
    ("must be", lambda: LearnedConfig(**VECTOR, hidden=0)),
    ("must be", lambda: LearnedConfig(**VECTOR, initializer_width=-1)),
    ("rank", lambda: GroupedConfig(**VECTOR, rank=0)),
    ("must be one of schedule, lstm, got 'gru'", lambda: vector("meta-broyden", 6, coefficients="gru")),
    (DILATED, lambda: vector("meta-broyden", 6, dilations=(2, 1))),
    (DILATED, lambda: make_learned("meta-broyden", SCALES, dilations=(2, 1))),
    ("be at most learned_steps, 4, got 5", lambda: vector("meta-broyden", 12, learned_steps=4, schedule_length=5)),
]


@pytest.mark.parametrize(("words", "call"), REFUSED)
def test_bad_settings_are_refused(words, call):
    refused(words, call)


@by_both
@pytest.mark.parametrize("kind", [*SHAPES, "pyramid"])
def test_what_metabroyden_hands_over_is_the_inverse_that_it_stepped_with(kind, name):
    """B₀ of Broyden: the step of a table of one row, or the first one of an LSTM that says nothing; and its transpose."""
    layout = SCALES if kind == "pyramid" else Layout(kind, SHAPES[kind])
    options = {"context_channels": layout.channels, "conditioning": "input"}
    solver = made(name, layout, learned_steps=1, damping=0.25, **options).double()
    weights = [solver.coefficients.channel] if name == BY_LSTM else solver.coefficients.parameters()
    for parameter in (*weights, *solver.preconditioner.parameters()):
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    n = sum(math.prod(s) for s in layout.shape) if kind == "pyramid" else math.prod(layout.shape)
    z, g, w = normal(3, 2, n, seed=2, dtype=DOUBLE)

    class Problem:
        keep_inverse, hands_over = True, False
        shape = layout.shape
        context = layout.canonical(w, layout.shape) if not layout.channel_axis else w.view(2, *layout.shape)

    inverse = solver.phases()[1].solver.initial.learned
    frozen = inverse.init(z, g, Problem())
    with torch.no_grad():
        moved = solver.step(z, g, solver.init(z, g, Problem()), Problem())[0]
    torch.testing.assert_close(z + g + inverse.apply(g, frozen), moved)
    torch.testing.assert_close((inverse.apply(g, frozen) * w).sum(), (g * inverse.rmatvec(w, frozen)).sum())


def test_the_learned_inverse_jacobian_is_linear_in_the_residual():
    layout, _f, z0, x = problem_of("image")
    solver = make_learned("grouped", layout)
    for parameter in solver.parameters():
        parameter.data.normal_()
    gates, apply = solver.preconditioner.gates(z0, x), solver.preconditioner
    a, b = torch.randn_like(x), torch.randn_like(x)
    split = 2 * apply(a, gates) - 3 * apply(b, gates)
    torch.testing.assert_close(apply(2 * a - 3 * b, gates), split, rtol=1e-3, atol=1e-3)


def several_scales(z, x):
    """A contraction of two resolutions into each other; x is an image of the finer."""
    fine, coarse = z
    up = functional.interpolate(coarse[:, :2], scale_factor=2)
    down = functional.avg_pool2d(fine, 2).mean(1, keepdim=True)
    return torch.tanh(0.5 * fine.roll(1, 3) + 0.3 * up + x), torch.tanh(0.5 * coarse.roll(1, 1) + 0.3 * down)


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 7), (7, 3), (4, 4)])
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (3, 4)])
def test_maps_along_tokens_are_torchs_convolutions(inputs, outputs, kernel, dilation):
    value, reach = normal(2, inputs, 9, seed=1), (kernel - 1) * dilation
    for kind, before in (("nct", reach), ("tokens", reach // 2)):
        mixer = Mixer(Layout(kind, (9, 5)), inputs, outputs, kernel=kernel, dilation=dilation)
        padded = functional.pad(value, (before, reach - before))
        wanted = functional.conv1d(padded, mixer.map.weight, mixer.map.bias, dilation=dilation)
        torch.testing.assert_close(mixer(value), wanted)


def test_no_gate_is_subnormal():
    p = Preconditioner(Layout("vector", (4,)), 2, 3)
    gates = p.gates(torch.full((1, 4), -1e6), torch.full((1, 2), -1e6)).detach()
    assert gates.min() >= math.exp(SHUT) * 0.99
    gates = p.gates(torch.full((1, 4), 1e6), torch.full((1, 2), 1e6)).detach()
    assert gates.min() >= math.exp(SHUT) * 0.99


@pytest.mark.parametrize("kernel", [1, 3])
def test_maps_of_several_scales_part_by_part_are_those_of_the_canonical_form(kernel):
    layout = Layout("pyramid", ((2, 8, 8), (3, 4, 4), (5, 2, 2)))
    flat = torch.randn(3, 2 * 64 + 3 * 16 + 5 * 4, dtype=DOUBLE)
    parts = layout.parts(flat, layout.shape)
    assert [tuple(part.shape[1:]) for part in parts] == list(layout.shape)
    assert torch.equal(layout.joined(parts), flat)
    canonical = layout.canonical(flat, layout.shape)
    torch.testing.assert_close(layout.scale_of(flat, layout.shape), layout.scale(canonical))
    inward = Mixer(layout, layout.channels, 6, kernel=kernel, bias=False).double()
    outward = Mixer(layout, 6, layout.channels, kernel=kernel, bias=False).double()
    inner = inward(canonical)
    torch.testing.assert_close(inward.of_parts(parts), inner)
    torch.testing.assert_close(layout.joined(outward.to_parts(inner)), layout.flat(outward(inner)))
    weight = torch.rand(3, 1, 2, 2, dtype=DOUBLE)
    weighed = [part * w for part, w in zip(parts, layout.spread(weight), strict=True)]
    torch.testing.assert_close(layout.joined(weighed), layout.flat(canonical * weight))


def test_scales_are_brought_to_the_coarsest_and_back_without_loss():
    flat = torch.randn(3, 2 * 16 + 3 * 4)
    canonical = SCALES.canonical(flat, SCALES.shape)
    assert canonical.shape == (3, SCALES.channels, 2, 2)
    assert torch.equal(SCALES.flat(canonical), flat)
    fine = flat[:, :32].reshape(3, 2, 4, 4)[:, 0, :2, :2].flatten(1)
    assert torch.equal(canonical[:, :4, 0, 0], fine), "a coarse pixel holds the fine ones in it"
    assert SCALES.resolve((torch.Size([2, 8, 8]), torch.Size([3, 4, 4]))) == ((2, 8, 8), (3, 4, 4))
    for wrong in ((torch.Size([2, 8, 8]), torch.Size([3, 2, 2])), (torch.Size([2, 4, 4]),), torch.Size([7])):
        refused("several scales", lambda: SCALES.resolve(wrong))  # noqa: B023


@pytest.mark.parametrize("name", [*LEARNED, BY_SECANTS])
def test_states_of_several_scales_are_solved(name):
    x = normal(5, 2, 4, 4, seed=1)
    z0 = torch.zeros(5, 2, 4, 4), torch.zeros(5, 3, 2, 2)
    native = {} if name == "coordinatewise" else {"conditioning": "input", "context_channels": 8}
    for options in ({}, native):
        solver = perturbed(made(name, SCALES, **options), 0.02)
        found = mb.solve(several_scales, z0, x, solver=solver, rtol=1e-5, max_nfe=100)
        wanted = mb.solve(several_scales, z0, x, solver=mb.Broyden(), rtol=1e-6, max_nfe=100)
        for ours, theirs in zip(found.z, wanted.z, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


# with 6 there are as many pairs as a token has coordinates: ill-conditioned
@pytest.mark.parametrize(("learned", "rtol", "atol"), [(3, 1e-4, 1e-6), (6, 1e-3, 3e-4)])
@of_each_layout
def test_the_secant_phase_is_andersons_on_the_pairs_of_the_learned_steps(kind, learned, rtol, atol):
    """Untrained, B₀ = −I: each late step must be the multisecant one, of all pairs up to each token for sequences."""
    layout, f, z0, x = problem_of(kind, gain=0.9, dtype=DOUBLE)
    solver = make_learned("meta-broyden", layout, learned_steps=learned, memory=4, initializer_width=0).double()
    with torch.no_grad():
        iterates = torch.stack(unroll(solver, f, z0, x, steps=8, backend="native").iterates)
        residuals = torch.stack([f(z.view_as(z0), x).flatten(1) - z for z in iterates])
    assert len(iterates) == 9
    for k in range(learned + 1, 9):  # the step from k − 1
        first = max(0, k - 1 - 4)
        dz = iterates[first + 1 : k] - iterates[first : k - 1]
        dg = residuals[first + 1 : k] - residuals[first : k - 1]
        z, g = iterates[k - 1], residuals[k - 1]
        for b in range(len(z0)):
            tokens = range(layout.extents(layout.shape)[0]) if layout.causal else (None,)
            for t in tokens:
                keep = here = torch.ones(layout.shape, dtype=torch.bool).flatten()
                if t is not None:
                    place = torch.arange(len(tokens)).unsqueeze(1) if kind == "ntc" else torch.arange(len(tokens))
                    keep, here = (mask.expand(layout.shape).flatten() for mask in (place <= t, place == t))
                gamma = torch.linalg.lstsq(dg[:, b, keep].T, g[b, keep].unsqueeze(1), driver="gelsd").solution
                wanted = (z[b] + g[b] - gamma.squeeze(1) @ (dz[:, b] + dg[:, b]))[here]
                torch.testing.assert_close(iterates[k][b][here], wanted, rtol=rtol, atol=atol)


def walked(solver, f, z, x, steps):
    """(z, g, state, problem) after so many steps, without a driver."""
    problem = UnrolledProblem(f, z, x)
    with torch.no_grad():
        z = z.flatten(1)
        g = problem.residual(z)
        state = solver.init(z, g, problem)
        for _ in range(steps):
            z, state, _ = solver.step(z, g, state, problem)
            g = problem.residual(z)
    return z, g, state, problem


@by_both
@of_each_layout
@pytest.mark.parametrize("steps", [2, 7])
def test_the_transposed_inverse_is_that_of_the_step(kind, steps, name):
    """⟨Bg, w⟩ = ⟨g, Bᵀw⟩ with B read off the quasi-Newton step itself, and early on B = B₀."""
    layout, f, z0, x = problem_of(kind, batch=3, gain=0.9, dtype=DOUBLE)
    solver = perturbed(made(name, layout, learned_steps=3, memory=4).double())
    z, g, state, problem = walked(solver, f, z0, x, steps)
    one, other = (normal(*z.shape, seed=seed, dtype=DOUBLE) for seed in (5, 6))

    def b(v, state):
        known, rest = solver.secants.project(v, solver._pairs(state, layout.shape), layout.shape)
        return known + solver._initial_inverse(rest, state, layout.shape)

    with torch.no_grad():
        back = solver.rmatvec(other, solver.inverse(state, torch.arange(3)))
        left, right = (b(one, state) * other).sum(1), (one * back).sum(1)
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)
        if steps == 7:  # and b is what the step does: z⁺ = z − Bg
            noted = state._replace(secants=solver.secants.update(z, g, state.secants, layout.shape))
            torch.testing.assert_close(z - b(g, noted), solver.step(z, g, state, problem).z, rtol=1e-7, atol=1e-9)


@by_both
@pytest.mark.parametrize("memory", [1, 3])
def test_a_sample_goes_its_way_whoever_else_is_in_the_batch(memory, name):
    """Samples that leave at different times take their rows of the trail, and of the secants, along."""
    solver = made(name, Layout("vector", (8,)), conditioning="input", learned_steps=5, memory=memory).double()
    perturbed(solver, 0.05)
    x, rate = normal(9, 8, dtype=DOUBLE), torch.linspace(0.05, 0.95, 9, dtype=DOUBLE).unsqueeze(1)

    def solved(rows: slice):
        f, context = (lambda z, c: c[1] * torch.tanh(z.roll(1, 1)) + c[0]), (x[rows], rate[rows])
        return mb.solve(f, torch.zeros_like(x[rows]), context, solver=solver, rtol=1e-9, max_nfe=60)

    whole = solved(slice(None))
    assert len(set(whole.nfe.tolist())) > 3, "or nothing was gathered"
    assert whole.steps.max() > 5, "or no secants were taken"
    for b in range(9):
        alone = solved(slice(b, b + 1))
        assert abs(int(alone.nfe) - int(whole.nfe[b])) <= 1
        first = min(int(alone.nfe), 12)
        ours, theirs = whole.trace.residual[:first, b], alone.trace.residual[:first, 0]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-10, equal_nan=True)


@by_both
def test_gates_are_set_anew_at_every_step(name):
    solver = made(name, Layout("vector", (8,)), initializer_width=0).requires_grad_(False)
    if name == BY_LSTM:
        solver.coefficients.lstm.offset[2 : 2 + solver.rank] = 0.5
    else:
        solver.coefficients.gates[0, 2] = 1.5
    *_, state, _ = walked(solver, lambda z, x: 0.5 * z + x, torch.zeros(3, 8), normal(3, 8), 3)
    torch.testing.assert_close(solver.coefficients.last(state.initial, state.memory)[1], 1.5 * state.initial)


def test_a_pair_of_nothing_takes_no_other_with_it():
    secants, points = Secants(Layout("vector", (6,)), memory=4, ridge=1e-8), normal(4, 2, 6, dtype=DOUBLE)
    with torch.no_grad():
        state = secants.init(points[0], points[0], (6,))
        for z in points[1:3]:
            state = secants.update(z, 2 * z, state, (6,))
        before = secants.project(points[3], state, (6,))
        state = secants.update(points[3], 2 * points[2], state, (6,))  # g has not moved
        after = secants.project(points[3], state, (6,))
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b)


def test_a_sample_that_creeps_is_handed_over():
    """Each learned step takes a hundredth of Picard's: better every time, and never there."""
    solver = made("meta-broyden", Layout("vector", (4,)), learned_steps=10_000, initializer_width=0)
    solver.coefficients.step_size.data.fill_(0.01)
    solution = mb.solve(half, torch.zeros(3, 4), normal(3, 4), solver=solver, rtol=1e-5, max_nfe=100)
    assert (solution.trace.phase > 0).any(dim=0).all()


@pytest.mark.parametrize("kind", ["nct", "ntc"])
def test_a_dilated_preconditioner_reaches_eight_evaluations_of_f_back_without_a_gap(kind):
    class Cell:
        dilation = 2

    reach = dilations(Cell(), kind)
    assert reach == (2, 6)
    assert dilations(torch.nn.Conv1d(3, 3, 3), kind) == (1, 3), "a tuple says nothing"
    assert dilations(Cell(), "vector") == (1, 1)
    layout = Layout(kind, (20, 3) if kind == "ntc" else (3, 20))
    p = make_learned("meta-broyden", layout, dilations=reach).preconditioner
    for weight in p.parameters():
        weight.data.fill_(1.0)
    impulse = torch.zeros(1, 3, 20)
    impulse[..., 1] = 1
    seen = p(impulse, torch.ones(1, p.inward.map.weight.shape[0], 20))[0, 0].nonzero().flatten().tolist()
    assert seen == list(range(1, 18, 2))


def test_secants_begin_where_training_ended_where_they_are_wanted_and_with_an_lstm():
    assert gated_steps(28) == {"schedule_length": 28, "learned_steps": 42}
    assert gated_steps(6) == {"schedule_length": 6, "learned_steps": 14}
    assert gated_steps(28, extra=False) == gated_steps(28, "lstm") == {"schedule_length": 28, "learned_steps": 28}


def test_a_table_is_no_matrix_to_the_optimizer_and_its_last_row_goes_on():
    solver = vector("meta-broyden", 32, learned_steps=12)
    assert not any(is_matrix(weight) for weight in solver.coefficients.parameters())
    options = {"learned_steps": 9, "initializer_width": 0}
    short, long = (vector("meta-broyden", 12, schedule_length=rows, **options) for rows in (3, 9))
    perturbed(short.coefficients, seed=1)
    for name, weight in short.coefficients.named_parameters():
        later = weight.data[:, -1:].expand(-1, 6, -1)
        long.coefficients.get_parameter(name).data.copy_(torch.cat([weight.data, later], dim=1))
    _, f, z0, x = problem_of("vector", dtype=DOUBLE)
    found = [unroll(solver, f, z0, x, steps=12, backend="native").residuals for solver in (short, long)]
    torch.testing.assert_close(*found)
    assert (short.trained_for, long.trained_for) == (3, 9)


# --- where a solve begins


def astray(solver):
    """The solver with a start that is far from any solution."""
    perturbed(solver.initializer, 0.5, seed=4)
    return solver.eval().requires_grad_(False)


def begun(name, conditioning):
    """(f, z0, x, the solver with a start astray, what it finds from zero)."""
    layout, f, z0, x = problem_of("vector")
    solver = astray(made(name, layout, conditioning=conditioning, initializer_width=8))
    return f, z0, x, solver, mb.solve(f, z0, x, solver=solver, rtol=1e-4, max_nfe=90)


@either_way
@pytest.mark.parametrize("name", EVERY)
def test_a_solve_that_begins_at_or_near_its_solution_stays_there(name, conditioning):
    f, _, x, solver, cold = begun(name, conditioning)
    assert cold.nfe.double().mean() > 4
    warm = mb.solve(f, cold.z, x, solver=solver, rtol=1e-4)
    assert warm.nfe.tolist() == [1] * len(x)
    assert torch.equal(warm.z, cold.z)
    near = mb.solve(f, cold.z + 1e-3 * normal(*x.shape, seed=5), x, solver=solver, rtol=1e-4, max_nfe=90)
    assert near.nfe.double().mean() < cold.nfe.double().mean() - 1
    fixed = mb.FixedBudget(f, solver, max_nfe=3, rtol=1e-4, compiled=False)(cold.z, x)
    assert fixed.converged.all()


@either_way
def test_warm_samples_change_nothing_for_cold_ones_beside_them(conditioning):
    f, z0, x, solver, cold = begun("meta-broyden", conditioning)
    mixed = mb.solve(f, torch.cat([cold.z[:2], z0[2:]]), x, solver=solver, rtol=1e-4, max_nfe=90)
    assert mixed.nfe[:2].tolist() == [1, 1]
    assert mixed.nfe[2:].tolist() == cold.nfe[2:].tolist()
    torch.testing.assert_close(mixed.z[2:], cold.z[2:])


def test_a_start_that_is_neither_zero_nor_close_is_the_learned_one():
    f, z0, x, solver, _ = begun("meta-broyden", "input")
    seen = []
    mb.solve(lambda z, x: seen.append(z.clone()) or f(z, x), z0 + 3, x, solver=solver, rtol=1e-4, max_nfe=90)
    torch.testing.assert_close(seen[1], z0 + 3 + solver.initializer(x))


def test_how_much_of_the_learned_start_is_blended_in_depends_on_the_residual_at_a_given_one():
    """With reach (low, high, far): f(z0) alone up to low, the learned start alone from high on, and no look beyond far."""
    f, z0, x, solver, cold = begun("meta-broyden", "input")
    star, learned = cold.z, solver.initializer(x)
    gap = apart(star, learned)

    def started(given, reach):
        solver.config = replace(solver.config, reach=reach)
        seen = []
        solution = mb.solve(lambda z, x: seen.append(z) or f(z, x), given, x, solver=solver, rtol=1e-6, max_nfe=90)
        return seen, solution

    near = star + 1e-2 * normal(*x.shape, seed=5)
    image, ratio = f(near, x), mb.relative_residual(near, f(near, x))
    seen, _ = started(near, (1.1 * float(ratio.max()), 1.0, 10.0))
    torch.testing.assert_close(seen[1], image)
    seen, _ = started(near, (1e-9, 0.9 * float(ratio.min()), 10.0))
    torch.testing.assert_close(seen[1], learned)
    low, high = float(ratio.min()) / 2, 2 * float(ratio.max())
    share = ((ratio / low).log() / math.log(high / low))[:, None]
    torch.testing.assert_close(
        started(near, (low, high, 10.0))[0][1], image + share * (learned - image), rtol=1e-4, atol=1e-5
    )
    # what is farther from the learned start than solutions are costs no evaluation, and changes nothing
    reach = (0.1, 0.3, 1.01 * float(gap.max()))
    seen, passed = started(star - 50 * (learned - star), reach)
    plain = started(z0, reach)[1]
    torch.testing.assert_close(seen[0], learned)
    assert passed.nfe.tolist() == plain.nfe.tolist()


@pytest.mark.parametrize("reach", [(0.1, 0.2), (0.0, 0.1, 1.0), [0.1, 0.2, 1.0]])
def test_a_reach_that_cannot_be_used_is_refused(reach):
    refused("reach must be three positive numbers, or None", lambda: vector("grouped", 3, reach=reach))


@either_way
def test_a_splitting_solve_that_begins_at_its_solution_stays_there(conditioning):
    cell, x = make_cell("monotone dense", batch=6)
    solver, z0 = (
        make_learned("meta-splitting", Layout("vector", (12,)), conditioning=conditioning, initializer_width=8),
        initial_state(cell, x),
    )
    astray(solver)
    with torch.no_grad():
        cold = mb.solve(cell, z0, x, solver=solver, rtol=1e-5, max_nfe=150)
        warm = mb.solve(cell, cold.z, x, solver=solver, rtol=1e-5)
        near = mb.solve(cell, cold.z + 1e-3, x, solver=solver, rtol=1e-5, max_nfe=150)
    assert warm.nfe.max() <= 2
    assert near.nfe.double().mean() < cold.nfe.double().mean() - 1


# --- what a solve leaves, and what rounding makes of it


@by_both
def test_samples_that_leave_in_several_goes_take_their_own_pairs_along(name):
    layout, f, z0, x = problem_of("vector", batch=6, dtype=DOUBLE)
    solver = made(name, layout, learned_steps=4, conditioning="input", initializer_width=0).double()
    first, then = torch.tensor([5, 3, 1, 0]), torch.tensor([2, 0])
    stay = first[then]
    z, _, state, _ = walked(solver, f, z0, x, 3)
    state, z, problem = solver.gather(solver.gather(state, first), then), z[stay], UnrolledProblem(f, z0[stay], x[stay])
    with torch.no_grad():
        for _ in range(4):
            z, state, _ = solver.step(z, f(z, x[stay]) - z, state, problem)
    torch.testing.assert_close(z, walked(solver, f, z0[stay], x[stay], 7)[0])


def test_a_solve_that_ends_in_its_gated_steps_leaves_as_many_pairs_as_its_memory_holds():
    layout, f, z0, x = problem_of("vector", dtype=DOUBLE)
    options = {"conditioning": "input", "memory": 3, "ridge": 1e-14, "initializer_width": 0}
    solver, points = made("meta-broyden", layout, learned_steps=20, **options).double(), []
    *_, state, _ = walked(solver, lambda z, x: points.append(z) or f(z, x), z0, x, 6)
    w = normal(*x.shape, seed=8, dtype=DOUBLE)
    with torch.no_grad():
        back = solver.rmatvec(w, solver.inverse(state, torch.arange(len(x))))
    z = torch.stack(points[:6])  # up to where the last step began
    g = torch.stack([f(point, x) - point for point in z])
    for k in (3, 4, 5):  # Bᵀw·Δg = w·Δz, as BΔg = Δz
        left, right = (back * (g[k] - g[k - 1])).sum(1), (w * (z[k] - z[k - 1])).sum(1)
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-8)


def test_an_lstms_correction_has_the_size_of_the_residual():
    layout, _f, z0, x = problem_of("vector", dtype=DOUBLE)
    solver = made(BY_LSTM, layout, conditioning="input", initializer_width=0).double().requires_grad_(False)
    for weight in solver.preconditioner.parameters():
        weight.normal_(generator=torch.Generator().manual_seed(1))
    solver.coefficients.lstm.offset[-solver.rank :] = 1.0  # the correction, whatever is seen
    problem, moves = UnrolledProblem(lambda z, x: z, z0, x), []
    for size in (1.0, 1e-3):
        g = size * x
        moves.append(solver.step(z0, g, solver.init(z0, g, problem), problem).z / size)
    torch.testing.assert_close(*moves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ridge_of_secants_is_no_smaller_than_rounding_makes_sensible(dtype):
    secants = Secants(Layout("vector", (6,)), memory=3, ridge=1e-8)
    z, g, z1, g1 = normal(4, 2, 6, dtype=dtype)
    with torch.no_grad():
        state = secants.update(z1, g1, secants.init(z, g, (6,)), (6,))
    lifted = state.gram[:, 0, 0, 0] / (g1 - g).double().square().sum(1) - 1
    floor = max(1e-8, 100 * torch.finfo(dtype).eps)
    assert ((lifted - floor).abs() < (2e-7 if dtype == torch.float32 else 1e-12)).all()


def test_secants_of_small_samples_do_not_cost_the_square_of_the_memory():
    secants = Secants(Layout("vector", (1,)), memory=10, ridge=1e-8)
    state = secants.init(torch.zeros(5, 1), torch.ones(5, 1), (1,))
    assert state.gram.shape == (5, 1, 1, 1)
    assert state.residuals.shape == (5, 1, 1)
