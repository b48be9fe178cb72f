"""torchdeq (Geng & Kolter 2023): our solvers in its DEQs, and its models handed to `fit_solver`.

`register` makes a solver known to torchdeq by a name; `FixedPointMap` is the f(z, x) inside an unmodified torchdeq model.
torchdeq itself is imported when one of them is used.
"""

from __future__ import annotations

import itertools
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metabroyden.learned.fingerprint import ClosureWatch
from metabroyden.learned.layout import guess_layout
from metabroyden.learned.tolerance import fitted_rtol, tighter
from metabroyden.meta.target import ADAPTERS, ModelMap, frozen, resting, run_until
from metabroyden.solution import Solution, State, Status
from metabroyden.solve import check_options, solve
from metabroyden.state import Packing

OWN_NAMES = ("anderson", "broyden", "fixed_point_iter", "simple_fixed_point_iter")  # names of torchdeq's own solvers

_HALF = (torch.float16, torch.bfloat16)


def register(
    name: str, solver: Any, *, replace: bool = False, check_every: int = 1, f_dtype: torch.dtype | None = None
) -> Callable[..., tuple[Any, list[Any], dict[str, Tensor]]]:
    """Make a solver of ours known to torchdeq: `torchdeq.get_deq(f_solver=name)`, or `b_solver=name`, with either core.

    torchdeq looks names up when a DEQ is built. In an existing one `deq.f_solver = register(name, solver)` changes the
    forward solver; the backward one is fixed.

    - At most `max_iter` evaluations of f, counted; `tol` is our rtol in mode "rel", our atol in mode "abs". Samples that
      are done stay as they are, but f is called on the whole batch: torchdeq has no context to take rows from.
    - States (`indexing`): the best iterate after so many evaluations, always as many as asked for; from max_iter on, the
      solution. An early stop therefore never takes a DEQ's implicit gradient from it.
    - A sample whose start or whose every evaluation was not finite comes back as NaN, so that a loss scaler sees an
      infinite cotangent. Half-precision states are solved in float32 with f called in their own dtype.
    - A learned solver brings one warning where the weights of f have moved since it was fitted, as far as the module behind
      torchdeq's closure can be found; one where the DEQ stops by absolute residuals (f_stop_mode="abs", torchdeq's
      default), as it was fitted for relative ones; and one where tol is much smaller than the rtol it was fitted to.
    - info is torchdeq's SolverStat: `abs_lowest` and `rel_lowest` (B,) at the returned iterate, `nstep` the evaluations
      spent when that was measured, `abs_trace` and `rel_trace` (B, K) with NaN once a sample had stopped; and `nfe`,
      `converged`, `status` as in `Solution`.

    Args:
        name: what torchdeq shall call it; a name registered before is taken over.
        solver: any of our solvers. A learned one needs no context, and unflattens a flattened state by its layout.
        replace: allow the name of one of torchdeq's own solvers.
        check_every: as in `solve`; so is f_dtype.

    Returns:
        The function that was registered. It raises TypeError for options it does not know (torchdeq's solvers ignore
        such), ValueError for a wrong stop_mode or max_iter.

    Raises:
        ImportError: torchdeq is not installed.
        TypeError, ValueError: a bad solver, name or option.
    """
    check_options(torch.cos, solver, 0.0, 0.0, 1, check_every, f_dtype)
    if not isinstance(name, str) or not name:
        raise TypeError(f"name must be a non-empty string, got {name!r}")
    if name in OWN_NAMES and not replace:
        raise ValueError(f"{name!r} is a solver of torchdeq's own: choose another name, or say replace=True")

    notices = _Notices(name, solver)

    # A closure: torchdeq would take a module as a part of the DEQ, to be trained and saved with it.
    def drop_in(
        func: Callable[[Any], Any],
        x0: Any,
        max_iter: int = 50,
        tol: float = 1e-3,
        stop_mode: str = "abs",
        indexing: Sequence[int] | None = None,
        **unknown: Any,
    ) -> tuple[Any, list[Any], dict[str, Tensor]]:
        if unknown:
            kind, names = type(solver).__name__, ", ".join(sorted(unknown))
            raise TypeError(f"solver {name!r} takes no {names}: set options on the {kind} itself")
        if stop_mode not in ("abs", "rel"):
            raise ValueError(f"stop_mode must be 'abs' or 'rel', got {stop_mode!r}")
        if max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {max_iter}")
        notices.check(func, tol, stop_mode)
        rtol, atol = (tol, 0.0) if stop_mode == "rel" else (0.0, tol)
        options: dict[str, Any] = {"solver": solver, "check_every": check_every, "rtol": rtol, "atol": atol}
        return _solve(func, x0, list(indexing or ()), max_nfe=int(max_iter), f_dtype=f_dtype, **options)

    _library().register_solver(name, drop_in)
    return drop_in


class _Notices:
    """What is said once of a learned solver inside torchdeq: weights that have moved, and what it was not fitted for."""

    def __init__(self, name: str, solver: Any) -> None:
        self._name, self._solver, self._watch = name, solver, ClosureWatch()
        self._rtol = fitted_rtol(solver)

    def check(self, func: Callable[[Any], Any], tol: float, stop_mode: str) -> None:
        """Look at one solve."""
        self._watch.check(self._solver, func)
        if self._rtol is None:
            return
        words = tighter(self._rtol, tol)
        if stop_mode == "abs":
            words = (
                f"was fitted to relative residuals of {self._rtol:g}, and this DEQ stops by absolute ones (stop_mode 'abs', "
                f"torchdeq's default): build it with f_stop_mode='rel', f_tol={self._rtol:g}"
            )
        if words is not None:
            self._rtol = None
            warnings.warn(f"solver {self._name!r} {words} (said once)", stacklevel=4)


def _solve(
    func: Callable[[Any], Any], x0: Any, wanted: list[int], *, max_nfe: int, f_dtype: torch.dtype | None, **options: Any
) -> tuple[Any, list[Any], dict[str, Tensor]]:
    """torchdeq's (solution, states after `wanted` evaluations, info) of one solve of ours."""
    if any(step < 1 for step in wanted):
        raise ValueError(f"indexing must hold numbers of evaluations, at least 1, got {wanted}")
    f, z0, back = _single(func, x0)
    start, dtype = z0.detach(), z0.dtype
    if dtype in _HALF:
        start, f_dtype = start.float(), f_dtype or dtype
    finite = torch.isfinite(start).flatten(1).all(dim=1)
    start = torch.where(_like_rows(finite, start), start, 0)
    early = sorted({step for step in wanted if step < max_nfe})
    solution = solve(f, start, max_nfe=max_nfe, f_dtype=f_dtype, throw=False, snapshots=early, **options)
    lost = ~finite | solution.residual.isnan()
    some_lost = bool(lost.any())

    def finish(z: Any) -> Any:
        z = torch.where(_like_rows(lost, z), torch.nan, z) if some_lost else z
        return back(z.to(dtype))

    at = dict(zip(early, solution.snapshots, strict=True))
    states = [finish(at.get(step, solution.z)) for step in wanted]
    return finish(solution.z), states, _statistics(solution, lost)


def _flattened(x: Any) -> tuple[list[Any], str]:
    """(leaves, structure in words) of a pytree: the structure itself is not to be copied with a map."""
    leaves, structure = pytree.tree_flatten(x)
    return leaves, repr(structure)


class _Same:
    """Tells whether tensors are those that it was made of, without keeping them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._known = [weakref.ref(tensor) for tensor in tensors]

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Whether they are the same objects."""
        return len(tensors) == len(self._known) and all(
            known() is tensor for known, tensor in zip(self._known, tensors, strict=True)
        )


class FixedPointMap(ModelMap):
    """f(z, x) of the DEQ inside an unmodified torchdeq model, x being rows of the model's raw inputs.

    The model runs on x, in evaluation mode and without gradients, until its DEQ calls the forward solver. The function that
    the solver gets is f, its start the initial state. This run is repeated only for other tensors in x, or after a write to
    one of them or to a weight or buffer of the model; writes through `.data` or NumPy go unseen, as torch does not note
    them. Gradients flow through z, not into parameters.

    A state of several images that fit together is a tuple of them, as the model has it, and its layout a pyramid; other
    states of several tensors are one flat tensor (B, D), as torchdeq makes of them. A model that calls its DEQ more than
    once in a forward pass is taken at its first call.

    Args:
        model: the model. x is a tensor or a pytree of them: a tuple means the positional arguments of a model that takes
            several, a dict its keyword arguments, see `call_arguments`. Its attribute `layout`, if any, says what the axes
            of the state are.
        deq: the DEQ, or its name in the model, where the model has several.

    Raises:
        ValueError: no torchdeq DEQ in the model, or several and none named.
        TypeError: no module.
    """

    def __init__(self, model: nn.Module, deq: str | nn.Module | None = None) -> None:
        super().__init__()
        self._deq = [_find(model, deq)]  # a part of the model already
        self.model = model
        self._captured: tuple[_Same, Any, Callable[[State], State], State] | None = None

    @property
    def layout(self) -> Any:
        """The model's attribute `layout`; None where it has none."""
        return getattr(self.model, "layout", None)

    def forward(self, z: State, x: Any) -> State:
        """f(z, x), shaped like z."""
        f, _ = self._problem(x)
        with resting(self.model), frozen(self.model):
            return f(z)

    def initial_state(self, x: Any) -> State:
        """Where the model starts its solve."""
        return self._problem(x)[1]

    def _problem(self, x: Any) -> tuple[Callable[[State], State], State]:
        """(f, z0) for x, captured once."""
        leaves, structure = ([x], "") if isinstance(x, Tensor) else _flattened(x)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors:
            raise TypeError(f"x must be a tensor or a pytree of them, the model's raw inputs, got {type(x).__name__}")
        if any(tensor.is_inference() for tensor in tensors):  # has no version to go by
            return self._capture(x)
        weights = itertools.chain(self.model.parameters(), self.model.buffers())
        plain = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        key = (structure, plain, [tensor._version for tensor in tensors], [(id(w), w._version) for w in weights])
        if self._captured is None or not self._captured[0].are(tensors) or self._captured[1] != key:
            self._captured = (_Same(tensors), key, *self._capture(x))
        return self._captured[2], self._captured[3]

    def _capture(self, x: Any) -> tuple[Callable[[State], State], State]:
        with frozen(self.model):
            (func, *rest), options = run_until(self._deq[0], "f_solver", self.model, x, "torchdeq DEQ")
        x0 = rest[0] if rest else options["x0"]
        f: Any
        f, z0, _ = _single(func, x0)
        images = None if self.layout == "vector" else _images(func, x0)
        if images is None:
            return f, z0.detach()
        return lambda z: images.unpack(f(images.pack(z))), images.unpack(z0.detach())


def holds_deq(f: Any) -> bool:
    """Whether f is a module with a torchdeq DEQ in it, and not a `FixedPointMap` yet."""
    core = sys.modules.get("torchdeq.core")
    if core is None or not isinstance(f, nn.Module) or isinstance(f, FixedPointMap):
        return False
    return any(isinstance(module, core.DEQBase) for module in f.modules())


ADAPTERS.append(lambda f: FixedPointMap(f) if holds_deq(f) else None)


def _library() -> Any:
    try:
        import torchdeq
    except ImportError as error:
        raise ImportError("this needs torchdeq, which is not installed: pip install torchdeq==0.1.0") from error
    return torchdeq


def _find(model: Any, deq: str | nn.Module | None) -> nn.Module:
    """The DEQ of a model, the named one where there are several."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    _library()
    from torchdeq.core import DEQBase

    found = {name: module for name, module in model.named_modules() if isinstance(module, DEQBase)}
    if not found or "" in found:
        given = "is one itself: give the model that calls it" if found else "has none"
        raise ValueError(f"model must hold a torchdeq DEQ; {type(model).__name__} {given}")
    chosen = [module for name, module in found.items() if deq in (None, name) or deq is module]
    if len(chosen) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} torchdeq DEQs ({', '.join(found)}): say which one is meant with "
            f"FixedPointMap(model, deq=name), got {deq if deq is None or isinstance(deq, str) else type(deq).__name__!r}"
        )
    return chosen[0]


def _single(func: Callable[[Any], Any], x0: Any) -> tuple[Callable[[Tensor], Tensor], Tensor, Callable[[Tensor], Any]]:
    """(f, z0, back): torchdeq's problem on one tensor, batch first, of two axes or more; and the way back to its form.

    torchdeq hands over a tensor, (B,) and 0-dimensional ones included, or (no_stat) a list of tensors.
    """
    if isinstance(x0, Tensor):
        shape = x0.shape
        if x0.dim() > 1:
            return func, x0, lambda z: z
        return lambda z: func(z.reshape(shape)).reshape(-1, 1), x0.reshape(-1, 1), lambda z: z.reshape(shape)
    packing = Packing(tuple(part.shape[1:] for part in x0), single=False)
    return (
        lambda z: packing.take(tuple(func(list(packing.unpack(z)))), z),
        packing.pack(tuple(x0)),
        lambda z: list(packing.unpack(z)),
    )


def _images(func: Any, x0: Any) -> Packing | None:
    """How a state that torchdeq has flattened is made of images, where these are one, or fit together; None else."""
    shapes = [part.shape[1:] for part in x0] if isinstance(x0, (tuple, list)) else None
    if shapes is None:  # torchdeq's wrapper knows them
        shapes = [torch.Size(shape[1:]) for shape in getattr(func, "z_shape", ())]
    single = len(shapes) == 1
    try:
        spatial = bool(shapes) and guess_layout(shapes[0] if single else tuple(map(tuple, shapes))).spatial
    except ValueError:
        return None
    return Packing(tuple(shapes), single) if spatial else None


def _like_rows(mask: Tensor, z: Any) -> Tensor:
    """A mask (B,) broadcastable over z."""
    return mask.reshape(-1, *[1] * (z.dim() - 1))


def _statistics(solution: Solution, lost: Tensor) -> Any:
    """torchdeq's SolverStat of a solve; `lost` (B,): the samples with nothing to show."""
    from torchdeq.solver.stat import SolverStat

    trace, device = solution.trace, lost.device
    assert trace.absolute is not None
    relative, absolute = (torch.where(lost, torch.nan, value) for value in (trace.residual, trace.absolute))
    rel_lowest = torch.where(lost, torch.nan, solution.residual)
    # the call that saw the returned iterate: of those with its relative residual, the one of smallest ‖f(z) − z‖
    seen = torch.where(relative == rel_lowest, absolute, torch.inf)
    measured = seen.argmin(dim=0, keepdim=True) if len(lost) else lost.new_zeros(1, 0, dtype=torch.int64)
    spent = trace.nfe.to(device).gather(0, measured)[0]
    status = solution.status.to(device)
    return SolverStat(
        abs_lowest=absolute.gather(0, measured)[0],
        rel_lowest=rel_lowest,
        abs_trace=absolute.T,
        rel_trace=relative.T,
        nstep=torch.where(lost, 0, spent).float(),
        nfe=solution.nfe.to(device),
        converged=solution.converged & ~lost,
        status=torch.where(lost, int(Status.NON_FINITE), status),
    )
