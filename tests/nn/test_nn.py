"""The training aids: penalties, spectral radius, normalisation, dropout, losses on the way, warm starts."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import metabroyden as mb
from metabroyden.learned import GroupedConfig
from metabroyden.nn import held_masks
from metabroyden.nn.dropout import stochastic_layers
from metabroyden.nn.pin import pin
from metabroyden.zoo.models import ConvCell
from tests.helpers import DOUBLE, normal, refused
from tests.test_deq import tight

close = torch.testing.assert_close


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


class Cell(nn.Module):
    """tanh(dropout(W₂ tanh(W₁ z)) + x), with a record of the weights and masks of every evaluation."""

    def __init__(self, n: int = 6, p: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(n, n), nn.Linear(n, n)
        self.drop = mb.VariationalDropout(p, (n,))
        self.seen: list[torch.Tensor] = []
        for layer in (self.first, self.second):
            nn.init.orthogonal_(layer.weight, gain=0.7)
        self.double()

    def forward(self, z, x):
        self.seen.append(self.first.weight)
        return torch.tanh(self.drop(self.second(torch.tanh(self.first(z)))) + x)


def gradcheck(deq, x, before=lambda: None):
    """Gradients of a DEQ call towards x and every parameter, against finite differences."""
    names = [name for name, _ in deq.named_parameters()]

    def run(x, *values):
        before()
        return torch.func.functional_call(deq, dict(zip(names, values, strict=True)), (x,))

    x = x.clone().requires_grad_()
    return torch.autograd.gradcheck(run, (x, *deq.parameters()), eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)


# --- Jacobian penalty


def test_the_penalty_and_its_gradient_are_unbiased():
    w, scales, draws = random(5, 5).requires_grad_(), torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE), []
    closed = scales.square().mean() * w.square().sum() / 5
    wanted = torch.cat([closed.detach()[None], torch.autograd.grad(closed, w)[0].flatten()])
    for seed in range(400):
        generator, z = torch.Generator().manual_seed(seed), torch.zeros(3, 5, dtype=DOUBLE)
        penalty = mb.jacobian_penalty(lambda z, s: s[:, None] * (z @ w), z, scales, generator=generator)
        draws.append(torch.cat([penalty.detach()[None], torch.autograd.grad(penalty, w)[0].flatten()]))
    draws = torch.stack(draws)
    errors = (draws.mean(0) - wanted).abs() / (draws.std(0) / len(draws) ** 0.5)
    assert errors.max() < 4.5
    assert draws[:, 0].std() > 0.01 * closed  # or the standard error would say nothing


def counting(f):
    """(f, a list that grows with each of its calls)."""
    calls = []
    return lambda *z: calls.append(1) or f(*z), calls


def test_more_probes_cost_one_evaluation_and_scatter_less():
    w, z = random(8, 8), torch.zeros(1, 8, dtype=DOUBLE)
    f, calls = counting(lambda z: z @ w)
    few, many = (torch.stack([mb.jacobian_penalty(f, z, probes=n) for _ in range(100)]) for n in (1, 16))
    assert len(calls) == 200
    assert many.std() < 0.5 * few.std()


@pytest.mark.parametrize("batch", [1, 7])
def test_penalty_and_radius_of_simple_maps(batch):
    """Whatever the batch; 0 where f does not depend on z; a sample that is not finite spoils its own radius alone."""
    w, z, x = torch.diag(torch.arange(1.0, 5.0)), torch.zeros(batch, 4), torch.ones(batch, 4)
    close(mb.jacobian_penalty(lambda z: z @ w, z), torch.tensor(7.5))  # signs squared: no variance
    assert mb.jacobian_penalty(lambda z, x: x, z, x) == 0
    assert torch.equal(mb.spectral_radius(lambda z, x: x, z, x), torch.zeros(batch))
    scale = torch.tensor([2.0, float("nan")])
    close(mb.spectral_radius(lambda z, s: z * s[:, None], torch.zeros(2, 3), scale), scale, equal_nan=True)


def test_the_penalty_takes_states_of_several_tensors_and_leaves_z_alone():
    a, b = torch.ones(3, 2, requires_grad=True), torch.zeros(3, 1, 2)
    scale = torch.tensor(3.0, requires_grad=True)
    penalty = mb.jacobian_penalty(lambda z: (z[1][:, 0] * scale, 2 * z[0][:, None]), (a, b))
    close(penalty, torch.tensor(2 * (9 + 4) / 4))
    penalty.backward()
    close(scale.grad, torch.tensor(3.0))  # 2·9/4 → 4·s/4
    assert a.grad is None


def test_the_penalty_lowers_the_spectral_radius():
    cell, x, radii = Cell(), random(8, 6), []
    deq, optimizer = mb.DEQ(cell), torch.optim.Adam(cell.parameters(), lr=1e-2)
    for _ in range(20):
        deq(x)
        z = deq.last_solution.z
        radii.append(mb.spectral_radius(cell, z, x).mean())
        optimizer.zero_grad()
        mb.jacobian_penalty(cell, z, x).backward()
        optimizer.step()
    assert radii[-1] < 0.7 * radii[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 12)

    def forward(self, z, x):
        return x + 0.5 * nn.functional.scaled_dot_product_attention(*self.map(z).chunk(3, dim=-1))


def test_the_penalty_and_second_derivatives_go_through_attention():
    cell, x = Attention(), torch.randn(3, 5, 4)
    deq, weight = mb.DEQ(cell, rtol=1e-5, backward=mb.Implicit(rtol=1e-5)), cell.map.weight
    deq(x)
    (gradient,) = torch.autograd.grad(mb.jacobian_penalty(cell, deq.last_solution.z, x, probes=2), weight)
    assert float(gradient.abs().sum()) > 0

    def second(layer):
        (first,) = torch.autograd.grad(layer(x).square().sum(), weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)[0]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = second(mb.DEQ(cell, backward=mb.Unroll(40)))
    close(second(deq), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("made_within", [False, True])
def test_penalty_and_radius_are_right_in_inference_mode(made_within):
    cell, x, z = Cell(), random(3, 6), random(3, 6)

    def look(z, x) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        return mb.spectral_radius(cell, z, x), mb.jacobian_penalty(cell, z, x, generator=generator).detach()

    wanted = look(z, x)
    with torch.inference_mode():
        for ours, true in zip(look(*((z.clone(), x.clone()) if made_within else (z, x))), wanted, strict=True):
            close(ours, true)
            assert float(ours.min()) > 0


# --- Spectral radius


def matrices(kind: str, batch: int = 4, n: int = 12) -> torch.Tensor:
    a, core = normal(batch, n, n, seed=3, dtype=DOUBLE), torch.diag_embed(torch.linspace(-0.5, 0.5, n, dtype=DOUBLE))
    core[:2, :2] = torch.tensor([[0.0, 0.95], [-0.95, 0.0]])
    return {
        "nonsymmetric": lambda: a,
        "symmetric": lambda: a + a.mT,
        "rotation": lambda: 0.9 * torch.linalg.qr(a).Q,
        "leading pair": lambda: torch.linalg.solve(a, core @ a),  # ±0.95i, beside a smaller real spectrum
        "low rank": lambda: a[:, :, :2] @ a[:, :2, :] / n,
        "identity": lambda: torch.eye(n, dtype=DOUBLE).repeat(batch, 1, 1),
        # every sample another size, one of them zero
        "scales": lambda: a * torch.tensor([0.0, 1e-6, 1.0, 1e6], dtype=DOUBLE)[:, None, None],
    }[kind]()


def product(z, a):
    """az for every sample, whatever the batch."""
    return (a * z[:, None]).sum(2)


KINDS = ["nonsymmetric", "symmetric", "rotation", "leading pair", "low rank", "identity", "scales"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_spectral_radius_is_that_of_eigvals(kind, dtype):
    a = matrices(kind)
    wanted = torch.linalg.eigvals(a).abs().amax(1)
    z = torch.randn(len(a), a.shape[1], dtype=dtype)
    found = mb.spectral_radius(product, z, a.to(dtype))
    assert found.dtype == dtype
    close(found.double(), wanted, rtol=1e-9 if dtype == DOUBLE else 2e-4, atol=1e-12)


def test_a_small_krylov_space_finds_a_leading_complex_pair():
    """Where power iteration turns in circles: 8 products for 60 coordinates."""
    f, calls = counting(product)
    found = mb.spectral_radius(f, torch.zeros(4, 60, dtype=DOUBLE), matrices("leading pair", n=60), iterations=30)
    close(found, torch.full((4,), 0.95, dtype=DOUBLE), rtol=1e-3, atol=0)
    assert len(calls) == 1


def test_a_nilpotent_jacobian_has_radius_zero_nearly():
    """Eigenvalues of a Jordan block are as ill-conditioned as any: rounding may show as its 6th root, no more."""
    shift = torch.diag(torch.ones(5, dtype=DOUBLE), 1)
    assert mb.spectral_radius(lambda z: z @ shift, torch.zeros(2, 6, dtype=DOUBLE)).max() < 1e-2


def test_the_spectral_radius_takes_tuples_and_does_not_touch_the_random_state():
    a = matrices("nonsymmetric", n=5)

    def f(z, a):
        image = product(torch.cat([z[0], z[1].flatten(1)], 1), a)
        return image[:, :3], image[:, 3:, None]

    state = torch.get_rng_state()
    with torch.no_grad():
        found = mb.spectral_radius(f, (torch.zeros(4, 3, dtype=DOUBLE), torch.zeros(4, 2, 1, dtype=DOUBLE)), a)
    assert torch.equal(state, torch.get_rng_state())
    close(found, torch.linalg.eigvals(a).abs().amax(1))


def test_the_spectral_radius_of_a_sample_does_not_depend_on_the_others():
    a, z = matrices("nonsymmetric"), torch.zeros(4, 12, dtype=DOUBLE)
    whole = mb.spectral_radius(product, z, a, iterations=5)
    close(mb.spectral_radius(product, z[2:3], a[2:3], iterations=5), whole[2:3])


@pytest.mark.parametrize("kind", ["spectral", "weight"])
def test_nothing_is_made_on_the_default_device(kind):
    cell, x = mb.normalise(Cell(p=0.3), kind), random(3, 6)
    deq = mb.DEQ(cell, warn=False)
    with torch.device("meta"):
        deq(x).sum().backward()
        z = deq.last_solution.z
        cache = mb.EquilibriumCache()
        assert cache.start([0, 1, 2], z) is z
        cache.store([0, 1, 2], z)
        with held_masks(cell, 3):
            values = mb.spectral_radius(cell, z, x).sum(), mb.jacobian_penalty(cell, z, x)
    assert torch.equal(cache.start([0, 1, 2], torch.zeros_like(z)), z)
    assert all(value.device.type == "cpu" and bool(value.isfinite()) for value in values)
    assert all(p.grad.device.type == "cpu" for p in deq.parameters())


# --- Normalised weights


NORMALISED = {"spectral": {}, "weight": {}, "max_norm": {"kind": "spectral", "max_norm": 0.5}}


def normalised(name: str, cell: nn.Module) -> nn.Module:
    return mb.normalise(cell, **({"kind": name} | NORMALISED[name]))


@pytest.mark.parametrize("name", NORMALISED)
def test_normalised_weights_are_computed_once_a_call(name):
    deq = mb.DEQ(normalised(name, Cell()).train())
    x = random(3, 6)
    computed = []
    deq.cell.first.parametrizations.weight[0].register_forward_hook(lambda *_: computed.append(1))
    deq(x).sum().backward()
    first, deq.cell.seen = deq.cell.seen, []
    assert len(first) > 4
    assert len({id(weight) for weight in first}) == 1
    assert len(computed) == 1
    deq(x)
    assert deq.cell.seen[0] is not first[0]
    assert len(computed) == 2


def test_the_power_iteration_runs_once_a_call_in_training_and_never_in_evaluation():
    deq, x = mb.DEQ(mb.normalise(Cell())), random(3, 6)
    made = deq.cell.first.parametrizations.weight
    lone = copy.deepcopy(made)
    deq(x)
    lone()  # one iteration
    close(made[0]._u, lone[0]._u, rtol=0, atol=0)
    before = made[0]._u.clone()
    deq.eval()(x)
    assert torch.equal(made[0]._u, before)


@pytest.mark.parametrize("name", NORMALISED)
def test_gradients_through_normalised_weights_pass_gradcheck(name):
    deq = tight(normalised(name, Cell(4)).eval())
    assert gradcheck(deq, random(2, 4))


@pytest.mark.parametrize("name", NORMALISED)
def test_gradients_reach_the_parameters_in_training_mode(name):
    deq = mb.DEQ(normalised(name, Cell()))
    x = random(3, 6)
    for _ in range(2):  # the second time round, buffers have been written to
        (deq(x) + deq(2 * x)).square().sum().backward()  # two calls keep their own weights
    originals = [p for key, p in deq.named_parameters() if "original" in key]
    assert originals
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in originals)


def test_deep_copies_of_a_normalised_layer_keep_their_own_weights():
    """torch's own cache of parametrizations takes one for the other."""
    cell, x = mb.normalise(Cell(), "weight"), random(3, 6)
    cell.second = copy.deepcopy(cell.first)
    cell.second.parametrizations.weight.original0.data.mul_(0.1)
    z = mb.DEQ(cell, rtol=1e-9)(x)
    with torch.no_grad():
        close(cell(z, x), z, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("solver", [mb.Broyden(), mb.Newton()], ids=["broyden", "newton"])
def test_normalised_cells_solve_where_no_gradient_is_wanted(mode, solver):
    deq = mb.DEQ(mb.normalise(Cell()).eval(), solver=solver, max_nfe=200)
    with mode():
        deq(random(3, 6))
    assert deq.last_solution.converged.all()


def test_a_nested_layer_uses_the_weights_of_the_call_round_it():
    inner = mb.DEQ(mb.normalise(Cell()), rtol=1e-10)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, z, x):
            return 0.5 * self.inner(z + x, z)

    mb.DEQ(Outer())(random(3, 6)).sum().backward()
    assert len({id(weight) for weight in inner.cell.seen}) == 1
    assert inner.cell.first.parametrizations.weight.original.grad is not None


def test_a_cell_is_left_as_it_was_even_when_it_raises():
    cell = mb.normalise(Cell(p=0.5))
    with pytest.raises(RuntimeError):
        mb.DEQ(cell)(random(3, 6), torch.zeros(3, 5, dtype=DOUBLE))
    assert cell.drop.mask is None
    assert cell.first.weight is not cell.first.weight


def orthogonal(gain: float) -> nn.Linear:
    layer = nn.Linear(6, 6)
    nn.init.orthogonal_(layer.weight, gain=gain)
    return layer


def test_spectral_normalisation_makes_weights_of_norm_one_and_max_norm_leaves_small_ones():
    norm = lambda layer: torch.linalg.matrix_norm(layer.weight, 2)  # noqa: E731
    wide, small = orthogonal(3), orthogonal(0.1)
    kept = small.weight.detach().clone()
    pair = mb.normalise(nn.Sequential(wide, small), max_norm=0.8).eval()
    close(norm(pair[0]), torch.tensor(0.8), rtol=1e-3, atol=0)
    assert torch.equal(pair[1].weight, kept)
    close(norm(mb.normalise(orthogonal(0.1)).eval()), torch.tensor(1.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", NORMALISED)
def test_transposed_convolutions_are_normalised_over_their_outputs(name):
    layer = nn.ConvTranspose2d(3, 5, 3)
    layer.weight.data.mul_(10)
    normalised(name, layer)
    for _ in range(30):
        weight = layer.weight
    if name == "weight":
        assert layer.parametrizations.weight.original0.shape == (1, 5, 1, 1)
    else:
        norm, wanted = torch.linalg.matrix_norm(weight.movedim(1, 0).flatten(1), 2), 1.0 if name == "spectral" else 0.5
        close(norm, torch.tensor(wanted), rtol=1e-2, atol=0)


def test_normalise_skips_what_it_is_told_and_refuses_what_it_does_not_know():
    cell = ConvCell(2, 2, 1)
    mb.normalise(cell, skip=("conv2",))
    assert parametrize.is_parametrized(cell.conv1)
    assert not parametrize.is_parametrized(cell.conv2)
    for options, message in (
        ({"kind": "batch"}, "kind must be one of"),
        ({"skip": ("conv3",)}, r"skip names \['conv3'\]"),
        ({"skip": "conv1"}, "skip must be a sequence of names"),
        ({"kind": "weight", "max_norm": 1.0}, "max_norm must be positive and goes with kind='spectral'"),
        ({"max_norm": -1.0}, "max_norm must be positive"),
        ({}, "the weight of layer 'conv1' is parametrized already"),
    ):
        refused(message, lambda: mb.normalise(cell, **options))  # noqa: B023
    assert not parametrize.is_parametrized(cell.conv2)
    refused("no linear or convolutional layer", lambda: mb.normalise(nn.GroupNorm(1, 2)))


def test_a_normalised_cell_can_be_saved_and_loaded():
    cell, other = (mb.normalise(Cell(), max_norm=0.5).eval() for _ in range(2))
    other.load_state_dict(cell.state_dict())
    assert torch.equal(other.first.weight, cell.first.weight)


def test_any_parametrization_of_torch_is_held():
    cell = Cell()
    parametrizations.orthogonal(cell.first)
    cell.second.weight.data.mul_(0.5)
    mb.DEQ(cell)(random(3, 6)).sum().backward()
    assert len({id(weight) for weight in cell.seen}) == 1


# --- Variational dropout


class Numbered(nn.Module):
    """A cell that notes, under each sample's number, the masks that its two dropout layers apply; x = {signal, number}."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = Cell(8, p=0.4), mb.VariationalDropout(0.3, (8,))
        self.masks: dict[int, set[tuple]] = {}

    def initial_state(self, x):
        return torch.zeros_like(x["signal"])

    def forward(self, z, x):
        ones = torch.ones_like(z)
        for number, inner, outer in zip(x["number"].tolist(), self.inner.drop(ones), self.outer(ones), strict=True):
            self.masks.setdefault(number, set()).add((*inner.tolist(), *outer.tolist()))
        return 0.9 * self.outer(self.inner(z, x["signal"]))


def signals() -> dict:
    """Contexts of very different size, so that samples leave the solve at different times."""
    return {"signal": torch.logspace(-2, 1, 5, dtype=DOUBLE)[:, None] * random(5, 8), "number": torch.arange(5)}


def test_a_sample_keeps_its_masks_through_the_solve_and_the_gradient():
    deq = mb.DEQ(Numbered(), rtol=1e-8)
    x = signals()
    deq(x).sum().backward()
    assert deq.last_solution.nfe.unique().numel() > 1  # they did leave at different times
    assert all(len(masks) == 1 for masks in deq.cell.masks.values())
    first, deq.cell.masks = deq.cell.masks, {}
    assert len({next(iter(masks)) for masks in first.values()}) == 5  # samples have masks of their own
    deq(x)
    assert all(deq.cell.masks[number] != first[number] for number in first)


def test_masks_hold_where_there_is_no_context():
    drop, seen = mb.VariationalDropout(0.5, (6,)), []
    cell = nn.Sequential(drop)
    cell.forward = lambda z: seen.append(drop(torch.ones_like(z))) or torch.cos(drop(0.5 * z))
    mb.DEQ(cell)(None, torch.zeros(3, 6))
    assert len(seen) > 2
    assert all(torch.equal(mask, seen[0]) for mask in seen)


def test_gradients_through_a_mask_pass_gradcheck():
    deq, x, found = tight(Cell(4, p=0.5)), random(3, 4), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(deq(x))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert gradcheck(deq, random(2, 4), before=lambda: torch.manual_seed(5))


def test_evaluation_mode_drops_nothing_and_passes_the_context_as_it_is():
    cell, x, z = Cell(p=0.5).eval(), random(3, 6), random(2, 6)
    f, context = pin(cell, x, x)
    assert f is cell
    assert context is x
    assert cell.drop(z) is z


def test_dropout_keeps_the_expectation_and_its_share():
    layer, x = mb.VariationalDropout(0.3, (50, 1)), torch.rand(400, 50, 4)
    dropped = layer(x)
    kept = dropped != 0
    assert abs(kept.float().mean() - 0.7) < 0.02
    close(dropped.mean(), x.mean(), rtol=0.03, atol=0)
    assert torch.equal(kept.all(2), kept.any(2))  # the last axis goes together
    assert layer(x.bfloat16()).dtype == torch.bfloat16


PAIR = torch.ones(2), torch.ones(2)
Z = torch.zeros(2, 3)
MASK = "shape must be that of one sample's mask"


def corrected(criterion=torch.sum, states=PAIR[:1], **options):
    return mb.fixed_point_correction(criterion, states, **options)


REFUSED = [
    ("probes must be at least 1, got 0", lambda: mb.jacobian_penalty(torch.tanh, Z, probes=0)),
    ("what z is shaped like", lambda: mb.jacobian_penalty(lambda z: z[:, :1], Z)),
    ("iterations must be at least 1", lambda: mb.spectral_radius(torch.tanh, Z, iterations=0)),
    (r"p must lie in \[0, 1\)", lambda: mb.VariationalDropout(-0.1, (3,))),
    (r"p must lie in \[0, 1\)", lambda: mb.VariationalDropout(1.0, (3,))),
    (MASK, lambda: mb.VariationalDropout(0.5, ())),
    (MASK, lambda: mb.VariationalDropout(0.5, (0, 1))),
    ("at least one state, got none", lambda: corrected(states=[])),
    ("weights must be one of", lambda: corrected(weights="cubic")),
    (r"gamma must lie in \(0, 1\]", lambda: corrected(gamma=0.0)),
    (r"must return a scalar, got shape \(2,\)", lambda: corrected(torch.exp)),
    ("size must be at least 1", lambda: mb.EquilibriumCache(0)),
    ("dtype must be floating", lambda: mb.EquilibriumCache(dtype=torch.int8)),
]


@pytest.mark.parametrize(("words", "build"), REFUSED)
def test_bad_settings_are_refused(words, build):
    refused(words, build)


@pytest.mark.parametrize("shape", [(4,), (3, 1), (4, 2), (1, 4, 1)])
def test_a_mask_that_torch_would_broadcast_otherwise_is_refused(shape):
    words = r"does not fit an input of shape \(4, 4, 1\)"
    refused(words, lambda: mb.VariationalDropout(0.5, shape)(torch.ones(4, 4, 1)))
    layer = mb.VariationalDropout(0.5, (4,))
    with held_masks(layer, 1):
        refused(r"a mask of shape \(1, 4\) does not fit", lambda: layer(torch.ones(3, 4)))


def test_held_masks_are_shared_by_the_solve_and_the_penalty():
    deq, x = mb.DEQ(Numbered()), signals()
    with held_masks(deq, 5):
        deq(x)
        mb.jacobian_penalty(deq.cell, deq.last_solution.z, x)
    assert all(len(masks) == 1 for masks in deq.cell.masks.values())
    assert deq.cell.outer.mask is None
    mb.jacobian_penalty(deq.cell, deq.last_solution.z, x)
    assert all(len(masks) == 2 for masks in deq.cell.masks.values())


def test_a_learned_solver_sees_the_callers_context_beside_the_masks():
    solver = mb.GroupedLSTM(GroupedConfig(layout="vector", shape=(6,), conditioning="input"))
    deq = mb.DEQ(Cell(p=0.5).float(), solver=solver)
    deq(torch.randn(3, 6))
    assert deq.last_solution.converged.all()


class Around(nn.Module):
    """0.5·tanh(layer(z) + x)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, z, x):
        return 0.5 * torch.tanh(self.layer(z) + x)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Dropout(0.5), r"layer \(Dropout\) drops or learns anew at every evaluation.*VariationalDropout"),
        (nn.BatchNorm1d(4), r"layer \(BatchNorm1d\) takes statistics over the batch.*evaluation mode"),
    ],
    ids=["dropout", "batch norm"],
)
def test_a_layer_that_moves_the_fixed_point_brings_a_warning_once(layer, words):
    deq, x = mb.DEQ(Around(layer), max_nfe=200), torch.zeros(3, 4)
    deq.eval()(x)  # silent: a warning is an error here
    deq.train()
    with pytest.warns(UserWarning, match=words):
        deq(x)
    deq(x)
    mb.DEQ(deq.cell, warn=False)(x)
    if isinstance(layer, nn.Dropout):
        layer.p = 0.0
        mb.DEQ(deq.cell)(x)


COUPLED = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), True),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(4), True),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, track_running_stats=True), True),
    "RReLU": (nn.RReLU, True),
    "frozen": (lambda: nn.BatchNorm1d(4).eval(), False),
    "batch statistics": (lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(), True),
    "InstanceNorm": (lambda: nn.InstanceNorm1d(4), False),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), False),
}


@pytest.mark.parametrize("name", COUPLED)
def test_a_layer_that_couples_samples_or_changes_at_each_call_is_warned_of(name):
    build, warned = COUPLED[name]
    reasons = stochastic_layers(nn.Sequential(nn.Linear(4, 4), build()))
    assert len(reasons) == warned
    if warned:
        assert type(build()).__name__ in reasons[0]


# --- Fixed-point correction


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [0.64, 0.8, 1.0]),
        ({"gamma": 0.5}, [0.25, 0.5, 1.0]),
        ({"weights": "linear", "gamma": 1.0}, [1 / 3, 2 / 3, 1.0]),
        ({"weights": "linear", "gamma": 0.3}, [0.8, 0.9, 1.0]),
        ({"weights": "uniform"}, [1.0, 1.0, 1.0]),
    ],
)
def test_the_correction_weighs_states_as_it_says(options, wanted):
    states = [torch.zeros(2, requires_grad=True) for _ in range(3)]
    loss = mb.fixed_point_correction(lambda z: (z + 1).sum(), states, **options)
    close(loss, torch.tensor(2 * sum(wanted)))
    loss.backward()
    close(torch.stack([z.grad[0] for z in states]), torch.tensor(wanted))
    assert mb.fixed_point_correction(lambda z: (z[0] + z[1]).sum(), (z for z in [PAIR])) == 4


# --- Warm starts


def test_a_cache_gives_back_rows_where_it_has_them():
    cache, default = mb.EquilibriumCache(), torch.full((3, 2, 2), -1.0)

    def store(**rows: float) -> None:
        cache.store([int(index[1:]) for index in rows], torch.stack([torch.full((2, 2), v) for v in rows.values()]))

    def started(*indices: int) -> list[float]:
        return cache.start(torch.tensor(indices), default)[:, 0, 0].tolist()

    assert cache.start([0, 1, 2], default) is default
    store(_7=7.0, _2=2.0)
    assert len(cache) == 2
    assert started(2, 900, 7) == [2.0, -1.0, 7.0]
    store(_0=5.0)
    assert started(900, 0, 1) == [-1.0, 5.0, -1.0]
    store(_2000=0.0, _2=0.0)  # grows, and replaces
    assert started(2, 2000, 7) == [0.0, 0.0, 7.0]
    assert default.eq(-1).all()


def test_what_is_stored_is_a_copy_without_a_graph():
    cache, z = mb.EquilibriumCache(4), torch.ones(2, 3, requires_grad=True) * 2
    cache.store([0, 1], z)
    z.data.zero_()
    started = cache.start([0, 1], torch.zeros(2, 3))
    assert not started.requires_grad
    assert started.eq(2).all()
    started.zero_()
    assert cache.start([0], torch.zeros(1, 3)).eq(2).all()


def test_a_cache_takes_states_of_several_tensors():
    cache = mb.EquilibriumCache(5)
    cache.store([3], (torch.ones(1, 2), 2 * torch.ones(1, 2, 2)))
    a, b = cache.start([3, 4], (torch.zeros(2, 2), torch.zeros(2, 2, 2)))
    assert a.sum(1).tolist() == [2, 0]
    assert b.sum((1, 2)).tolist() == [8, 0]
    words = r"default has samples of shape \[\(2,\)\], stored are"
    refused(words, lambda: cache.start([3], torch.zeros(1, 2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_may_be_stored_in_half_precision_and_bad_ones_are_not(dtype):
    cache, z = mb.EquilibriumCache(4, dtype=dtype, device="cpu"), random(2, 2)
    cache.store([0, 3], z)
    started = cache.start([0, 3], torch.zeros_like(z))
    assert started.dtype == DOUBLE
    close(started, z, rtol=1e-2, atol=1e-3)
    assert cache.state_dict()["rows"][0].dtype == dtype
    huge = 1e300  # infinite in half precision
    cache.store([0, 0, 1, 2], torch.tensor([[5, 5], [1, torch.nan], [huge, 0], [3, 3]], dtype=DOUBLE))
    assert cache.start([0, 1, 2], torch.zeros(3, 2))[:, 0].tolist() == [5.0, 0.0, 3.0]  # the last good row
    cache.store([1], torch.full((1, 2), torch.inf))
    assert len(cache) == 3


@pytest.mark.parametrize("size", [None, 6])
def test_a_cache_resumes_from_its_state(size):
    cache, other, file, zeros = mb.EquilibriumCache(size), mb.EquilibriumCache(size), io.BytesIO(), torch.zeros(6, 3)
    cache.store([1, 4], torch.randn(2, 3))
    torch.save(cache.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.start(range(6), zeros), cache.start(range(6), zeros))
    other.store([5, 1], torch.ones(2, 3))
    assert len(other) == 3
    other.load_state_dict(cache.state_dict())
    other.store([1], torch.ones(1, 3))
    assert not torch.equal(other.start([1], zeros[:1]), cache.start([1], zeros[:1]))  # a copy


def test_an_empty_cache_resumes_and_a_foreign_state_is_refused():
    cache, smaller = mb.EquilibriumCache(3), mb.EquilibriumCache(dtype=torch.float16)
    cache.load_state_dict(mb.EquilibriumCache().state_dict())
    cache.store([2], torch.ones(1, 2))
    assert len(cache) == 1
    refused("not the state of an EquilibriumCache", lambda: cache.load_state_dict({"rows": []}))
    words = "knows sample 2, this cache has size 2"
    refused(words, lambda: mb.EquilibriumCache(2).load_state_dict(cache.state_dict()))
    cache.store([0], torch.full((1, 2), 1e6))
    smaller.load_state_dict(cache.state_dict())
    assert len(smaller) == 1


@pytest.mark.parametrize(
    ("indices", "z", "error", "words"),
    [
        ([0, 5], Z, ValueError, "indices must be 0 to 4, got 5"),
        ([-1, 0], Z, ValueError, "indices must be 0 to 4, got -1"),
        ([0], Z, ValueError, r"indices must have shape \(2,\)"),
        ([0.0, 1.0], Z, TypeError, "indices must be integers"),
        ([True, False], Z, TypeError, "indices must be integers"),
        ([0, 1], torch.zeros(2, 4), ValueError, r"has samples of shape \[\(4,\)\], stored are \[\(3,\)\]"),
        ([0, 1], Z.long(), ValueError, "must be floating, batch first"),
        ([], torch.zeros(0, 3), ValueError, "at least one sample"),
        ([0, 1], [Z], TypeError, "must be a tensor or a non-empty tuple of tensors, got list"),
    ],
)
def test_a_cache_says_what_it_cannot_take(indices, z, error, words):
    cache = mb.EquilibriumCache(5)
    cache.store([0], torch.zeros(1, 3))
    for method in (cache.start, cache.store):
        refused(words, lambda: method(indices, z), error)  # noqa: B023


def test_warm_starts_save_evaluations_while_the_cell_moves_slowly():
    deq, x, zeros = mb.DEQ(Cell(16), rtol=1e-4), random(32, 16), torch.zeros(8, 16, dtype=DOUBLE)
    cache, spent = mb.EquilibriumCache(32), {"cold": 0, "warm": 0}
    for epoch in range(5):
        for index in torch.randperm(32).split(8):
            for name, start in (("cold", zeros), ("warm", cache.start(index, zeros))):
                with torch.no_grad():
                    deq(x[index], start)
                if epoch:
                    spent[name] += int(deq.last_solution.nfe.sum())
            cache.store(index, deq.last_solution.z)
        for parameter in deq.parameters():
            parameter.data.add_(1e-3 * torch.randn_like(parameter))
    assert spent["warm"] < 0.7 * spent["cold"]
