"""Deep-equilibrium reconstructions of deepinv's, deblurring and compressed sensing, on the pictures of scikit-image."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import skimage.color
import skimage.data
import skimage.transform
import torch
from torch import Tensor, nn

import metabroyden as mb
from experiments.bench.descent import descend
from experiments.bench.runner import Row
from experiments.workloads.brought import Brought
from metabroyden.integrations.deepinv import FixedPointMap, library

SIDE, KERNEL, NOISE = 48, 9, 0.01
TRAIN_ON = ("astronaut", "coffee", "rocket", "brick", "grass", "gravel", "retina", "hubble_deep_field", "cell", "page")
TEST_ON = ("camera", "chelsea", "coins", "moon", "clock")
CONTEXTS, MOST, BATCH = 300, 32, 16
SECONDS = 240.0
"""Of a fit."""
SHARE = 0.35
"""Of measurements by random weights, as many as pixels being one."""
SIGMA = 0.03
"""Noise level that the denoiser is told."""
DENOISING, STEPS = 500, 300
"""Of training, of the denoiser alone and of the equilibrium."""


def patches(names: tuple[str, ...], count: int, generator: torch.Generator) -> Tensor:
    """(count, 1, 48, 48) random patches of grey pictures in [0, 1], at half of their size."""
    pictures = [_grey(name) for name in names]
    found = []
    for _ in range(count):
        picture = pictures[int(torch.randint(len(pictures), (), generator=generator))]
        top, left = (int(torch.randint(size - SIDE + 1, (), generator=generator)) for size in picture.shape)
        found.append(picture[top : top + SIDE, left : left + SIDE])
    return torch.stack(found).unsqueeze(1)


@cache
def _grey(name: str) -> Tensor:
    picture = getattr(skimage.data, name)()
    grey = skimage.color.rgb2gray(picture) if picture.ndim == 3 else picture / 255.0
    small = skimage.transform.rescale(grey, 0.5, anti_aliasing=True)
    return torch.as_tensor(np.ascontiguousarray(small), dtype=torch.float32)


def filters(count: int, generator: torch.Generator) -> Tensor:
    """(count, 1, 9, 9) Gaussian filters, up to five times as long as wide, in all directions."""
    angle = math.pi * torch.rand(count, 1, 1, generator=generator)
    long, wide = (low + span * torch.rand(count, 1, 1, generator=generator) for low, span in ((1.0, 2.0), (0.6, 0.6)))
    place = torch.arange(KERNEL) - KERNEL // 2
    down, right = torch.meshgrid(place, place, indexing="ij")
    along, across = right * angle.cos() + down * angle.sin(), down * angle.cos() - right * angle.sin()
    found = torch.exp(-0.5 * ((along / long) ** 2 + (across / wide) ** 2))
    return (found / found.sum((1, 2), keepdim=True)).unsqueeze(1)


class Reconstruction(nn.Module):
    """deepinv's proximal gradient descent, made a deep equilibrium, with a denoiser in the place of the proximal map.

    Args:
        physics: of the measurements.
        stepsize: of the descent.
        penalty: of the Jacobian in training, beside squared errors of pixels.
        rtol: of the solves in training.
    """

    parameters_of_samples: tuple[str, ...] = ()
    """Of the physics, by name, that differ from sample to sample."""

    def __init__(self, physics: Any, stepsize: float, penalty: float, rtol: float) -> None:
        super().__init__()
        dinv = library()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            denoiser = dinv.models.DnCNN(in_channels=1, out_channels=1, depth=5, nf=24, bias=True, pretrained=None)
            self.algorithm = dinv.optim.PGD(
                data_fidelity=dinv.optim.data_fidelity.L2(), prior=dinv.optim.prior.PnP(denoiser=denoiser),
                stepsize=stepsize, sigma_denoiser=SIGMA, max_iter=30, thres_conv=1e-3,
                DEQ=dinv.optim.DEQConfig(jacobian_free=True), trainable_params=[],
            )  # fmt: skip
        self._physics = (physics,)  # no part of the model
        self.penalty, self.rtol = penalty, rtol

    @property
    def physics(self) -> Any:
        """The physics, with the parameters of the last `problems`."""
        return self._physics[0]

    @property
    def denoiser(self) -> nn.Module:
        """The network in it."""
        return self.algorithm.prior[0].denoiser

    @property
    def f(self) -> FixedPointMap:
        """The map whose fixed point is the picture."""
        return FixedPointMap(self.algorithm, self.physics, *self.parameters_of_samples)

    def drawn(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Random parameters of samples."""
        return ()

    def set_up(self, parameters: Iterable[Tensor]) -> None:
        """Give the physics parameters of samples."""
        self.physics.update(**dict(zip(self.parameters_of_samples, parameters, strict=True)))

    def problems(self, names: tuple[str, ...], count: int, seed: int) -> tuple[Tensor, ...]:
        """(y, the parameters of samples, the patches)."""
        generator = torch.Generator().manual_seed(seed)
        clear, parameters = patches(names, count, generator), self.drawn(count, generator)
        self.set_up(parameters)
        y = self.physics.A(clear)
        return y + NOISE * torch.randn(y.shape, generator=generator), *parameters, clear


class Deblurring(Reconstruction):
    """Of pictures each of which has a filter of its own."""

    parameters_of_samples = ("filter",)

    def __init__(self) -> None:
        blur = library().physics.BlurFFT(img_size=(1, SIDE, SIDE), filter=torch.ones(1, 1, KERNEL, KERNEL))
        super().__init__(blur, 1.0, 5e-3, 3e-4)

    def drawn(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Filters."""
        return (filters(count, generator),)


class Sensing(Reconstruction):
    """From few sums of all pixels, with random weights."""

    def __init__(self) -> None:
        many = round(SHARE * SIDE**2)
        weights = torch.Generator().manual_seed(0)
        physics = library().physics.CompressedSensing(m=many, img_size=(1, SIDE, SIDE), rng=weights)
        largest = torch.linalg.matrix_norm(physics.A_adjoint(torch.eye(many)).flatten(1), 2)
        super().__init__(physics, float(largest**-2), 1e-3, 1e-3)


def train(model: Reconstruction) -> Row:
    """Train the denoiser on patches with noise, then the equilibrium by Jacobian-free gradients."""
    began = time.perf_counter()
    losses = [_fit(model, DENOISING, 2e-3, _denoised), _fit(model, STEPS, 5e-4, _reconstructed)]
    return {
        "seconds": round(time.perf_counter() - began),
        "steps": STEPS,
        "losses": [round(loss, 6) for loss in losses],
    }


def _fit(model: Reconstruction, steps: int, rate: float, loss_of: Callable[[Reconstruction, int], Tensor]) -> float:
    return descend(model.denoiser.parameters(), steps, rate, lambda step: loss_of(model, 2000 + step), clip=0.1)


def _denoised(model: Reconstruction, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    clear = patches(TRAIN_ON, BATCH, generator)
    noisy = clear + SIGMA * torch.randn(clear.shape, generator=generator)
    return (model.denoiser(noisy, SIGMA) - clear).square().mean()


def _reconstructed(model: Reconstruction, seed: int) -> Tensor:
    x, f = model.problems(TRAIN_ON, BATCH, seed), model.f
    z: Any = mb.solve(f, f.initial_state(x), x, solver=mb.Anderson(), rtol=model.rtol, max_nfe=40, throw=False).z
    penalty = mb.jacobian_penalty(f, z, x, generator=torch.Generator().manual_seed(seed))
    return (f(z, x) - x[-1]).square().mean() + model.penalty * penalty


def psnr(z: Tensor, x: Any) -> Tensor:
    """(B,) decibels."""
    return -10 * (z - x[-1]).square().flatten(1).mean(1).log10()


@torch.no_grad()
def bring(model: Reconstruction, samples: int) -> Brought:
    """The map with measurements of training pictures and of others, few of these: an evaluation of f is dear."""
    x_train, x_test = model.problems(TRAIN_ON, CONTEXTS, 1), model.problems(TEST_ON, min(samples, MOST), 2)
    f = model.f
    return Brought(
        f, x_train, x_test, psnr, (mb.Anderson(), 300), slack=0.02, peers=_peers(model, x_test),
        pictures={"begun with": f.initial_state(x_test), "true": x_test[-1]},
    )  # fmt: skip


def _peers(model: Reconstruction, x: Any) -> dict[str, Any]:
    """deepinv's own loop, plain and with its Anderson acceleration: iterations ↦ the image."""
    dinv = library()
    y, *parameters, _ = x
    model.set_up(parameters)

    def run(count: int, acceleration: Any) -> Tensor:
        own = model.algorithm.fixed_point
        loop = dinv.optim.FixedPoint(
            own.iterator, own.update_params_fn, own.update_data_fidelity_fn, own.update_prior_fn, own.init_iterate_fn,
            max_iter=count, early_stop=False, anderson_acceleration_config=acceleration,
        )  # fmt: skip
        return loop(y, model.physics)[0]["est"][0]

    usual = dinv.optim.optimizers.AndersonAccelerationConfig
    return {
        "deepinv": lambda count: run(count, None),
        "deepinv Anderson": lambda count: run(count, usual()),
        "deepinv Anderson, eps 1e-4": lambda count: run(count, usual(history_size=5, beta=1.0, eps=1e-4)),
    }


_WHAT = (
    "deepinv's proximal gradient descent with a denoiser of 16,000 weights in the place of the proximal map, made a deep "
    "equilibrium, "
)
TASKS = {
    "deblurring": (
        _WHAT + "deblurs patches of 48 × 48 pixels, each with a filter of its own; tested on other pictures", Deblurring
    ),
    "sensing": (
        _WHAT + "reconstructs patches of 48 × 48 pixels from sums of all pixels with random weights, a third as many as "
        "pixels; tested on other pictures", Sensing
    ),
}  # fmt: skip
"""By name: words, and the untrained model."""
