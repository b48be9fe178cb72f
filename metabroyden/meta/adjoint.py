"""Adjoint systems as tasks, and `fit_adjoint`: a solver for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metabroyden.deq import initial_state
from metabroyden.gradients.implicit import pull
from metabroyden.learned import AdjointLSTM
from metabroyden.learned.fingerprint import fingerprint, module_of
from metabroyden.meta.config import MetaConfig
from metabroyden.meta.defaults import state_layout
from metabroyden.meta.fit import contexts_of, make_learned, refuse_inference
from metabroyden.meta.inputs import check_contexts
from metabroyden.meta.target import ModelMap, check_start, resting, target_of
from metabroyden.meta.tasks import TaskSet
from metabroyden.meta.trainer import MetaTrainer, mean_evaluations
from metabroyden.progress import progress_bar
from metabroyden.shared import bare
from metabroyden.solve import solve
from metabroyden.solvers.broyden import Broyden
from metabroyden.state import gather


class AdjointMap(nn.Module):
    """f(u, context) = Jᵀu + v for the Jacobian J of a cell at z*; all (B, n), flat.

    The context is a dict of z*, of the cell's own context x and of the cotangent v, under "z", "x" and "v". One graph of
    the cell serves all evaluations with the same z*; linear in u, with gradients towards it.
    """

    def __init__(self, cell: Callable[..., Any], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.cell, self.shape = cell, tuple(shape)
        self._graph: tuple[Tensor, Tensor, Tensor] | None = None  # the z* it is for, that with a graph, its image

    def forward(self, u: Tensor, context: dict[str, Any]) -> Tensor:
        """Jᵀu + v, (B, n)."""
        star = context["z"]
        with torch.enable_grad():
            if self._graph is None or self._graph[0] is not star:
                z = star.detach().reshape(-1, *self.shape).requires_grad_()
                self._graph = star, z, self.cell(z) if context["x"] is None else self.cell(z, context["x"])
            _, z, image = self._graph
            (pulled,) = pull((image,), (z,), (u.reshape(z.shape),), create_graph=u.requires_grad, retain_graph=True)
        return pulled.flatten(1) + context["v"]

    def forget(self) -> None:
        """Let go of the graph."""
        self._graph = None


def fit_adjoint(
    cell: nn.Module,
    x_train: Any,
    *,
    cotangents: Tensor | None = None,
    layout: str | None = None,
    rtol: float = 1e-3,
    steps: int = 400,
    unroll: int = 10,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> AdjointLSTM:
    """Meta-train a solver for the backward pass of a trained DEQ: `mb.Implicit(solver=fit_adjoint(cell, x))`.

    Equilibria of x_train are found once (by Broyden, to 1e-4), a fifth of them (at most 256) is held out; what was gained
    there over Broyden is in `summary["held_out"]`.

    Args:
        cell: module f(z, x) with a state of one tensor; in evaluation mode while the fit lasts. Or a `DEQ`, or a model
            with one in it, as for `fit_solver`.
        x_train: contexts of N ≥ 10 samples, or batches of them, as for `fit_solver`.
        cotangents: (N, ...) shaped like the states: gradients of the loss at the equilibria; default standard normal.
        layout: as in `fit_solver`.
        rtol: tolerance at which it is judged.
        steps: outer steps.
        unroll: inner ones.
        seed: of weights and batches.
        progress: show a bar (needs rich). options: of `AdjointConfig`.

    Raises:
        ValueError: too few contexts, a state of several tensors, or cotangents that are not like the states.
        RuntimeError: inference mode or autocast is on.
    """
    refuse_inference("fit_adjoint")
    target = target_of(cell)
    x_train = contexts_of(x_train, target)
    check_contexts(x_train)
    f: Any = target.f
    config = MetaConfig(steps=steps, unroll=unroll, seed=seed, validation_rtol=rtol, backend="native")
    with resting(target.whole or module_of(f)):
        if target.encode is not None:
            x_train = target.encode(x_train)
        z0 = initial_state(f, x_train) if target.z0 is None else target.z0(bare(x_train))
        check_start(z0)
        if not isinstance(z0, Tensor):
            raise ValueError("fit_adjoint takes states of one tensor")
        star: Any = solve(f, z0, x_train, solver=Broyden(memory=60), rtol=1e-4, max_nfe=100, throw=False).z
        v = _cotangents(cotangents, star, seed)
        shape = tuple(star.shape[1:])
        where = state_layout(f, star, layout)
        learned = make_learned("adjoint", where, seed=seed, **options).to(star)
        known = {"z": star.flatten(1), "x": x_train, "v": v.flatten(1)}
        order = torch.randperm(len(star), generator=torch.Generator().manual_seed(seed), device="cpu").unsqueeze(1)
        held = max(1, min(256, len(star) // 5))
        system = AdjointMap(f, shape)
        tasks = TaskSet(
            system,
            order[held:],
            order[:held],
            encode=lambda rows: gather(known, rows.squeeze(1).to(star.device)),
            z0=lambda context: context["v"],
        )
        with progress_bar("meta-training the adjoint", steps, show=progress) as report:
            MetaTrainer(learned, tasks, config).run(report)
        learned.fingerprint = fingerprint(f.model if isinstance(f, ModelMap) else f)
        learned.summary["held_out"] = {
            "rtol": rtol,
            "max_nfe": config.validation_nfe,
            "mean_evaluations": mean_evaluations(learned, tasks, rtol=rtol),
            "mean_evaluations_broyden": mean_evaluations(Broyden(memory=60), tasks, rtol=rtol),
            "samples": held,
        }
    system.forget()
    return learned


def _cotangents(given: Any, star: Tensor, seed: int) -> Tensor:
    """The cotangents given, checked, or standard normal ones."""
    if given is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(star.shape, generator=generator, dtype=torch.float64, device="cpu").to(star)
    if not isinstance(given, Tensor):
        raise TypeError(f"cotangents must be a tensor, got {type(given).__name__}")
    if given.shape != star.shape:
        raise ValueError(f"cotangents must be shaped like the states, {tuple(star.shape)}, got {tuple(given.shape)}")
    if given.dtype != star.dtype or not bool(given.isfinite().all()):
        raise ValueError(f"cotangents must be finite and {star.dtype} like the states, got {given.dtype}")
    return given
