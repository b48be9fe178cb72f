"""Refusal of the transforms of torch that a solve does not support."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

_ALTERNATIVES = {
    "torch.vmap": "call the layer on a batch, which it solves sample by sample, or loop",
    "torch.func.grad, vjp or jacrev": "take torch.autograd.grad (with torch.func.functional_call for other weights)",
    "forward-mode AD or torch.func.jvp": "take torch.autograd.functional.jvp, which differentiates twice backwards",
}


def transform_of(*trees: Any, tensors: Iterable[Tensor] = ()) -> str | None:
    """The transform that some of these tensors are under; None where there is none."""
    functional, forward = _functorch.peek_interpreter_stack() is not None, forward_ad._current_level >= 0
    if not functional and not forward:
        return None
    leaves = [leaf for leaf in pytree.tree_leaves(trees) if isinstance(leaf, Tensor)]
    leaves += tensors
    vmap, grad, forward_mode = _ALTERNATIVES
    if any(map(_functorch.is_batchedtensor, leaves)):
        return vmap
    if forward and any(forward_ad.unpack_dual(leaf).tangent is not None for leaf in leaves):
        return forward_mode
    if any(map(_functorch.is_functorch_wrapped_tensor, leaves)):
        return grad
    return None


def refuse(transform: str) -> None:
    """RuntimeError that names the alternative to a transform."""
    raise RuntimeError(
        f"DEQ: a solve cannot be taken through {transform}: {_ALTERNATIVES[transform]}, or set backward=mb.Unroll(), "
        "which consists of ordinary operations where gradients are enabled"
    )


def refuse_batched(cotangents: Iterable[Tensor]) -> None:
    """RuntimeError where these are many cotangents in one."""
    if any(_functorch.is_batchedtensor(v) or _functorch.is_legacy_batchedtensor(v) for v in cotangents):
        raise RuntimeError(
            "DEQ: the adjoint is solved for one cotangent at a time, not for is_grads_batched=True or vectorize=True: loop "
            "over the cotangents (vectorize=False), or set backward=mb.Unroll()"
        )
