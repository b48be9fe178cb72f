"""Learned solvers: they start as Picard, run on every layout, and never strand a sample."""

from __future__ import annotations

import math

import pytest
import torch

import metabroyden as mb
from metabroyden.deq import initial_state
from metabroyden.learned import GroupedConfig, LearnedConfig, Safeguard
from metabroyden.learned.layout import Layout, guess_layout
from metabroyden.learned.mixer import Mixer
from metabroyden.learned.secants import Secants
from metabroyden.meta.defaults import dilations, gated_steps
from metabroyden.meta.fit import make_learned
from metabroyden.meta.orthogonal import is_matrix
from metabroyden.meta.unroll import UnrolledProblem, unroll
from metabroyden.zoo.models.cells import make_cell
from tests.conftest import tanh

SHAPES = {"vector": (12,), "nct": (4, 6), "ntc": (6, 4), "image": (4, 5, 5)}


def problem_of(kind: str, batch: int = 5, gain: float = 0.7, dtype: torch.dtype = torch.float32):
    """A contraction over states of this layout that mixes channels, with its contexts."""
    layout = Layout(kind, SHAPES[kind])
    c = layout.channels
    w = gain * torch.linalg.qr(torch.randn(c, c, generator=torch.Generator().manual_seed(0))).Q.to(dtype)

    def f(z, x):
        return (
            torch.tanh(z @ w + x)
            if kind in ("vector", "ntc")
            else torch.tanh(torch.einsum("bc...,cd->bd...", z, w) + x)
        )

    x = torch.randn(batch, *layout.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return layout, f, torch.zeros_like(x), x


BY_LSTM = "meta-broyden by LSTM"
by_both = pytest.mark.parametrize("name", ["meta-broyden", BY_LSTM])
of_each_layout = pytest.mark.parametrize("kind", SHAPES)
LEARNED = mb.list_solvers(learned=True, splitting=False, adjoint=False)
EVERY = [*LEARNED, BY_LSTM]
CASES = [(name, kind) for name in EVERY for kind in SHAPES]


def made(name, layout, *, learned_steps=None, **options):
    """An untrained solver, with dilated maps where states have extents."""
    if name in ("meta-broyden", BY_LSTM):
        given = {"learned_steps": learned_steps} if learned_steps else {}
        coefficients = "lstm" if name == BY_LSTM else "schedule"
        reach = (1, 1) if layout.kind in ("vector", "pyramid") else (1, 2)
        options = {"coefficients": coefficients, "dilations": reach, **given, **options}
    return make_learned("meta-broyden" if name == BY_LSTM else name, layout, **options)


def perturbed(solver, size: float, seed: int = 2):
    """The solver, with noise of this size on its weights."""
    generator = torch.Generator()
    for parameter in solver.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator.manual_seed(seed))
    return solver


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("conditioning", ["initial_value", "input"])
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
    problem = tanh(batch=40, n=16, gain=1.6, seed=3)
    safeguard = Safeguard(horizon=6, patience=3)
    alone = mb.solve(problem.f, problem.z0, problem.x, solver=safeguard.fallback(), rtol=1e-7, max_nfe=60, throw=False)
    assert alone.converged.any()
    helped = mb.solve(
        problem.f, problem.z0, problem.x, solver=Poison(safeguard), rtol=1e-7, max_nfe=60 + 200, throw=False
    )
    assert helped.converged[alone.converged].all()
    again = mb.relative_residual(helped.z, problem.f(helped.z, problem.x))
    torch.testing.assert_close(again, helped.residual, rtol=1e-5, atol=1e-14)  # cohorts did not mix up their samples
    phases = helped.trace.phase
    assert (phases == 1).any(dim=0).sum() > 0


def test_a_resumed_phase_that_stalls_starts_again_from_z0_and_repeats_broydens_own_path():
    problem = tanh(batch=12, n=16, gain=2.5)
    safeguard = Safeguard(horizon=2, patience=1, resumed_patience=1)
    solution = mb.solve(problem.f, problem.z0, problem.x, solver=Poison(safeguard), rtol=1e-8, max_nfe=200, throw=False)
    broyden = mb.solve(problem.f, problem.z0, problem.x, solver=safeguard.fallback(), rtol=1e-8, max_nfe=200)
    restarted = (solution.trace.phase == 2).any(dim=0).nonzero().flatten().tolist()
    assert len(restarted) >= 3
    for sample in restarted:
        last = solution.trace.residual[solution.trace.phase[:, sample] == 2, sample]
        own = broyden.trace.residual[:, sample]
        own = own[~own.isnan()]
        torch.testing.assert_close(last[: len(own)], own[: len(last)])


def test_hand_over_costs_no_evaluation(nonlinear):
    safeguard = Safeguard(horizon=3, patience=None)
    torch.manual_seed(0)
    solver = mb.GroupedLSTM(
        GroupedConfig(layout="vector", shape=(12,), conditioning="input", safeguard=safeguard)
    ).double()
    solution = mb.solve(nonlinear.f, nonlinear.z0, nonlinear.x, solver=solver, rtol=1e-9, max_nfe=60)
    phase = solution.trace.phase[:, 0]
    assert phase.tolist()[:5] == [0, 0, 0, 0, 1]
    assert solution.trace.nfe[:5, 0].tolist() == [1, 2, 3, 4, 5]


def test_a_sequence_solver_does_not_look_ahead():
    """With a causal f, what happens at the last tokens changes nothing at earlier ones before secants are taken."""
    for kind in ("nct", "ntc"):
        layout, f, z0, x = problem_of(kind)
        for name in EVERY:
            if name in ("hyper-anderson", "universal"):  # weights of the whole sample: they do, as Anderson's do
                continue
            solver = perturbed(made(name, layout, learned_steps=3, safeguard=Safeguard(horizon=50, patience=None)), 0.1)
            changed = x.clone()
            time = 2 if kind == "nct" else 1
            changed.narrow(time, 4, 2).add_(1)
            found = [mb.solve(f, z0, at, solver=solver, rtol=0.0, max_nfe=6, throw=False) for at in (x, changed)]
            # the driver returns the best iterate of the sample, so compare it where both picked the same one
            best = [solution.trace.residual.argmin(dim=0) for solution in found]
            same = best[0] == best[1]
            assert same.any()
            early = [solution.z[same].narrow(time, 0, 4) for solution in found]
            torch.testing.assert_close(early[0], early[1], rtol=1e-5, atol=1e-6)


def test_it_runs_on_other_extents_but_not_on_other_channels():
    solver = make_learned("grouped", Layout("image", (4, 5, 5)))
    x = torch.randn(2, 4, 7, 3)
    assert mb.solve(lambda z, x: 0.5 * z + x, torch.zeros_like(x), x, solver=solver).converged.all()
    with pytest.raises(ValueError, match=r"4 channels\); got per-sample shape \(3, 5, 5\)"):
        mb.solve(lambda z, x: 0.5 * z + x, torch.zeros(2, 3, 5, 5), torch.ones(2, 3, 5, 5), solver=solver)
    pair = (torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="fitted to one tensor"):
        mb.solve(lambda z: z, pair, solver=solver)


def test_a_flattened_state_is_recognised():
    layout, f, z0, x = problem_of("image")
    solver = make_learned("grouped", layout)
    flat = mb.solve(lambda z, x: f(z.reshape(x.shape), x).flatten(1), z0.flatten(1), x, solver=solver, rtol=1e-5)
    full = mb.solve(f, z0, x, solver=solver, rtol=1e-5)
    torch.testing.assert_close(flat.z, full.z.flatten(1))


def test_a_native_context_that_is_missing_or_misshapen_is_refused():
    solver = make_learned("grouped", Layout("image", (4, 5, 5)), conditioning="input")
    z0 = torch.zeros(2, 4, 5, 5)
    with pytest.raises(ValueError, match="conditioning='input'"):
        mb.solve(lambda z: 0.5 * z, z0 + 1, solver=solver)
    with pytest.raises(ValueError, match=r"needs a context tensor with 4 channels.*got shape \(2, 7, 5, 5\)"):
        mb.solve(lambda z, x: 0.5 * z, z0 + 1, torch.ones(2, 7, 5, 5), solver=solver)


def test_a_state_of_another_dtype_is_refused_with_the_remedy():
    solver = make_learned("grouped", Layout("vector", (3,)))
    z0 = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"weights are torch.float32, the state is torch.float64: solver.to\("):
        mb.solve(lambda z: 0.5 * z + 1, z0, solver=solver)
    assert mb.solve(lambda z: 0.5 * z + 1, z0, solver=solver.to(torch.float64)).converged.all()


def test_layouts_are_guessed_only_where_unambiguous():
    assert guess_layout((7,)).kind == "vector"
    assert guess_layout((3, 8, 8)).kind == "image"
    with pytest.raises(ValueError, match="layout= is needed"):
        guess_layout((5, 6))
    with pytest.raises(ValueError, match="layout must be one of"):
        Layout("nhwc", (8, 8, 3))
    with pytest.raises(ValueError, match="wants 3 axes"):
        Layout("image", (8, 8))


@pytest.mark.parametrize("options", [{"conditioning": "x"}, {"hidden": 0}, {"initializer_width": -1}])
def test_bad_sizes_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        LearnedConfig(layout="vector", shape=(3,), **options)
    with pytest.raises(ValueError, match="rank"):
        GroupedConfig(layout="vector", shape=(3,), rank=0)


@by_both
@pytest.mark.parametrize("kind", [*SHAPES, "pyramid"])
def test_what_metabroyden_hands_over_is_the_inverse_that_it_stepped_with(kind, name):
    """B₀ of Broyden: the step of a table of one row, or the first one of an LSTM that says nothing; and its transpose."""
    layout = SCALES if kind == "pyramid" else Layout(kind, SHAPES[kind])
    solver = made(
        name, layout, learned_steps=1, damping=0.25, context_channels=layout.channels, conditioning="input"
    ).double()
    weights = [solver.coefficients.channel] if name == BY_LSTM else solver.coefficients.parameters()
    for parameter in (*weights, *solver.preconditioner.parameters()):
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    n = sum(math.prod(s) for s in layout.shape) if kind == "pyramid" else math.prod(layout.shape)
    z, g, w = torch.randn(3, 2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    class Problem:
        shape = layout.shape
        context = layout.canonical(w, layout.shape) if kind != "ntc" else w.view(2, *layout.shape)

    (phase, *_) = (phase for phase in solver.phases() if isinstance(phase.solver, mb.Broyden))
    inverse = phase.solver.initial
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
    gates = solver.preconditioner.gates(z0, x)
    a, b = torch.randn_like(x), torch.randn_like(x)
    apply = solver.preconditioner
    torch.testing.assert_close(
        apply(2 * a - 3 * b, gates), 2 * apply(a, gates) - 3 * apply(b, gates), rtol=1e-3, atol=1e-3
    )


SCALES = Layout("pyramid", ((2, 4, 4), (3, 2, 2)))


def several_scales(z, x):
    """A contraction of two resolutions into each other; x is an image of the finer."""
    fine, coarse = z
    up = torch.nn.functional.interpolate(coarse[:, :2], scale_factor=2)
    down = torch.nn.functional.avg_pool2d(fine, 2).mean(1, keepdim=True)
    return torch.tanh(0.5 * fine.roll(1, 3) + 0.3 * up + x), torch.tanh(0.5 * coarse.roll(1, 1) + 0.3 * down)


@pytest.mark.parametrize("kernel", [1, 3])
def test_maps_of_several_scales_part_by_part_are_those_of_the_canonical_form(kernel):
    layout = Layout("pyramid", ((2, 8, 8), (3, 4, 4), (5, 2, 2)))
    flat = torch.randn(3, 2 * 64 + 3 * 16 + 5 * 4, dtype=torch.float64)
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
    weight = torch.rand(3, 1, 2, 2, dtype=torch.float64)
    weighed = [part * w for part, w in zip(parts, layout.spread(weight), strict=True)]
    torch.testing.assert_close(layout.joined(weighed), layout.flat(canonical * weight))


def test_scales_are_brought_to_the_coarsest_and_back_without_loss():
    flat = torch.randn(3, 2 * 16 + 3 * 4)
    canonical = SCALES.canonical(flat, SCALES.shape)
    assert canonical.shape == (3, SCALES.channels, 2, 2)
    assert torch.equal(SCALES.flat(canonical), flat)
    fine = flat[:, :32].reshape(3, 2, 4, 4)
    assert torch.equal(canonical[:, :4, 0, 0], fine[:, 0, :2, :2].flatten(1)), (
        "a coarse pixel holds the fine ones in it"
    )
    assert SCALES.resolve((torch.Size([2, 8, 8]), torch.Size([3, 4, 4]))) == ((2, 8, 8), (3, 4, 4))
    for wrong in ((torch.Size([2, 8, 8]), torch.Size([3, 2, 2])), (torch.Size([2, 4, 4]),), torch.Size([7])):
        with pytest.raises(ValueError, match="several scales"):
            SCALES.resolve(wrong)
    with pytest.raises(ValueError, match="multiples of the last"):
        Layout("pyramid", ((2, 5, 5), (3, 2, 2)))


@pytest.mark.parametrize("name", LEARNED)
def test_states_of_several_scales_are_solved(name):
    x = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    z0 = torch.zeros(5, 2, 4, 4), torch.zeros(5, 3, 2, 2)
    native = {} if name == "coordinatewise" else {"conditioning": "input", "context_channels": 8}
    for options in ({}, native):
        solver = perturbed(make_learned(name, SCALES, **options), 0.02)
        found = mb.solve(several_scales, z0, x, solver=solver, rtol=1e-5, max_nfe=100)
        wanted = mb.solve(several_scales, z0, x, solver=mb.Broyden(), rtol=1e-6, max_nfe=100)
        for ours, theirs in zip(found.z, wanted.z, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


# with 6 there are as many pairs as a token has coordinates: ill-conditioned
@pytest.mark.parametrize(("learned", "rtol", "atol"), [(3, 1e-4, 1e-6), (6, 1e-3, 3e-4)])
@of_each_layout
def test_the_secant_phase_is_andersons_on_the_pairs_of_the_learned_steps(kind, learned, rtol, atol):
    """Untrained, B₀ = −I: each late step must be the multisecant one, of all pairs up to each token for sequences."""
    layout, f, z0, x = problem_of(kind, gain=0.9, dtype=torch.float64)
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


@by_both
@of_each_layout
@pytest.mark.parametrize("steps", [2, 7])
def test_the_transposed_inverse_is_that_of_the_step(kind, steps, name):
    """⟨Bg, w⟩ = ⟨g, Bᵀw⟩ with B read off the quasi-Newton step itself, and early on B = B₀."""
    layout, f, z0, x = problem_of(kind, batch=3, gain=0.9, dtype=torch.float64)
    solver = perturbed(made(name, layout, learned_steps=3, memory=4).double(), 0.1)

    class Problem:
        shape = layout.shape
        context = x

        def origin(self):
            return f(z0, x).flatten(1)

    with torch.no_grad():
        problem, z = Problem(), z0.flatten(1)
        g = f(z.view_as(z0), x).flatten(1) - z
        state = solver.init(z, g, problem)
        for _ in range(steps):
            z, state = solver.step(z, g, state, problem)[:2]
            g = f(z.view_as(z0), x).flatten(1) - z
        frozen = solver.inverse(state, torch.arange(3))
        one, other = (
            torch.randn(z.shape, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (5, 6)
        )

        def b(v):
            known, rest = solver.secants.project(v, solver._pairs(state, layout.shape), layout.shape)
            return known + solver._initial_inverse(rest, state, layout.shape)

        left, right = (b(one) * other).sum(1), (one * solver.rmatvec(other, frozen)).sum(1)
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)
        if steps == 7:  # and b is what the step does: z⁺ = z − Bg
            noted = solver.secants.update(z, g, state.secants, layout.shape)
            state = state._replace(secants=noted)
            torch.testing.assert_close(z - b(g), solver.step(z, g, state._replace(secants=noted._replace(
                steps=noted.steps - 1, z=state.secants.z * 0 + noted.z - noted.moves[:, (noted.steps - 2) % 4],
                g=noted.g - noted.residuals[:, (noted.steps - 2) % 4])), problem).z, rtol=1e-7, atol=1e-9)  # fmt: skip


@by_both
@pytest.mark.parametrize("memory", [1, 3])
def test_a_sample_goes_its_way_whoever_else_is_in_the_batch(memory, name):
    """Samples that leave at different times take their rows of the trail, and of the secants, along."""
    solver = perturbed(
        made(name, Layout("vector", (8,)), conditioning="input", learned_steps=5, memory=memory).double(), 0.05
    )
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rate = torch.linspace(0.05, 0.95, 9, dtype=torch.float64).unsqueeze(1)

    def f(z, context):
        slope, shift = context[1], context[0]
        return slope * torch.tanh(z.roll(1, 1)) + shift

    whole = mb.solve(f, torch.zeros_like(x), (x, rate), solver=solver, rtol=1e-9, max_nfe=60)
    assert len(set(whole.nfe.tolist())) > 3, "or nothing was gathered"
    assert whole.steps.max() > 5, "or no secants were taken"
    for b in range(9):
        alone = mb.solve(
            f, torch.zeros_like(x[:1]), (x[b : b + 1], rate[b : b + 1]), solver=solver, rtol=1e-9, max_nfe=60
        )
        assert abs(int(alone.nfe) - int(whole.nfe[b])) <= 1
        first = min(int(alone.nfe), 12)
        torch.testing.assert_close(
            whole.trace.residual[:first, b], alone.trace.residual[:first, 0], rtol=1e-5, atol=1e-10, equal_nan=True
        )


@by_both
def test_gates_are_set_anew_at_every_step(name):
    solver = made(name, Layout("vector", (8,)), initializer_width=0)
    with torch.no_grad():
        if name == BY_LSTM:
            solver.coefficients.lstm.offset[2 : 2 + solver.rank] = 0.5
        else:
            solver.coefficients.gates[0, 2] = 1.5
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
        problem = UnrolledProblem(lambda z, x: 0.5 * z + x, torch.zeros_like(x), x)
        state = solver.init(x, x, problem)
        for _ in range(3):
            state = solver.step(x, x, state, problem).state
    torch.testing.assert_close(state.gates, 1.5 * state.initial)


def test_a_pair_of_nothing_takes_no_other_with_it():
    secants = Secants(Layout("vector", (6,)), memory=4, ridge=1e-8)
    generator = torch.Generator().manual_seed(0)
    points = [torch.randn(2, 6, generator=generator, dtype=torch.float64) for _ in range(4)]
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
    solver = make_learned("meta-broyden", Layout("vector", (4,)), learned_steps=10_000, initializer_width=0)
    with torch.no_grad():
        solver.coefficients.step_size.fill_(0.01)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    solution = mb.solve(lambda z, x: 0.5 * z + x, torch.zeros(3, 4), x, solver=solver, rtol=1e-5, max_nfe=100)
    assert (solution.trace.phase > 0).any(dim=0).all()


def test_what_weighs_and_how_far_is_checked():
    with pytest.raises(ValueError, match="coefficients must be one of schedule, lstm, got 'gru'"):
        make_learned("meta-broyden", Layout("vector", (6,)), coefficients="gru")
    for layout in (Layout("vector", (6,)), SCALES):
        with pytest.raises(
            ValueError, match="dilations must be at least 1, and are 1 for layouts 'vector' and 'pyramid'; got 2"
        ):
            make_learned("meta-broyden", layout, dilations=(2, 1))


@pytest.mark.parametrize("kind", ["nct", "ntc"])
def test_a_dilated_preconditioner_reaches_eight_evaluations_of_f_back_without_a_gap(kind):
    class Cell:
        dilation = 2

    layout = Layout(kind, (20, 3) if kind == "ntc" else (3, 20))
    reach = dilations(Cell(), kind)
    assert reach == (2, 6)
    assert dilations(torch.nn.Conv1d(3, 3, 3), kind) == (1, 3), "a tuple says nothing"
    assert dilations(Cell(), "vector") == (1, 1)
    p = make_learned("meta-broyden", layout, dilations=reach).preconditioner
    for weight in p.parameters():
        weight.data.fill_(1.0)
    impulse = torch.zeros(1, 3, 20)
    impulse[..., 1] = 1
    seen = p(impulse, torch.ones(1, p.inward.map.weight.shape[0], 20))[0, 0].nonzero().flatten().tolist()
    assert seen == list(range(1, 18, 2))


def test_secants_begin_where_training_ended_on_vectors_and_with_an_lstm():
    assert gated_steps(28, "image") == {"schedule_length": 28, "learned_steps": 42}
    assert gated_steps(6, "nct") == {"schedule_length": 6, "learned_steps": 14}
    assert gated_steps(28, "vector") == gated_steps(28, "image", "lstm") == {"schedule_length": 28, "learned_steps": 28}


def test_a_table_is_no_matrix_to_the_optimizer():
    solver = make_learned("meta-broyden", Layout("vector", (32,)), learned_steps=12)
    assert not any(is_matrix(weight) for weight in solver.coefficients.parameters())


def test_the_last_row_of_a_table_goes_on():
    with pytest.raises(ValueError, match="schedule_length must be at most learned_steps, 4, got 5"):
        make_learned("meta-broyden", Layout("vector", (12,)), learned_steps=4, schedule_length=5)
    short, long = (
        make_learned(
            "meta-broyden", Layout("vector", (12,)), learned_steps=9, schedule_length=rows, initializer_width=0
        ).double()
        for rows in (3, 9)
    )
    for name, weight in short.coefficients.named_parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)
        later = weight.data[:, -1:].expand(-1, 6, -1)
        dict(long.coefficients.named_parameters())[name].data.copy_(torch.cat([weight.data, later], dim=1))
    _, f, z0, x = problem_of("vector", dtype=torch.float64)
    found = [unroll(solver, f, z0, x, steps=12, backend="native").residuals for solver in (short, long)]
    torch.testing.assert_close(*found)
    assert (short.trained_for, long.trained_for) == (3, 9)


def astray(solver):
    """The solver with a start that is far from any solution."""
    perturbed(solver.initializer, 0.5, seed=4)
    return solver.eval().requires_grad_(False)


@pytest.mark.parametrize("conditioning", ["initial_value", "input"])
@pytest.mark.parametrize("name", EVERY)
def test_a_solve_that_begins_at_or_near_its_solution_stays_there(name, conditioning):
    layout, f, z0, x = problem_of("vector")
    solver = astray(made(name, layout, conditioning=conditioning, initializer_width=8))
    cold = mb.solve(f, z0, x, solver=solver, rtol=1e-4, max_nfe=90)
    assert cold.nfe.double().mean() > 4
    warm = mb.solve(f, cold.z, x, solver=solver, rtol=1e-4)
    assert warm.nfe.tolist() == [1] * len(x)
    assert torch.equal(warm.z, cold.z)
    close = cold.z + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    near = mb.solve(f, close, x, solver=solver, rtol=1e-4, max_nfe=90)
    assert near.nfe.double().mean() < cold.nfe.double().mean() - 1
    fixed = mb.FixedBudget(f, solver, max_nfe=3, rtol=1e-4, compiled=False)(cold.z, x)
    assert fixed.converged.all()


@pytest.mark.parametrize("conditioning", ["initial_value", "input"])
def test_warm_samples_change_nothing_for_cold_ones_beside_them(conditioning):
    layout, f, z0, x = problem_of("vector")
    solver = astray(made("meta-broyden", layout, conditioning=conditioning, initializer_width=8))
    cold = mb.solve(f, z0, x, solver=solver, rtol=1e-4, max_nfe=90)
    mixed = mb.solve(f, torch.cat([cold.z[:2], z0[2:]]), x, solver=solver, rtol=1e-4, max_nfe=90)
    assert mixed.nfe[:2].tolist() == [1, 1]
    assert mixed.nfe[2:].tolist() == cold.nfe[2:].tolist()
    torch.testing.assert_close(mixed.z[2:], cold.z[2:])


def test_a_start_that_is_neither_zero_nor_close_is_the_learned_one():
    layout, f, z0, x = problem_of("vector")
    solver = astray(made("meta-broyden", layout, conditioning="input", initializer_width=8))
    far = z0 + 3
    seen = []

    def recorded(z, x):
        seen.append(z.clone())
        return f(z, x)

    mb.solve(recorded, far, x, solver=solver, rtol=1e-4, max_nfe=90)
    torch.testing.assert_close(seen[1], far + solver.initializer(x))


@pytest.mark.parametrize("conditioning", ["initial_value", "input"])
def test_a_splitting_solve_that_begins_at_its_solution_stays_there(conditioning):
    cell, x = make_cell("monotone dense", batch=6)
    solver = astray(
        make_learned("meta-splitting", Layout("vector", (12,)), conditioning=conditioning, initializer_width=8)
    )
    z0 = initial_state(cell, x)
    with torch.no_grad():
        cold = mb.solve(cell, z0, x, solver=solver, rtol=1e-5, max_nfe=150)
        warm = mb.solve(cell, cold.z, x, solver=solver, rtol=1e-5)
        near = mb.solve(cell, cold.z + 1e-3, x, solver=solver, rtol=1e-5, max_nfe=150)
    assert warm.nfe.max() <= 2
    assert near.nfe.double().mean() < cold.nfe.double().mean() - 1


def walked(solver, f, z, x, steps):
    """(z, g, state, problem) after so many steps, without a driver."""
    problem = UnrolledProblem(f, z, x)
    with torch.no_grad():
        g = f(z, x) - z
        state = solver.init(z, g, problem)
        for _ in range(steps):
            z, state, _ = solver.step(z, g, state, problem)
            g = f(z, x) - z
    return z, g, state, problem


@by_both
def test_samples_that_leave_in_several_goes_take_their_own_pairs_along(name):
    layout, f, z0, x = problem_of("vector", batch=6, dtype=torch.float64)
    solver = (
        made(name, layout, learned_steps=4, conditioning="input", initializer_width=0).double().requires_grad_(False)
    )
    stay = torch.tensor([5, 3, 1, 0])[[2, 0]]
    z, g, state, _ = walked(solver, f, z0, x, 3)
    state = solver.gather(solver.gather(state, torch.tensor([5, 3, 1, 0])), torch.tensor([2, 0]))
    z, problem = z[stay], UnrolledProblem(f, z0[stay], x[stay])
    for _ in range(4):
        g = f(z, x[stay]) - z
        z, state, _ = solver.step(z, g, state, problem)
    alone, *_ = walked(solver, f, z0[stay], x[stay], 7)
    torch.testing.assert_close(z, alone)


def test_a_solve_that_ends_in_its_gated_steps_leaves_as_many_pairs_as_its_memory_holds():
    layout, f, z0, x = problem_of("vector", dtype=torch.float64)
    solver = made(
        "meta-broyden", layout, learned_steps=20, conditioning="input", memory=3, ridge=1e-14, initializer_width=0
    ).double()
    points, images = [], []

    def recorded(z, x):
        points.append(z), images.append(f(z, x))
        return images[-1]

    _, _, state, _ = walked(solver.requires_grad_(False), recorded, z0, x, 6)
    w = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(8))
    back = solver.rmatvec(w, solver.inverse(state, torch.arange(len(x))))
    z, g = torch.stack(points[:6]), torch.stack(images[:6]) - torch.stack(points[:6])  # up to where the last step began
    for k in (3, 4, 5):  # Bᵀw·Δg = w·Δz, as BΔg = Δz
        torch.testing.assert_close(
            (back * (g[k] - g[k - 1])).sum(1), (w * (z[k] - z[k - 1])).sum(1), rtol=1e-5, atol=1e-8
        )


def test_an_lstms_correction_has_the_size_of_the_residual():
    layout, _f, z0, x = problem_of("vector", dtype=torch.float64)
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
    z, g, z1, g1 = torch.randn(4, 2, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        state = secants.update(z1, g1, secants.init(z, g, (6,)), (6,))
    lifted = state.gram[:, 0, 0, 0] / (g1 - g).double().square().sum(1) - 1
    floor = 100 * torch.finfo(dtype).eps
    assert ((lifted - max(1e-8, floor)).abs() < max(2e-7 if dtype == torch.float32 else 0, 1e-12)).all()


def test_secants_of_small_samples_do_not_cost_the_square_of_the_memory():
    secants = Secants(Layout("vector", (1,)), memory=10, ridge=1e-8)
    state = secants.init(torch.zeros(5, 1), torch.ones(5, 1), (1,))
    assert state.gram.shape == (5, 1, 1, 1)
    assert state.residuals.shape == (5, 1, 1)
