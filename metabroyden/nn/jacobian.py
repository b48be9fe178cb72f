"""The Jacobian penalty: keeps the equilibrium easy to find while the weights move."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from metabroyden.function import check_map
from metabroyden.shared import bare
from metabroyden.solution import Cell, State
from metabroyden.state import Packing, like


def jacobian_penalty(
    f: Cell, z: State, context: Any = None, *, probes: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Hutchinson's estimate of ‖J_f(z)‖_F² / n, averaged over the batch, to be added to the loss.

    Bai, Koltun & Kolter 2021, Stabilizing equilibrium models by Jacobian regularization. With n the coordinates of one
    sample, a penalty weight means the same for any batch size. Unbiased, since E‖Jᵀv‖² = ‖J‖_F² for random signs v;
    differentiable towards the parameters and the context, not towards z, which is detached. Costs one evaluation of f
    and `probes` products, once more as much in the backward pass.

    Args:
        f: `f(z)` or `f(z, context)`, samples independent of one another.
        z: where to take the Jacobian, usually `deq.last_solution.z`.
        context: as f takes it.
        probes: number of random vectors a sample.
        generator: draws them, on any device; None: torch's own.

    Returns:
        A scalar, 0 for an empty batch.

    Raises:
        ValueError: a bad state, fewer than one probe, or f does not return what z is shaped like.
        TypeError: an argument is of another type than that.

    Examples:
        >>> import torch, metabroyden as mb
        >>> w = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
        >>> jacobian_penalty(lambda z: z @ w, torch.zeros(5, 2))  # ‖w‖_F² / 2
        tensor(2.)
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    point, pull = pullback(f, z, context)
    total = point.new_zeros(())
    if len(point) == 0:
        return total  # there is no average over no sample
    for _ in range(probes):
        device = point.device if generator is None else generator.device
        signs = torch.randint(0, 2, point.shape, generator=generator, device=device).to(point) * 2 - 1
        total = total + pull(signs, create_graph=torch.is_grad_enabled()).square().mean()
    return total / probes


def pullback(f: Cell, z: State, context: Any) -> tuple[Tensor, Callable[..., Tensor]]:
    """z packed, (B, n), and v ↦ J_f(z)ᵀv, sample by sample, on such matrices: one evaluation of f, whose graph is kept.

    In inference mode, too: f is then evaluated outside it, on copies of what was made within.
    """
    check_map(f)
    f = getattr(f, "_orig_mod", f)  # what torch.compile makes gives one product only, and is of first order
    packing = Packing.of(z, "z")
    with torch.inference_mode(False), torch.enable_grad(), twice_differentiable():
        z, context = pytree.tree_map_only(Tensor, _usable, (z, context))
        parts = tuple(part.detach().requires_grad_() for part in ((z,) if isinstance(z, Tensor) else z))
        start = like(parts, type(z))
        point = packing.pack(start)
        image = packing.take(f(start) if context is None else f(start, bare(context)), point)

    def pull(v: Tensor, create_graph: bool = False) -> Tensor:
        if not image.requires_grad:  # f does not look at z
            return torch.zeros_like(v)
        with torch.inference_mode(False):
            pulled = torch.autograd.grad(
                image, parts, _usable(v), retain_graph=True, create_graph=create_graph, materialize_grads=True
            )
        return packing.pack(pulled[0] if packing.single else pulled)

    return point.detach(), pull


def twice_differentiable() -> AbstractContextManager[Any]:
    """Within it attention is computed by the kernel that can be differentiated twice: the others of torch cannot."""
    return sdpa_kernel(SDPBackend.MATH)


def _usable(tensor: Tensor) -> Tensor:
    """The tensor; a copy where it was made in inference mode, since autograd cannot save such a one."""
    return tensor.clone() if tensor.is_inference() else tensor
