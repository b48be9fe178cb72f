"""Solving with a fixed budget and no decisions on the host: what can be compiled as one graph."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metabroyden.chunk import check_compilable
from metabroyden.function import Given, GuardedFunction, in_caller_mode
from metabroyden.problem import Problem
from metabroyden.solution import Cell, Solution, State, Status, Trace, is_safe, relative, scaled_norm
from metabroyden.solve import check_options, nothing
from metabroyden.state import Packing, check_context, in_dtype_of


class FixedBudget:
    """`solve` without looking: every sample gets the same number of evaluations, on the full batch, in one graph.

    Nothing is frozen or gathered and nothing is read back until the end, so that `torch.compile` can fuse the solver's
    arithmetic with f, and a GPU never waits. Every sample costs what the whole batch costs. f is called and the iterate
    returned as in `solve`. A learned solver runs its learned steps only: there is no hand-over here. Recompiles for every
    new shape of z0 or of the context; since a graph cannot tell whether f changes what it is given, f is called once more
    then, uncompiled and uncounted. Uncompiled, it can be exported (`torch.export`) as a part of a model, without that check.

    Args:
        f: batch-first map, f(z) or f(z, context), as for `solve`.
        solver: any solver whose steps cost a number of evaluations known beforehand (not `Newton`, no line search).
        max_nfe: evaluations of f for every sample; rtol, atol and f_dtype as for `solve`.
        compiled: False runs the same code eagerly; so does, with a warning, a failure to compile.
        mode: passed to `torch.compile`, for instance "reduce-overhead" for CUDA graphs.

    Attributes:
        compile_seconds: wall-clock seconds of the calls that compiled, in sum, with the call of f before each.

    Raises:
        ValueError, TypeError: bad input, naming what was given and what is wanted.

    Examples:
        >>> import metabroyden as mb
        >>> run = mb.FixedBudget(torch.cos, mb.Anderson(), max_nfe=10, compiled=False)
        >>> solution = run(torch.zeros(3, 1))
        >>> solution.nfe.tolist(), bool(solution.converged.all())
        ([10, 10, 10], True)
    """

    def __init__(
        self,
        f: Cell,
        solver: Any,
        *,
        max_nfe: int,
        rtol: float = 1e-3,
        atol: float = 0.0,
        f_dtype: torch.dtype | None = None,
        compiled: bool = True,
        mode: str | None = None,
    ) -> None:
        solver = check_options(f, solver, rtol, atol, max_nfe, 1, f_dtype)
        check_compilable("FixedBudget", solver)
        self.f, self.solver, self.max_nfe = f, solver, max_nfe
        self.rtol, self.atol, self.f_dtype = rtol, atol, f_dtype
        self.compile_seconds = 0.0
        self._seen: set[Any] = set()
        self._compiled = torch.compile(self._iterate, dynamic=False, mode=mode) if compiled else None

    def __call__(self, z0: State, context: Any = None) -> Solution:
        """The solution for a batch; nothing raises where samples fail, see `Solution.status`."""
        packing = Packing.of(z0)
        device = (z0 if isinstance(z0, Tensor) else z0[0]).device.type
        evaluator = GuardedFunction(in_caller_mode(self.f, device), packing, f_dtype=self.f_dtype)
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            flat = packing.pack(z0).detach().clone()
            check_context(context, flat.shape[0])
            if flat.shape[0] == 0:
                return nothing(packing, flat)
            began = _now()
            found = self._run(evaluator, flat, Given(context), in_dtype_of(context, flat))
            z, best, done, last, residuals, absolute = (value.detach() for value in found)
            calls, batch = residuals.shape
            failed = torch.where(last, int(Status.MAX_NFE), int(Status.NON_FINITE))
            status = torch.where(done, int(Status.CONVERGED), failed)
            nfe = torch.arange(1, calls + 1)[:, None].expand(calls, batch)
            seconds = torch.full((calls,), torch.nan, dtype=torch.float64)
            status = status.cpu()
            seconds[-1] = _now() - began
        return Solution(
            z=packing.unpack(z),
            residual=best,
            nfe=torch.full((batch,), calls),
            steps=torch.full((batch,), calls - 1),
            converged=done,
            status=status,
            trace=Trace(residuals, nfe.clone(), seconds, torch.zeros(calls, batch, dtype=torch.int8), absolute),
        )

    def _run(self, evaluator: GuardedFunction, z0: Tensor, given: Given, context: Any) -> tuple[Tensor, ...]:
        """`_iterate`, compiled where that was asked for and works."""
        if self._compiled is None:
            return self._iterate(evaluator, z0, given, context)
        mode = getattr(evaluator.f, "dtype", None) if evaluator.f is not self.f else None
        shapes = (z0.shape, z0.dtype, mode, str(pytree.tree_map_only(Tensor, lambda t: (t.shape, t.dtype), context)))
        began, new = time.perf_counter(), shapes not in self._seen
        if new:
            evaluator(z0, given)
        try:
            blind = GuardedFunction(evaluator.f, evaluator.packing, f_dtype=self.f_dtype, guarded=False)
            found = self._compiled(blind, z0, given, context)
        except Exception as error:  # what f itself raises, it raises again when it is run as it stands
            found = self._iterate(evaluator, z0, given, context)
            self._compiled = None
            warnings.warn(f"FixedBudget runs uncompiled: {type(error).__name__}: {str(error)[:200]}", stacklevel=3)
        if new:
            self._seen.add(shapes)
            self.compile_seconds += time.perf_counter() - began
        return found

    def _iterate(self, evaluator: GuardedFunction, z0: Tensor, given: Given, context: Any) -> tuple[Tensor, ...]:
        """(best z, its residual, converged, last evaluation finite; of all calls the residuals, relative and absolute).

        `context` is the one that the solver sees.
        """
        problem = FixedProblem(self, evaluator, z0, given, context)
        z = self.solver.start(z0, problem)
        state = None
        while len(problem.residuals) < self.max_nfe:
            g = problem.residual(z)
            if len(problem.residuals) + self.solver.min_nfe > self.max_nfe:
                break
            state = self.solver.init(z, g, problem) if state is None else state
            step = self.solver.step(z, g, state, problem)
            z, state = step.z, step.state
        residuals, absolute = torch.stack(problem.residuals), torch.stack(problem.absolute)
        return problem.best_z, problem.best_residual, problem.done, problem.last, residuals, absolute


def _now() -> float:
    """Seconds of the clock; NaN inside a graph, which has none."""
    return math.nan if torch.compiler.is_compiling() else time.perf_counter()


class FixedProblem(Problem):
    """The problem of `FixedBudget`: the best iterates are kept, as in `Evaluator`, without a look at them."""

    keep_inverse = False

    def __init__(self, owner: FixedBudget, evaluator: GuardedFunction, z0: Tensor, given: Given, context: Any) -> None:
        self._owner, self._call, self._z0, self._given, self.context = owner, evaluator, z0, given, context
        self.shape = evaluator.packing.shape
        self._last: tuple[Tensor, Tensor] | None = None
        self._origin: Tensor | None = None
        self.residuals: list[Tensor] = []
        self.absolute: list[Tensor] = []
        batch = z0.shape[0]
        self.best_z, self.best_residual = z0, z0.new_full((batch,), torch.nan)
        self._best = self.best_residual.double()  # its ‖g‖
        self.done = torch.zeros(batch, dtype=torch.bool, device=z0.device)
        self.last = self._all = ~self.done
        # values on a CPU can be read while a graph is not being made; elsewhere the host would wait for them
        self._readable = z0.is_cpu and not torch.compiler.is_compiling()

    @property
    def steps_left(self) -> int:  # type: ignore[override]
        """See `Problem`."""
        return self._owner.max_nfe - len(self.residuals)

    def origin(self) -> Tensor:
        """f(z0), (R, n); evaluated when first asked for, unless the solve began there."""
        if self._origin is None:
            self.residual(self._z0)
        assert self._origin is not None
        return self._origin

    def image(self, z: Tensor, g: Tensor) -> Tensor:
        """See `Problem`."""
        return self._last[1].clone() if self._last is not None and self._last[0] is z else z + g

    def _measure(self, g: Tensor, fz: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(‖g‖, ‖f(z)‖ in float64, the relative residual, whether both are finite), (R,) each."""
        if self._readable:
            norms = torch.stack([torch.linalg.vector_norm(x, dim=1) for x in (g, fz)])
            if is_safe(norms):
                g_norm, f_norm = norms.double()
                return g_norm, f_norm, (g_norm / f_norm).to(g.dtype), self._all
        g_norm, f_norm = scaled_norm(g), scaled_norm(fz)
        finite = torch.isfinite(g_norm) & torch.isfinite(f_norm)
        return g_norm, f_norm, relative(g_norm, f_norm).to(g.dtype), finite

    def residual(self, z: Tensor, among: Any = None) -> Tensor:
        """See `Problem`."""
        owner = self._owner
        fz = self._call(z, self._given)
        g = fz - z
        self._last = z, fz
        if z is self._z0:
            self._origin = z + g  # in memory of ours: f may use its own again
        g_norm, f_norm, residual, self.last = self._measure(g, fz)
        reached = self.last & (g_norm <= owner.atol + owner.rtol * f_norm)
        better = ~self.done & (reached | (self.last & ~(g_norm >= self._best)))
        if self._readable and bool(better.all()):  # no copy while all improve
            self.best_z, self.best_residual, self._best = z, residual, g_norm
        else:
            self.best_z = torch.where(better[:, None], z, self.best_z)
            self.best_residual = torch.where(better, residual, self.best_residual)
            self._best = torch.where(better, g_norm, self._best)
        self.done = self.done | reached
        self.residuals.append(residual)
        self.absolute.append(torch.where(self.last, g_norm, torch.nan).to(z.dtype))
        return g
