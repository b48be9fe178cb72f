"""A DEQ in training, its solvers kept up to date in alternation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from metabroyden import resume
from metabroyden.deq import DEQ, initial_state
from metabroyden.described import CheckpointError, check, damaged, fits
from metabroyden.gradients import Implicit
from metabroyden.learned import AdjointLSTM, LearnedSolver
from metabroyden.meta.adjoint import AdjointMap
from metabroyden.meta.config import Unrolling, count, positive
from metabroyden.meta.estimators import differentiate, frozen
from metabroyden.nn.pin import Pinned
from metabroyden.state import AugmentedContext, gather

_STATE = "the state of a OnlineMetaTrainer"
_TENSORS = dict[str, Tensor]


@dataclass(frozen=True)
class OnlineConfig(Unrolling):
    """How the solvers follow the weights. Adds to `Unrolling`:

    Attributes:
        warmup_steps: training steps at the beginning with a meta-step each.
        every: training steps from one meta-step to the next after that.
        unroll: solver steps of a meta-step.
        batch: its problems, drawn from the training batch.
        learning_rate: of the meta-steps (Adam).
    """

    warmup_steps: int = count(40, least=0)
    every: int = count(8)
    unroll: int = count(8)
    batch: int = count(16)
    learning_rate: float = positive(2e-3)


@dataclass(frozen=True)
class _Record:
    """What the header of `OnlineMetaTrainer.state_dict` says."""

    solvers: list[str]
    counts: tuple[int, int, int]
    waiting: bool


class OnlineMetaTrainer:
    """Meta-steps for a DEQ's learned solvers between its own training steps, on the problems that training meets.

    It watches the layer: the contexts, equilibria and cotangents of a training step are the problems of the next
    meta-step, so none is solved twice. For the first warmup_steps the layer keeps the classical solvers it
    has; then the learned ones take their place, with the hand-over of their safeguards.

        keep_up = OnlineMetaTrainer(deq, make_learned("grouped", layout), make_learned("adjoint", layout))
        for x, y in batches:
            loss(head(deq(x)), y).backward()
            optimizer.step()
            keep_up.step()

    Args:
        deq: the layer, with a cell of one tensor.
        forward: learned solver of its forward pass, trained in place; None leaves that as it is.
        backward: the same of its backward pass, an `AdjointLSTM`.
        config: see `OnlineConfig`.
        seed: of the problems that are drawn.

    Attributes:
        steps: meta-steps made.
        skipped: those whose gradient was not finite.
        losses: the last loss of either solver.
    """

    def __init__(
        self,
        deq: DEQ,
        forward: LearnedSolver | None = None,
        backward: AdjointLSTM | None = None,
        *,
        config: OnlineConfig | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(deq, DEQ):
            raise TypeError(f"deq must be the DEQ that is trained, got {type(deq).__name__}")
        if forward is None and backward is None:
            raise ValueError("OnlineMetaTrainer needs a learned solver, forward or backward")
        if forward is not None and (not isinstance(forward, LearnedSolver) or forward.homogeneous):
            raise TypeError(f"forward must be a learned solver such as GroupedLSTM, got {type(forward).__name__}")
        if backward is not None and not isinstance(backward, AdjointLSTM):
            raise TypeError(f"backward must be an AdjointLSTM, got {type(backward).__name__}")
        if backward is not None and not isinstance(deq.backward_mode, Implicit):
            raise TypeError(f"a backward solver needs a DEQ with Implicit gradients, got {deq.backward_mode!r}")
        self.deq, self.config = deq, OnlineConfig() if config is None else config
        self.steps = self.skipped = self._seen = 0
        self.losses: dict[str, float] = {}
        self._problem: dict[str, Any] = {}
        both: dict[str, LearnedSolver | None] = {"forward": forward, "backward": backward}
        self.solvers = {name: solver for name, solver in both.items() if solver is not None}
        named = {f"{name}_solver": solver for name, solver in self.solvers.items()}
        self._module = nn.ModuleDict(named).requires_grad_(True)
        self.optimizer = torch.optim.Adam(self._module.parameters(), lr=self.config.learning_rate)
        self.generator = torch.Generator().manual_seed(seed)
        self._waiting = set(self.solvers)  # which have not taken over yet
        deq.hooks.append(self._watch)
        if self.config.warmup_steps == 0:
            self.take_over()

    def take_over(self) -> None:
        """Give the layer its learned solvers."""
        if "forward" in self._waiting:
            self.deq.solver = self.solvers["forward"]
        if "backward" in self._waiting:
            mode = self.deq.backward_mode
            self.deq.backward_mode = replace(mode, solver=self.solvers["backward"], precondition=False)
        self._waiting = set()

    def _watch(self, f: Any, context: Any, z: Any) -> None:
        """Keep the problem of a training step, once its cotangent is known where one is wanted."""
        if not isinstance(z, Tensor):
            raise TypeError("OnlineMetaTrainer takes states of one tensor")
        x = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, context)
        problem = {"f": f.detached() if isinstance(f, Pinned) else f, "x": x, "z": z.detach()}
        if "backward" not in self.solvers:
            self._problem = problem
        elif z.requires_grad:

            def complete(v: Tensor) -> None:
                self._problem = {**problem, "v": v.detach()}

            z.register_hook(complete)

    def step(self) -> bool:
        """Count a training step; make a meta-step where one is due. Whether one was made.

        None is made where no equilibrium of this step was seen with its gradient.
        """
        self._seen += 1
        due = self._seen <= self.config.warmup_steps or self._seen % self.config.every == 0 or bool(self._waiting)
        made = due and bool(self._problem)
        if made:
            self.meta_step()
        self._problem = {}
        if self._seen >= self.config.warmup_steps and self._waiting and self.steps:
            self.take_over()
        return made

    def meta_step(self) -> None:
        """One meta-step for each learned solver, on a random part of the last problem."""
        if not self._problem:
            raise RuntimeError("OnlineMetaTrainer has seen no training step of its DEQ yet")
        f, x, z = (self._problem[key] for key in ("f", "x", "z"))
        rows = torch.randperm(len(z), generator=self.generator, device="cpu")[: self.config.batch].to(z.device)
        if x is None:  # f sees the whole batch always
            rows = torch.arange(len(z), device=z.device)
        x, z = gather((x, z), rows)
        plain = x.context if isinstance(x, AugmentedContext) else x
        self.optimizer.zero_grad()
        with frozen(self.deq.cell), torch.enable_grad():
            if "forward" in self.solvers:
                start = torch.zeros_like(z) if plain is None else initial_state(self.deq.cell, plain)
                self._descend("forward", f, start, x)
            if "backward" in self.solvers:
                v = self._problem["v"].index_select(0, rows).flatten(1)
                # a mean loss has tiny cotangents; the solver is homogeneous, the guards of an unroll are not
                v = v / v.norm(dim=1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny) * v.shape[1] ** 0.5
                context = {"z": z.flatten(1), "x": x, "v": v}
                self._descend("backward", AdjointMap(f, tuple(z.shape[1:])), v, context)
        self.optimizer.step()
        self.steps += 1

    def _descend(self, name: str, f: Any, z0: Any, context: Any) -> None:
        solver = self.solvers[name]
        loss, norm = differentiate(solver, f, z0, context, self.config, "native", steps=self.config.unroll)
        self.losses[name] = float(loss)
        if not bool(torch.isfinite(norm)):
            self.skipped += 1
            solver.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on bit for bit after an interruption, the solvers' weights included; not a copy."""
        counts = [self._seen, self.steps, self.skipped]
        header = {"solvers": sorted(self.solvers), "counts": counts, "waiting": bool(self._waiting)}
        tensors, header = resume.pack(self._module, self.optimizer, header, generator=self.generator)
        return {"tensors": tensors, "header": header}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; the layer gets its learned solvers where they had taken over.

        `CheckpointError`, a ValueError, for what is no such state, or one of other directions; nothing is changed then.
        """
        if not isinstance(state, dict) or set(state) != {"tensors", "header"} or not fits(state["tensors"], _TENSORS):
            held = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise CheckpointError(f"not the state of a OnlineMetaTrainer: it holds {held}")
        tensors, header = state["tensors"], state["header"]
        check(header, _Record, _STATE)
        if header["solvers"] != sorted(self.solvers):
            raise CheckpointError(f"the state is of solvers {header['solvers']}, wanted {sorted(self.solvers)}")
        seen, steps, skipped = header["counts"]
        if min(header["counts"]) < 0:
            raise damaged(_STATE, f"counts are {header['counts']}, wanted none below 0")
        taken = int(steps * len(self.solvers) > skipped)
        resume.restore(tensors, header, _STATE, self._module, self.optimizer, taken=taken, generator=self.generator)
        self._seen, self.steps, self.skipped = seen, steps, skipped
        if not header["waiting"]:
            self.take_over()

    def close(self) -> None:
        """Stop watching; the solvers no longer require gradients."""
        if self._watch in self.deq.hooks:
            self.deq.hooks.remove(self._watch)
        self._problem = {}
        for solver in self.solvers.values():
            solver.requires_grad_(False).eval()
