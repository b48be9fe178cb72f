"""Differentiable solves: K steps of a learned solver with the graph kept, by `higher` or by plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from metabroyden.function import Given, GuardedFunction, part_of
from metabroyden.problem import Problem, seen_context
from metabroyden.solution import Cell, State, relative, residual_norms
from metabroyden.solve import begin as begin_solve
from metabroyden.solver import SolverBase, Step, as_solver
from metabroyden.state import Packing

BACKENDS = ("higher", "native")


class Rollout(NamedTuple):
    """A differentiable solve of K steps. B samples, n coordinates."""

    residuals: Tensor  # (K + 1, B) relative residuals, the first at the solver's start
    iterates: tuple[Tensor, ...]  # K + 1 of them, (B, n)
    extra: tuple[
        Tensor, ...
    ]  # K values (B,) that the solver's states hold under `extra`, such as a predicted residual; or none
    state: Any  # the solver's last one

    @property
    def z(self) -> Tensor:
        """The last iterate, (B, n)."""
        return self.iterates[-1]

    def carry(self) -> tuple[Tensor, Any]:
        """Where another rollout may begin, cut off from this one's graph."""
        return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (self.z, self.state))


class UnrolledProblem(Problem):
    """The problem of `unroll`, without counter or no_grad. R rows, n coordinates.

    half: whether f computes under bfloat16 autocast; what it returns comes back in z's dtype. twice: whether what is `run`
    keeps its inputs alone and is computed once more in the backward pass.
    """

    def __init__(self, f: Cell, z0: State, context: Any, *, half: bool = False, twice: bool = False) -> None:
        self.f, self._given, self._half, self._twice = f, Given(context), half, twice
        self.packing = Packing.of(z0)
        self.shape = self.packing.shape
        self._call = GuardedFunction(f, self.packing, attached=True)
        self.z0 = self.packing.pack(z0)
        self.context = seen_context(context, self.z0)
        self._origin: Tensor | None = None
        if half and self.z0.dtype != torch.float32:
            raise ValueError(f"f in bfloat16 is for states of float32, got {self.z0.dtype}")

    def evaluate(self, z: Tensor) -> Tensor:
        """f(z), (R, n)."""
        with torch.autocast(z.device.type, torch.bfloat16) if self._half else nullcontext():
            return self._call(z, self._given)

    def measure(self, z: Tensor, g: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(g = f(z) − z (R, n), relative residual (R,)), both in z's dtype; g as given, where it is known."""
        if g is not None:
            _, g_norm, f_norm = residual_norms(z, z + g)
            return g, relative(g_norm, f_norm)
        return self.run(self._measure, z)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(*arguments), an evaluation or a step."""
        return checkpoint(function, *arguments, use_reentrant=False) if self._twice else function(*arguments)

    def _measure(self, z: Tensor) -> tuple[Tensor, Tensor]:
        g, g_norm, f_norm = residual_norms(z, self.evaluate(z))
        return g, relative(g_norm, f_norm)

    def residual(self, z: Tensor, among: Any = None) -> Tensor:
        """See `Problem`."""
        return self.evaluate(z) - z

    def method(self, name: str, *settings: Any) -> Cell:
        """See `Problem`."""
        method = part_of(self.f, name)
        return method(*settings) if settings else method

    def evaluate_method(self, method: Cell, z: Tensor) -> Tensor:
        """See `Problem`."""
        return self._call(z, self._given, method)

    def elementwise(self, name: str, v: Tensor) -> Tensor:
        """See `Problem`."""
        return self._call(v, function=self.method(name))

    def record_residual(self, z: Tensor, fz: Tensor) -> Tensor:
        """See `Problem`."""
        return fz - z

    def origin(self) -> Tensor:
        """See `Problem`."""
        if self._origin is None:
            self._origin = self.evaluate(self.z0)
        return self._origin


def unroll(
    solver: Any,
    f: Cell,
    z0: State,
    context: Any = None,
    *,
    steps: int,
    backend: str = "higher",
    begin: tuple[Tensor, Any] | None = None,
    detach_features: bool = False,
    checkpoint_steps: bool = False,
    half: bool = False,
) -> Rollout:
    """Run `steps` steps of a solver and keep the graph: exact backpropagation through time, unless told otherwise.

    Args:
        solver: a solver whose steps cost a known number of evaluations (a safeguard plays no part here). Gradients
            through the secants of a classical one are exact, and tend to explode with the number of steps.
        f: as in `solve`; its parameters should not require gradients.
        z0: start, as in `solve`.
        context: of f, as in `solve`.
        steps: K ≥ 1.
        backend: "higher" (the iterate is the fast weight of a module, the solver a differentiable optimizer) or
            "native" (a plain loop). Both give the same numbers and gradients.
        begin: (iterate (B, n), solver's state) to go on from, see `Rollout.carry`; None: the solver's own start.
        detach_features: drop the gradients along what the solver sees of iterates and residuals, see `FeatureDetached`.
        checkpoint_steps: keep the inputs of each evaluation and of each step alone, and compute both again in the
            backward pass: the same gradients, memory for one step's graph, a third more time.
        half: f computes under bfloat16 autocast, iterates and residual norms stay float32. Safe where residuals above
            some 1e-2 are what is trained for: below, they are rounding. ValueError for states that are not float32.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    solver = as_solver(solver)
    if not solver.fixed_cost:
        raise ValueError(f"unroll needs steps that cost a known number of evaluations; {solver!r} decides on the way")
    if solver.required_methods and (detach_features or checkpoint_steps or half):
        raise ValueError(
            f"{type(solver).__name__} uses parts of f: no detach_features, checkpoint_steps or half, got "
            f"{detach_features}, {checkpoint_steps}, {half}"
        )
    problem = UnrolledProblem(f, z0, context, half=half, twice=checkpoint_steps)
    run = _unroll_higher if backend == "higher" else _unroll_native
    return _rollout(*run(FeatureDetached(solver) if detach_features else solver, problem, steps, begin))


class FeatureDetached(SolverBase):
    """A learned solver whose features are constants of its parameters: ∂z⁺/∂z = I, and ∂u/∂(z, g) = 0 for its update u.

    The assumption of Andrychowicz et al. (2016), section 2 (edges from the gradients to the optimizer are dropped, those
    of its own state are kept): what a parameter does to later residuals is felt along z⁺ = z + u and through the
    solver's memory, not through what the solver sees of later iterates. Cheaper, and it does not explode with
    ∂u/∂g; biased. Values are those of the solver.
    """

    def __init__(self, solver: SolverBase) -> None:
        self.solver = solver

    def start(self, z0: Tensor, problem: Any) -> Tensor | Step:
        """The solver's."""
        return self.solver.start(z0, problem)

    def init(self, z: Tensor, g: Tensor, problem: Any) -> Any:
        """The solver's, at a constant."""
        return self.solver.init(z.detach(), g.detach(), problem)

    def step(self, z: Tensor, g: Tensor, state: Any, problem: Any) -> Step:
        """The solver's, at a constant, with the identity towards z."""
        fixed = z.detach()
        step = self.solver.step(fixed, g.detach(), state, problem)
        return step._replace(z=step.z + (z - fixed))


Trail = list[tuple[Tensor, Tensor, Any]]
"""Each iterate with its relative residual (B,) and the `extra` of the solver's state after the step that led there."""


def _rollout(trail: Trail, state: Any) -> Rollout:
    iterates, residuals, extra = zip(*trail, strict=True)
    return Rollout(torch.stack(residuals), iterates, tuple(value for value in extra if value is not None), state)


def _unroll_native(solver: SolverBase, problem: UnrolledProblem, steps: int, begin: Any) -> tuple[Trail, Any]:
    z, state, g = _begun(solver, problem, begin)
    g, residual = problem.measure(z, g)
    trail: Trail = [(z, residual, None)]
    if state is None:
        state = solver.init(z, g, problem)
    for _ in range(steps):
        z, state, g = problem.run(solver.step, z, g, state, problem)
        g, residual = problem.measure(z, g)
        trail.append((z, residual, getattr(state, "extra", None)))
    return trail, state


def _begun(solver: SolverBase, problem: UnrolledProblem, carried: Any) -> tuple[Tensor, Any, Tensor | None]:
    """(z, state, g) where an unroll begins; state and g are None where the solver, or f, has yet to tell."""
    if carried is not None:
        return carried[0].detach(), carried[1], None
    return begin_solve(solver, problem.z0, problem)


class _Iterate(nn.Module):
    """A module whose one parameter is the iterate: the fast weight that `higher` updates."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.z = nn.Parameter(z)

    def forward(self, problem: UnrolledProblem, g: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(z, g, relative residual) at the current fast weight; g as given, where it is known."""
        g, residual = problem.measure(self.z, g)
        return self.z, g, residual


class _Carrier(torch.optim.SGD):
    """Names our differentiable optimizer to `higher`; never steps itself."""


def _unroll_higher(solver: SolverBase, problem: UnrolledProblem, steps: int, begin: Any) -> tuple[Trail, Any]:
    import higher

    _register_with_higher()
    module = _Iterate(problem.z0.detach().clone())
    with higher.innerloop_ctx(module, _Carrier(module.parameters(), lr=1.0), copy_initial_weights=False) as (net, opt):
        z, state, g = _begun(solver, problem, begin)
        net.update_params([z.requires_grad_()])
        z, g, residual = net(problem, g)
        trail: Trail = [(z, residual, None)]
        # The solver is no optimizer setting (those are deep-copied) but an attribute of the inner loop.
        opt.solver, opt.problem = solver, problem
        opt.solver_state = solver.init(z, g, problem) if state is None else state
        for _ in range(steps):
            # A loss that does not touch f: the optimizer's "gradient" is the live residual, with its graph.
            loss = (z if z.requires_grad else z.detach().requires_grad_()).sum()
            opt.step(loss, grad_callback=lambda _, live=g: [-live])
            z, g, residual = net(problem, opt.known)
            trail.append((z, residual, getattr(opt.solver_state, "extra", None)))
        return trail, opt.solver_state


def _register_with_higher() -> None:
    """Make `_Carrier` known to higher as our learned update (once; imported on first use)."""
    import higher
    from higher.optim import DifferentiableOptimizer

    if _Carrier in higher.optim._opt_mapping:
        return

    class LearnedUpdate(DifferentiableOptimizer):
        """θ⁺ = the learned solver's step from θ with gradient −g."""

        solver: Any
        problem: UnrolledProblem
        solver_state: Any
        known: Tensor | None

        def _update(self, grouped_grads: Any, **_: Any) -> None:
            group = self.param_groups[0]
            arguments = group["params"][0], -grouped_grads[0][0], self.solver_state, self.problem
            group["params"][0], self.solver_state, self.known = self.problem.run(self.solver.step, *arguments)

    higher.register_optim(_Carrier, LearnedUpdate)
