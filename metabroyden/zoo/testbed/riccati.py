"""The discrete algebraic Riccati equation of linear-quadratic control; the answer is scipy's."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metabroyden.zoo.testbed.base import KnownProblem, generator, register

_N, _INPUTS = 5, 2


@register("riccati")
def riccati(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """P = AᵀPA − AᵀPB(I + BᵀPB)⁻¹BᵀPA + I, five states, two inputs; A of spectral radius 1.05, so that control is needed."""
    from scipy.linalg import solve_discrete_are

    g = generator(seed)
    a = torch.randn(batch, _N, _N, generator=g, dtype=torch.float64)
    a = 1.05 * a / torch.linalg.eigvals(a).abs().amax(1)[:, None, None]
    b = torch.randn(batch, _N, _INPUTS, generator=g, dtype=torch.float64)
    eye, small = np.eye(_N), np.eye(_INPUTS)
    answers = [solve_discrete_are(x.numpy(), y.numpy(), eye, small) for x, y in zip(a, b, strict=True)]

    def f(p: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
        a, b = context
        one, two = torch.eye(_N).to(p), torch.eye(_INPUTS).to(p)
        pa, pb = p @ a, p @ b
        gain = torch.linalg.solve_ex(two + b.mT @ pb, pb.mT @ a)[0]
        return a.mT @ pa - (a.mT @ pb) @ gain + one

    return KnownProblem(
        f,
        torch.eye(_N, dtype=dtype).repeat(batch, 1, 1),
        (a.to(dtype), b.to(dtype)),
        "Every solver converges to the stabilising solution; Picard is the Riccati recursion.",
        torch.from_numpy(np.stack(answers)),
    )
