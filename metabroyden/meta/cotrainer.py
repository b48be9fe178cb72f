"""A DEQ and its root finder in training together, beside any training loop."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metabroyden import resume
from metabroyden.deq import DEQ, initial_state
from metabroyden.described import CheckpointError, check, damaged, fits
from metabroyden.function import CallerMode, in_caller_mode, method_of
from metabroyden.gradients import Implicit
from metabroyden.gradients.base import parts_of
from metabroyden.learned import AdjointLSTM, LearnedSolver
from metabroyden.learned.fingerprint import module_of
from metabroyden.learned.learned_start import LearnedStart, can_start
from metabroyden.meta import distributed
from metabroyden.meta.adjoint import AdjointMap
from metabroyden.meta.config import Unrolling, choice, count, positive, weight
from metabroyden.meta.estimators import differentiate, frozen
from metabroyden.meta.orthogonal import make_optimizer
from metabroyden.meta.target import deqs_in
from metabroyden.meta.unroll import BACKENDS, unroll
from metabroyden.nn.pin import Pinned
from metabroyden.solution import Cell, State
from metabroyden.solver import as_solver
from metabroyden.state import AugmentedContext, Packing, gather

MEASURE_EVERY = 8
"""Training steps from one measurement of gradient norms to the next, with `balance`."""
AIM, STEP, SPAN = 0.7, 2.0, 8.0
"""Share of what may be lost that `judge` aims at; most that it changes λ₂ by; how far λ₂ may get from where it began."""
BLIND = 10
"""Steps without any equilibrium after which a warning says so."""
FLOOR = 1e-4
"""Relative residuals below it are as good as zero to `CoTrainer.loss`."""
_STATE = "the state of a CoTrainer"
_TENSORS = dict[str, Tensor]


@dataclass(frozen=True)
class CoTrainConfig(Unrolling):
    """How a DEQ and its solvers are trained together. Adds to `Unrolling`, which is that of meta-steps:

    Attributes:
        warmup_steps: training steps at the beginning with a meta-step each, in which the layer keeps its classical solver.
        every: training steps from one meta-step to the next after that.
        unroll: solver steps of a meta-step.
        batch: its problems, drawn from the training batch.
        learning_rate: of the solvers' weights (Adam).
        orthogonal_rate: of their matrices, by `OrthogonalAdam`, or 0: Adam for them too.
        start_weight: λ₁ of `CoTrainer.loss`.
        residual_weight: λ₂ of `CoTrainer.loss` at first.
        residual_steps: k of `CoTrainer.loss`, steps of the learned solver that the DEQ is trained through.
        residual_batch: samples of a training batch that take part in these terms, at most.
        balance: 0: λ₂ is what `residual_weight` and `judge` say. Else λ₂ is also at most this share of ‖∇ task‖/‖∇ residual
            term‖ over the cell's weights, measured every eighth step by two more backward passes.
        backend: of the unroll through the learned solver, "native" or "higher".
    """

    warmup_steps: int = count(40, least=0)
    every: int = count(8)
    unroll: int = count(8)
    batch: int = count(16)
    learning_rate: float = positive(2e-3)
    orthogonal_rate: float = positive(0.0)
    start_weight: float = weight(1.0)
    residual_weight: float = weight(0.06)
    residual_steps: int = count(4)
    residual_batch: int = count(32)
    balance: float = positive(0.0)
    backend: str = choice("native", BACKENDS)


@dataclass(frozen=True)
class _Record:
    """What the header of `CoTrainer.state_dict` says."""

    solvers: list[str]
    counts: tuple[int, int, int]
    waiting: bool
    started: bool
    residual_weight: float


class CoTrainer:
    """Trains a DEQ to be easy for its learned solver, and the solver to be good at the DEQ, between training steps.

    Three lines beside any training loop:

        co = CoTrainer(model, mb.MetaBroyden(layout=mb.Layout("image", (16, 8, 8))))     # once
        for x, y in batches:
            co.loss(criterion(model(x), y)).backward()                                   # in place of the task's loss
            optimizer.step(), optimizer.zero_grad()
            co.step()                                                                    # after the optimizer's

    `loss` adds to the task's what draws the learned start to the equilibrium and makes the residuals of the learned solver's
    first steps small; its gradients go to the cell, to what makes its context, and to the solver. `step` updates the
    solver: with these gradients, and with a meta-step of its own (a longer unroll, the DEQ frozen) at every step of the
    warm-up and every `every`-th after it. Meta-steps take their problems from the training step, so none is solved twice.

    While the warm-up lasts the layer solves with the classical solver that it has, from the learned start once `loss` was
    called; then the learned solver takes its place, with the hand-over of its safeguard. Forward solves get shorter as the
    DEQ learns. Without `loss` the DEQ is trained as it would be, and its solvers follow.

    In several processes wrap the model as usual and give the wrapped module's DEQ, or the model, here; gradients of solvers
    are averaged over the processes.

    Args:
        deq: the layer, or a model with one `DEQ` in it.
        forward: learned solver of its forward pass, trained in place; None leaves that as it is, and `loss` adds nothing.
        backward: the same of its backward pass, an `AdjointLSTM`, for states of one tensor.
        config: see `CoTrainConfig`.
        seed: of the problems that are drawn.

    Attributes:
        steps: meta-steps made.
        skipped: updates of a solver, and terms of `loss`, left out because they were not finite.
        losses: the last meta-loss of either solver, and of `loss` the last "start" and "residual" terms, without weights.
        residual_weight: λ₂ now.

    Raises:
        TypeError, ValueError: what cannot be trained, saying what is wanted.
    """

    def __init__(
        self,
        deq: nn.Module,
        forward: LearnedSolver | None = None,
        backward: AdjointLSTM | None = None,
        *,
        config: CoTrainConfig | None = None,
        seed: int = 0,
    ) -> None:
        deq = layer_of(deq)
        if forward is None and backward is None:
            raise ValueError("CoTrainer needs a learned solver, forward or backward")
        if forward is not None and (not isinstance(forward, LearnedSolver) or forward.homogeneous):
            raise TypeError(f"forward must be a learned solver such as MetaBroyden, got {type(forward).__name__}")
        if backward is not None and not isinstance(backward, AdjointLSTM):
            raise TypeError(f"backward must be an AdjointLSTM, got {type(backward).__name__}")
        if backward is not None and not isinstance(deq.backward_mode, Implicit):
            raise TypeError(f"a backward solver needs a DEQ with Implicit gradients, got {deq.backward_mode!r}")
        if deq.backward_mode.replaces_solve:
            raise TypeError(
                f"CoTrainer trains on equilibria, and {deq.backward_mode!r} finds none: use Implicit or Phantom"
            )
        if config is not None and not isinstance(config, CoTrainConfig):
            raise TypeError(f"config must be a CoTrainConfig, got {type(config).__name__}")
        self.deq, self.config = deq, CoTrainConfig() if config is None else config
        self.steps = self.skipped = self._seen = 0
        self.losses: dict[str, float] = {}
        self._usual = deq.solver, deq.backward_mode  # what `close` and `load_state_dict` go back to
        self._met = self._added = self._closed = False  # an equilibrium ever; the terms of this one; for good
        self.residual_weight = self.config.residual_weight
        self._problem: dict[str, Any] = {}
        self._started = False  # whether the layer's solves begin at the learned start
        both: dict[str, LearnedSolver | None] = {"forward": forward, "backward": backward}
        self.solvers = {name: solver for name, solver in both.items() if solver is not None}
        named = {f"{name}_solver": solver for name, solver in self.solvers.items()}
        self._module = nn.ModuleDict(named).requires_grad_(True)
        self.optimizer = make_optimizer(self._module, self.config.learning_rate, self.config.orthogonal_rate)
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

    def loss(self, task: Tensor) -> Tensor:
        """task + λ₁·‖s(x) − z*‖²/‖z*‖² + λ₂·mean over k + 1 iterates of log(ρ + 1e-4), means over samples.

        s(x) is the learned start, z* the equilibrium that the layer has just found (held), ρ the relative residual of s(x)
        and of the k iterates that the learned solver makes of it. Skip DEQ (Pal et al. 2022, arXiv 2201.12240) has the
        first term, of a network beside the solver. The terms are added once for each equilibrium, to the first loss after
        it; the task's loss comes back alone where there is none with gradients since the last `step`, or where a term is
        not finite.

        Args:
            task: the task's loss, a scalar with its graph.
        """
        if "forward" not in self.solvers or not self._problem or self._added or self._closed:
            return task
        self._start_early()
        self._added = True
        start, residual = self._terms()
        if not bool(torch.isfinite(start + residual)):
            self.skipped += 1
            return task
        self.losses |= {"start": float(start.detach()), "residual": float(residual.detach())}
        if self.config.balance and self._seen % MEASURE_EVERY == 0:
            self._balance(task, residual)
        return task + self.config.start_weight * start + self.residual_weight * residual

    def judge(self, used: float) -> None:
        """Raise λ₂ where the model does its task better than it must, lower it where it does not, by a factor of at most 2.

        For looks at validation, a few in a training: the DEQ becomes as easy to solve as its task allows.

        Args:
            used: what the task has lost, as a share of what it may lose; λ₂ stays as it is at 0.7.
        """
        if isinstance(used, bool):
            raise TypeError("used must be a number: what the task has lost, as a share of what it may lose")
        began, factor = self.config.residual_weight, STEP if used <= 0 else min(max(AIM / used, 1 / STEP), STEP)
        self.residual_weight = min(max(self.residual_weight * factor, began / SPAN), began * SPAN)

    def step(self) -> bool:
        """Count a training step; update the solver by the gradients of `loss`; make a meta-step where one is due.

        Whether one was made: none is where no equilibrium of this step was seen with its gradient. A warning, once, where
        none has been seen for ten steps.
        """
        if self._closed:
            return False
        self._seen += 1
        if self._seen == BLIND and not self._met:
            warnings.warn(f"CoTrainer: the DEQ found no equilibrium with gradients in {BLIND} steps", stacklevel=2)
        parameters = list(self._module.parameters())
        ready = float(any(parameter.grad is not None for parameter in parameters))
        if float(distributed.mean(torch.tensor(ready, device=parameters[0].device))) > 0:  # in any process
            self._update(self._module)
        due = self._seen <= self.config.warmup_steps or self._seen % self.config.every == 0 or bool(self._waiting)
        made = due and self._complete
        if made:
            self.meta_step()
        self._problem, self._added = {}, False
        if self._seen >= self.config.warmup_steps and self._waiting and self.steps:
            self.take_over()
        return made

    def meta_step(self) -> None:
        """One meta-step for each learned solver, on a random part of the last problem."""
        if not self._complete:
            raise RuntimeError("CoTrainer has seen no training step of its DEQ yet")
        f = _detached(self._problem["f"])
        x, z = pytree.tree_map_only(Tensor, Tensor.detach, (self._problem["x"], self._problem["z"]))
        index = self._drawn(z, x, self.config.batch)
        (x, z), start = gather((x, z), index), self._start
        with frozen(self.deq.cell), _exact(z):
            if "forward" in self.solvers:
                self._descend("forward", f, start(x, z), x)
            if "backward" in self.solvers:
                v = self._problem["v"].index_select(0, index).flatten(1)
                # a mean loss has tiny cotangents; the solver is homogeneous, the guards of an unroll are not
                v = v / v.norm(dim=1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny) * v.shape[1] ** 0.5
                context = {"z": z.flatten(1), "x": x, "v": v}
                self._descend("backward", AdjointMap(f, tuple(z.shape[1:])), v, context)
        self.steps += 1

    @property
    def watching(self) -> bool:
        """Whether the layer has found an equilibrium with gradients since the last `step`."""
        return bool(self._problem)

    @property
    def _complete(self) -> bool:
        """Whether all is known that a meta-step needs of a problem."""
        return bool(self._problem) and ("backward" not in self.solvers or "v" in self._problem)

    def _watch(self, f: Any, context: Any, z: Any) -> None:
        """Keep the problem of a training step; and its cotangent once it is known, where one is wanted."""
        mode = in_caller_mode(f, parts_of(z)[0].device.type)  # the caller's autocast
        problem = {"f": mode, "x": context, "z": pytree.tree_map(Tensor.detach, z)}
        self._met = True
        if "backward" not in self.solvers:
            self._problem, self._added = problem, False
            return
        if not isinstance(z, Tensor):
            raise TypeError("CoTrainer takes states of one tensor where it trains a backward solver")
        if not self._problem or "v" in self._problem:
            self._problem = problem
        if z.requires_grad:

            def complete(v: Tensor) -> None:
                self._problem = {**problem, "v": v.detach()}

            z.register_hook(complete)

    def _start_early(self) -> None:
        """Let the layer's classical solves begin at the learned start, until the learned solver takes over."""
        learned, solver = self.solvers["forward"], as_solver(self.deq.solver)
        waits = "forward" in self._waiting and not self._started
        if waits and learned.initializer is not None and not learned.required_methods and can_start(solver):
            self._started = True
            self.deq.solver = LearnedStart.sharing(learned, solver)

    def _terms(self) -> tuple[Tensor, Tensor]:
        """The two terms of `loss`, without weights."""
        config, solver = self.config, self.solvers["forward"]
        f, x, z = (self._problem[key] for key in ("f", "x", "z"))
        x, z = gather((x, z), self._drawn(z, x, config.residual_batch))
        with _exact(z):
            rollout = unroll(
                solver, f, self._start(x, z), x, steps=config.residual_steps, backend=config.backend, half=config.half
            )
        star = Packing.of(z).pack(z)
        away = (rollout.iterates[0] - star).square().sum(dim=1) / star.square().sum(dim=1).clamp_min(1e-12)
        return away.mean(), (rollout.residuals + FLOOR).log().mean()

    def _drawn(self, z: State, x: Any, most: int) -> Tensor:
        """Numbers of at most so many samples; of all where f sees the whole batch always."""
        first = parts_of(z)[0]
        size = len(first)
        order = torch.randperm(size, generator=self.generator, device="cpu")[: size if x is None else most]
        return (order.sort().values if x is None else order).to(first.device)

    def _start(self, x: Any, z: State) -> State:
        """Where the cell begins, in the dtype of its states; zeros like them where it does not say."""
        plain = x.context if isinstance(x, AugmentedContext) else x
        if plain is None or method_of(self.deq.cell, "initial_state") is None:
            return pytree.tree_map(torch.zeros_like, z)
        return pytree.tree_map(lambda part, of: part.to(of), initial_state(self.deq.cell, plain), z)

    def _balance(self, task: Tensor, residual: Tensor) -> None:
        """Set λ₂ halfway, in its logarithm, to `balance` times the ratio of gradient norms, at most `residual_weight`."""
        module = module_of(self.deq.cell)
        weights = [] if module is None else [weight for weight in module.parameters() if weight.requires_grad]
        if not weights or not task.requires_grad:
            return
        norms = []
        for value in (task, residual):
            found = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(w) if part is None else part for w, part in zip(weights, found, strict=True)]
            norms.append(float(distributed.mean(torch.cat([part.flatten() for part in parts])).norm()))
        of_task, of_residual = norms
        if math.isfinite(of_task + of_residual) and min(of_task, of_residual) > 0:
            wanted = min(self.config.balance * of_task / of_residual, self.config.residual_weight)
            self.residual_weight = math.sqrt(max(self.residual_weight, 1e-12) * wanted)

    def _descend(self, name: str, f: Cell, z0: Any, context: Any) -> None:
        solver = self.solvers[name]
        loss, _ = differentiate(solver, f, z0, context, self.config, "native", steps=self.config.unroll)
        self.losses[name] = float(loss)
        self._update(solver)

    def _update(self, module: nn.Module) -> None:
        """Step with a module's gradients, averaged over processes and clipped; not where they are not finite."""
        gradients = [parameter for parameter in module.parameters() if parameter.grad is not None]
        if distributed.size() > 1:
            gradients = list(module.parameters())
            _average(gradients)
        norm = nn.utils.clip_grad_norm_(gradients, self.config.clip)
        if bool(torch.isfinite(norm)):
            self.optimizer.step()
        else:
            self.skipped += 1
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on bit for bit after an interruption, the solvers' weights included; not a copy."""
        header = {
            "solvers": sorted(self.solvers),
            "counts": [self._seen, self.steps, self.skipped],
            "waiting": bool(self._waiting),
            "started": self._started,
            "residual_weight": self.residual_weight,
        }
        tensors, header = resume.pack(self._module, self.optimizer, header, generator=self.generator)
        return {"tensors": tensors, "header": header}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; the layer gets its learned solvers where they had taken over.

        `CheckpointError`, a ValueError, for what is no such state, or one of other directions; nothing is changed then.
        """
        if not isinstance(state, dict) or set(state) != {"tensors", "header"} or not fits(state["tensors"], _TENSORS):
            held = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise CheckpointError(f"not the state of a CoTrainer: it holds {held}")
        tensors, header = state["tensors"], state["header"]
        if isinstance(header, dict):  # as the online trainer of earlier versions wrote it
            header = {"started": False, "residual_weight": self.config.residual_weight} | header
        check(header, _Record, _STATE)
        if header["solvers"] != sorted(self.solvers):
            raise CheckpointError(f"the state is of solvers {header['solvers']}, wanted {sorted(self.solvers)}")
        seen, steps, skipped = header["counts"]
        if min(header["counts"]) < 0:
            raise damaged(_STATE, f"counts are {header['counts']}, wanted none below 0")
        if not (math.isfinite(header["residual_weight"]) and header["residual_weight"] >= 0):
            raise damaged(_STATE, f"residual_weight is {header['residual_weight']}")
        taken = int(steps * len(self.solvers) > skipped)
        resume.restore(tensors, header, _STATE, self._module, self.optimizer, taken=taken, generator=self.generator)
        self._seen, self.steps, self.skipped = seen, steps, skipped
        self.residual_weight = header["residual_weight"]
        self._hand_back()
        self._problem, self._started, self._waiting = {}, False, set(self.solvers)
        if header["started"]:
            self._start_early()
        if not header["waiting"]:
            self.take_over()

    def close(self) -> None:
        """Stop for good: nothing is watched, `loss` adds nothing, the solvers no longer require gradients.

        The layer keeps learned solvers that had taken over; else it gets back what it had.
        """
        if self._watch in self.deq.hooks:
            self.deq.hooks.remove(self._watch)
        if self._waiting:
            self._hand_back()
        self._problem, self._closed = {}, True
        for solver in self.solvers.values():
            solver.requires_grad_(False).eval()

    def _hand_back(self) -> None:
        """The layer gets the solvers that it had."""
        if "forward" in self.solvers:
            self.deq.solver = self._usual[0]
        if "backward" in self.solvers:
            self.deq.backward_mode = self._usual[1]


def layer_of(model: Any) -> DEQ:
    """The DEQ that is given, or the one inside a model; TypeError where there is none, or several."""
    if isinstance(model, DEQ):
        return model
    found = deqs_in(model)
    if len(found) != 1:
        held = f" with {len(found)} of them ({', '.join(found)})" if found else ""
        raise TypeError(
            f"deq must be the DEQ that is trained, or a model with one in it, got {type(model).__name__}{held}"
        )
    return next(iter(found.values()))


def _detached(f: Cell) -> Cell:
    """f without gradients towards weights that are computed once for a call."""
    if isinstance(f, CallerMode):
        twin = copy.copy(f)
        twin.f = twin.inner = _detached(f.f)
        return twin
    return f.detached() if isinstance(f, Pinned) else f


@contextmanager
def _exact(z: State) -> Iterator[None]:
    """While it lasts gradients are recorded, and the solver computes in its own precision whatever autocast says."""
    with torch.enable_grad(), torch.autocast(parts_of(z)[0].device.type, enabled=False):
        yield


def _average(parameters: list[nn.Parameter]) -> None:
    """The mean over processes of gradients; zeros where a process has none."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    found = distributed.mean(torch.cat([parameter.grad.flatten() for parameter in parameters]))  # type: ignore[union-attr]
    for parameter, part in zip(parameters, found.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).clone()
