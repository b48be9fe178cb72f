"""Our solvers in deepinv's deep-equilibrium reconstructions, and these as maps for `fit_solver`."""

from __future__ import annotations

import copy
import sys
import warnings

import pytest
import torch

import metabroyden as mb
from metabroyden.foreign import load
from metabroyden.integrations.deepinv import FixedPointMap, install
from tests.helpers import normal, refused

dinv = load("deepinv")
SIDE = 12


def physics() -> object:
    return dinv.physics.BlurFFT(img_size=(1, SIDE, SIDE), filter=torch.ones(1, 1, 3, 3) / 9)


def algorithm(kind: str = "PGD", *, deq: object = True, **options: object) -> object:
    """A small reconstruction that contracts: half of a denoiser and half of the image that it is given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        denoiser = Halved(dinv.models.DnCNN(in_channels=1, out_channels=1, depth=3, nf=4, bias=True, pretrained=None))
        usual = {"max_iter": 40, "stepsize": 0.9, "sigma_denoiser": 0.1, "trainable_params": []}
        return getattr(dinv.optim, kind)(
            data_fidelity=dinv.optim.data_fidelity.L2(), prior=dinv.optim.prior.PnP(denoiser=denoiser), DEQ=deq,
            **{**usual, **options},
        )  # fmt: skip


class Halved(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, sigma=None, **ignored):
        return 0.3 * x + 0.2 * torch.tanh(self.inner(x, sigma))


def blurs(count: int) -> torch.Tensor:
    found = normal(count, 1, 3, 3, seed=3).abs()
    return found / found.sum((2, 3), keepdim=True)


def measured(count: int = 4):
    made, blur = physics(), blurs(count)
    made.update(filter=blur)
    return made, made.A(normal(count, 1, SIDE, SIDE, seed=5)), blur


@pytest.mark.parametrize("kind", ["PGD", "HQS"])
def test_the_map_is_an_iteration_of_the_algorithm(kind):
    made, y, blur = measured()
    model = algorithm(kind)
    f = FixedPointMap(model, made, "filter")
    z = f.initial_state((y, blur))
    assert torch.equal(z, made.A_adjoint(y))
    with torch.no_grad():
        for _ in range(40):
            z = f(z, (y, blur))
        own = model.fixed_point(y, made)[0]["est"][0]
    torch.testing.assert_close(z, own)


def test_each_sample_has_its_own_filter_and_the_physics_stays_as_it_was():
    made, y, blur = measured()
    before = made.filter.clone()
    f = FixedPointMap(algorithm(), made, "filter")
    x = (y, blur)
    whole = mb.solve(f, f.initial_state(x), x, solver=mb.Anderson(), rtol=1e-5, max_nfe=60)
    assert whole.nfe.unique().numel() > 1
    for sample in range(4):
        one = (y[sample : sample + 1], blur[sample : sample + 1], torch.ones(1))  # what comes last is for a metric
        alone = mb.solve(f, f.initial_state(one), one, solver=mb.Anderson(), rtol=1e-5, max_nfe=60)
        torch.testing.assert_close(alone.z[0], whole.z[sample], rtol=1e-3, atol=1e-4)
    assert torch.equal(made.filter, before)


@pytest.mark.parametrize("names", [(), ("filter",)])
def test_an_installed_solver_reconstructs_and_trains_as_deepinv_does(names):
    made, y, _ = measured()
    if not names:
        made = physics()
    own = algorithm(max_iter=120, thres_conv=1e-7)
    own.DEQ_config.max_iter_backward = 120
    ours = copy.deepcopy(own)
    layer = install(ours, mb.Anderson(), *names, rtol=1e-6, max_nfe=100)
    assert ours.state_dict().keys() == own.state_dict().keys()
    found = []
    for model in (own, ours):
        image = model(y, made)
        image.square().mean().backward()
        found.append((image, [weight.grad for weight in model.parameters()]))
    (image, grads), (wanted, others) = found[1], found[0]
    torch.testing.assert_close(image, wanted, rtol=1e-3, atol=1e-5)
    assert grads
    for one, other in zip(grads, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3 * float(other.abs().max()))
    assert layer.last_solution.converged.all()
    assert layer.last_backward_solution.converged.all()
    with torch.no_grad():
        layer.solver = mb.Broyden()
        torch.testing.assert_close(ours(y, made), image.detach(), rtol=1e-3, atol=1e-4)


def test_a_solver_is_fitted_to_a_reconstruction_and_installed():
    made, y, blur = measured(30)
    model = algorithm()
    f = FixedPointMap(model, made, "filter")
    solver = mb.fit_solver(f, (y, blur), steps=3, fallback=False, progress=False)
    assert solver.config.layout == "image"
    assert solver.config.conditioning == "input"
    layer = install(model, solver, "filter", rtol=1e-2)
    with torch.no_grad():
        image = model(y, made)
    assert layer.last_solution.converged.all()
    assert mb.relative_residual(image.flatten(1), f(image, (y, blur)).flatten(1)).max() < 2e-2


def test_what_does_not_fit_is_refused(monkeypatch):
    made, y, blur = measured()
    model = algorithm()
    refused("hand over metabroyden.integrations.deepinv.FixedPointMap", lambda: mb.fit_solver(model, y))
    refused("must be a deepinv algorithm", lambda: FixedPointMap(torch.nn.Linear(2, 2), made), TypeError)
    refused("PGD has no equilibrium: make it with DEQ=True", lambda: install(algorithm(deq=False), mb.Anderson()))
    f = FixedPointMap(model, made, "filter")
    refused(r"1 parameters of the physics \(filter\), got 0", lambda: f(y, y))
    refused("must be one tensor", lambda: f(y, ([y], blur)), TypeError)
    install(model, mb.Anderson())
    refused("compute_metrics=True is of deepinv's own loop", lambda: model(y, made, compute_metrics=True))
    monkeypatch.setitem(sys.modules, "deepinv", None)
    refused("pip install deepinv==0.5.0", lambda: FixedPointMap(model, made), ImportError)


def test_filters_that_change_in_place_are_seen_and_inference_tensors_are_taken():
    made, y, blur = measured()
    f = FixedPointMap(algorithm(), made, "filter")
    z = f.initial_state((y, blur))
    with torch.no_grad():
        before = f(z, (y, blur))
        blur.copy_(blurs(4).flip(0))
        assert not torch.equal(f(z, (y, blur)), before)
    with torch.inference_mode():
        x = (y.clone(), blur.clone())
        assert mb.solve(f, f.initial_state(x), x, solver=mb.Anderson(), rtol=1e-2).converged.all()
