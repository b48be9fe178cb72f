"""The multiscale cell and its classifier."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

import metabroyden as mb
from metabroyden.zoo.models import (
    MultiscaleCell,
    MultiscaleClassifier,
    MultiscaleClassifierConfig,
    make_cell,
)


@pytest.mark.parametrize("scales", [2, 3])
@pytest.mark.parametrize("side", [7, 8, 14, 28])
def test_each_scale_has_half_the_side_of_the_one_before_rounded_up(side, scales):
    cell = MultiscaleCell((2, 4, 8)[:scales], 2)
    x = torch.randn(2, 2, side, side)
    z = cell.initial_state(x)
    sides = {7: (7, 4, 2), 8: (8, 4, 2), 14: (14, 7, 4), 28: (28, 14, 7)}[side]
    wanted = [(2, 2 * 2**i, s, s) for i, s in enumerate(sides[:scales])]
    assert [part.shape for part in z] == wanted
    assert not any(part.any() for part in z)
    assert [part.shape for part in cell(z, x)] == wanted


def test_the_cell_is_what_its_docstring_says():
    torch.manual_seed(0)
    cell = MultiscaleCell((2, 4, 6), 2).double()
    x = torch.randn(2, 2, 5, 6).double()
    z = tuple(torch.randn_like(part) for part in cell.initial_state(x))
    for parameter in cell.parameters():
        torch.nn.init.normal_(parameter)

    def norm(module, v):
        return functional.group_norm(v, 2, module.weight, module.bias)

    h = []
    for module, conv, part in zip(cell.norms1, cell.convs, z, strict=True):
        h.append(norm(module, torch.relu(functional.conv2d(part, conv.weight, padding=1))))

    def same(i):
        return functional.conv2d(h[i], cell.fusion[i][i].weight, padding=1)

    def down(j, i, stride):
        return functional.conv2d(h[j], cell.fusion[i][j].weight, stride=stride, padding=stride // 2)

    def up(j, i):
        small = functional.conv2d(h[j], cell.fusion[i][j].weight)
        rows = torch.arange(z[i].shape[2]) * small.shape[2] // z[i].shape[2]
        columns = torch.arange(z[i].shape[3]) * small.shape[3] // z[i].shape[3]
        return small[:, :, rows][:, :, :, columns]

    sums = (
        x + same(0) + up(1, 0) + up(2, 0),
        down(0, 1, 2) + same(1) + up(2, 1),
        down(0, 2, 4) + down(1, 2, 2) + same(2),
    )
    assert cell.fusion[2][0].weight.shape == (6, 2, 5, 5)
    for i, found in enumerate(cell(z, x)):
        assert_close(found, norm(cell.norms3[i], torch.relu(z[i] + norm(cell.norms2[i], sums[i]))))


def test_scales_tell_one_another_and_only_the_finest_is_told_of_the_injection():
    torch.manual_seed(0)
    cell = MultiscaleCell((2, 4, 8), 2).double()
    x = torch.randn(1, 2, 8, 8).double()
    z = tuple(torch.randn_like(part) for part in cell.initial_state(x))
    blocks = torch.autograd.functional.jacobian(lambda *parts: cell(parts, x), z)
    assert all(float(block.abs().max()) > 1e-5 for row in blocks for block in row)
    before, after = cell(z, x), cell(z, torch.randn_like(x))
    assert not torch.allclose(before[0], after[0])
    for one, other in zip(before[1:], after[1:], strict=True):
        assert torch.equal(one, other)


def test_it_has_an_equilibrium_that_all_solvers_agree_on():
    cell, x = make_cell("multiscale", dtype=torch.float64, batch=4)
    options = {"rtol": 1e-9, "max_nfe": 400}
    found = [
        mb.solve(cell, cell.initial_state(x), x, solver=solver, **options).z for solver in (mb.Broyden(), mb.Anderson())
    ]
    for z, image, other in zip(found[0], cell(found[0], x), found[1], strict=True):
        assert_close(z, image, rtol=0, atol=1e-6)
        assert_close(z, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [7, 8, 14, 28])
def test_the_classifier_takes_any_side_and_is_trained_through_all_its_parameters(side):
    config = MultiscaleClassifierConfig(
        width=4, scales=3, groups=2, side=side, stride=2 if side > 8 else 1, image_channels=3
    )
    model = MultiscaleClassifier(config, backward=mb.Unroll(steps=3))
    logits = model(torch.rand(2, 3, side, side))
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in model.parameters())
