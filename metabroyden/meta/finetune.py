"""`cotrain`: a trained model with a DEQ in, the same model with an easier DEQ and a root finder for it out."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils import _pytree as pytree

from metabroyden.comparison.problems import HeldOut
from metabroyden.comparison.tables import Table, text_table
from metabroyden.comparison.verdict import UNTUNED, Verdict, compare_solvers
from metabroyden.deq import DEQ
from metabroyden.meta.config import MetaConfig
from metabroyden.meta.cotrainer import CoTrainConfig, CoTrainer, layer_of
from metabroyden.meta.defaults import RATES, context_options, dilations, gated_steps, state_layout
from metabroyden.meta.fit import MAX_NFE, FitJob, device_of, fit_solver, refuse_inference
from metabroyden.meta.inputs import check_contexts
from metabroyden.meta.judging import Judged, Standard, judge
from metabroyden.meta.plan import make_learned, room
from metabroyden.meta.supervised import Batches, Task, beside, chunks, read, run_on, split
from metabroyden.meta.target import Target, deqs_in, resting, target_of
from metabroyden.meta.tasks import rows
from metabroyden.progress import progress_bar
from metabroyden.solvers.broyden import Broyden
from metabroyden.state import concatenate

LOOKS = 10
"""Looks at validation in a fine-tuning."""
AVERAGED = 0.05
"""Share of a fine-tuning over which the weights that are looked at, and kept, are averaged."""
LATE = 1.1
"""How many times the fewest evaluations a later look may need to be kept in the place of an earlier one."""
UNROLL, EVERY = 10, 4
"""Solver steps of a meta-step, and training steps from one to the next after the warm-up."""
WARMUP = 0.1
"""Share of a fine-tuning in which the learning rate rises."""
CLIP = 1.0
"""Norm that the model's gradients are clipped to."""
COMPARED = 256
"""Validation inputs that solvers are compared on, at most."""
BAD_STEPS = 10
"""Training steps in a row whose gradient is not finite after which a fine-tuning ends."""


class Look(NamedTuple):
    """One look at validation."""

    step: int
    """Training steps made."""
    score: float
    """Mean score on validation samples, at equilibria; higher is better."""
    passed: bool
    """Whether that will do."""
    divergence: float | None
    """How far outputs have moved, see `Standard.divergence`."""
    evaluations: float
    """Mean evaluations of the learned solver, a failure counting twice the budget."""
    residual_weight: float
    """λ₂ until then."""
    seconds: float
    """Since the fine-tuning began."""


@dataclass(frozen=True)
class CoTraining:
    """What `cotrain` did.

    Attributes:
        before: the classical solvers on the model as it was, on validation inputs.
        after: the fitted solver and the classical ones on the co-trained model, on the same inputs; None where no look at
            validation would do.
        refused: why the original is returned; None where it is not.
        scores: on the validation samples, of the model as it was and of what is returned.
        tolerance: by how much that might be lower; None: by a standard error of the difference.
        looks: at validation.
        seconds: of the fine-tuning, without the fit of the solver.
    """

    before: Verdict
    after: Verdict | None
    refused: str | None
    scores: tuple[float, float]
    tolerance: float | None
    looks: tuple[Look, ...]
    seconds: float

    @property
    def accepted(self) -> bool:
        """Whether the co-trained model is returned, and not the original."""
        return self.refused is None

    def table(self) -> Table:
        """Score and evaluations before and after."""
        body = [self._line("before", self.scores[0], self.before, self.before.best_classical())]
        if self.after is not None:
            names = [self.after.best_classical(), *([self.after.name] if self.after.fitted is not None else [])]
            body += [self._line("after", self.scores[1], self.after, name) for name in names]
        words = f"{self.before.samples} validation inputs to {self.before.tolerances[-1]:g}"
        return Table(words, ["model", "score", "solver", "median", "mean", "90%", "solved", "time"], body)

    @staticmethod
    def _line(model: str, score: float, found: Verdict, name: str) -> list[str]:
        row = next(row for row in found.numbers(found.tolerances[-1]) if row["solver"] == name)
        figures = [f"{row['median']:g}", f"{row['mean']:.1f}", f"{row['p90']:g}", f"{row['solved']:.1%}"]
        return [model, f"{score:.4g}", name, *figures, f"{row['milliseconds']:.3g} ms"]

    def __str__(self) -> str:
        """The table as text, and what was made of it."""
        limit = "one standard error of the difference" if self.tolerance is None else f"{self.tolerance:g}"
        verdict = (
            f"The co-trained model is returned; its score might be lower by {limit}."
            if self.refused is None
            else f"The original is returned: {self.refused}."
        )
        return f"{text_table(self.table())}\n\n{verdict} {self.seconds:.0f} s of fine-tuning."


def cotrain(
    model: nn.Module,
    data: Any,
    *,
    validation: Any = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    score: Callable[[Any, Any], Any] | None = None,
    tolerance: float | None = None,
    rtol: float = 1e-3,
    steps: int = 300,
    batch_size: int = 64,
    learning_rate: float = 5e-4,
    residual_weight: float = 0.06,
    layout: str | None = None,
    conditioning: str = "auto",
    seed: int = 0,
    progress: bool = True,
    return_report: bool = False,
) -> Any:
    """Fine-tune a trained model so that its DEQ is easy to solve at the same score, and fit a root finder to it.

    `fit_solver` leaves f as it is. Here f, what makes its context, the head and a learned solver are trained together by a
    `CoTrainer`: the task's loss, and the residuals of the solver's first steps. At ten looks at validation, with weights
    averaged over the last steps, the score is taken at equilibria; the weight of the residuals is raised and lowered so that
    outputs move by some 0.02 nats a prediction (`Standard.divergence`) and no score is surely lost. Kept is the last look
    whose score will do and that needs at most a tenth more evaluations than another such; `fit_solver` then trains its
    solver further. Parameters that require no gradients are left as they are, if there are others that do. The model that
    was given is left as it is; a loss should not read it.

    Args:
        model: a trained model with one `DEQ` of ours in it, called with inputs; or such a `DEQ` itself.
        data: (inputs, targets), each a tensor or a pytree of them with the samples first; or a `DataLoader` or another
            iterable of such pairs that can be read more than once.
        validation: other data, as `data`; at most 2,048 samples are looked at. None: a fifth of `data`, which must then be
            a pair and not batches.
        loss: (outputs, targets) → scalar. None: cross-entropy of integer targets, classes last in outputs; else the mean
            squared error.
        score: (outputs, targets) → (B,) scores, or their mean, higher being better. None: the share of integer targets
            that is hit; else minus the mean squared error.
        tolerance: by how much the mean score on validation may be lower than before. None: by one standard error of the
            difference, sample by sample; 0 where `score` gives means.
        rtol: tolerance of the solves that are judged.
        steps: of the fine-tuning, each on a batch.
        batch_size: samples of a batch, where `data` is a pair.
        learning_rate: peak rate of Adam for the model; rises at first, then falls to zero along a cosine.
        residual_weight: λ₂ at first, see `CoTrainer.loss`.
        layout: as for `fit_solver`; so is conditioning.
        seed: of batches, weights of the solver, and the fit.
        progress: show a bar (needs rich), and print the comparison.
        return_report: whether to return what was found, too.

    Returns:
        The co-trained copy in evaluation mode, its DEQ with the fitted solver (or a classical one where that is faster); no
        part of its `state_dict` (`save_solver` writes it). Or the original itself, with a warning, where no look at
        validation would do or no evaluations were saved. With return_report a pair of it and the `CoTraining`.

    Raises:
        ValueError, TypeError: bad input, saying what was given and what is wanted.
        RuntimeError: inference mode or autocast is on.
        FloatingPointError: gradients that stay non-finite.
    """
    refuse_inference("cotrain")
    _check(model, steps=steps, batch_size=batch_size, learning_rate=learning_rate, tolerance=tolerance)
    config = CoTrainConfig(**habits(steps), residual_weight=residual_weight)
    _trained(model)  # refuses a model without parameters
    MetaConfig(validation_rtol=rtol, seed=seed)  # refuses what cannot be used before anything is solved
    own, task, target = copy.deepcopy(model), Task(loss, score), target_of(model)
    with torch.random.fork_rng(devices=[]):  # a loader draws from the global generator
        torch.manual_seed(seed)
        train, held = split(data, validation, seed)
        batches, held = Batches(train, batch_size, seed), chunks(read(held, "validation"))
    inputs = batches.sample[0]
    check_contexts(inputs, zeros=target.z0 is None, given="data")
    solver = untrained(target_of(own), rows(inputs, slice(32)), layout=layout, conditioning=conditioning, seed=seed)
    compared = _Comparing(inputs, [part for part, _ in held], rtol, seed, layout)
    before, standard = compared.before(own), Standard(judge(own, Broyden(MAX_NFE), held, task, rtol), tolerance)

    def losses() -> Iterator[Tensor]:
        for batch in batches:
            given, targets = beside(own, batch)
            yield task.loss(run_on(own, given), targets)

    with progress_bar("co-training", steps, show=progress) as bar:
        looks, best, seconds = fine_tune(
            own, solver, losses(), lambda now, by: judge(now, by, held, task, rtol), standard, steps=steps, config=config,
            learning_rate=learning_rate, seed=seed, report=bar,
        )  # fmt: skip
    was = float(standard.reference.scores.mean())
    after, refused, chosen = None, None, was
    if best is None:
        reached = max(look.score for look in looks)
        refused = f"the score was {was:.4g}, and at best {reached:.4g} at a look at validation"
    else:
        after, layer_of(own).solver, chosen = *compared.after(own, solver), best.score
        refused = _no_gain(before, after)
    report = CoTraining(before, after, refused, (was, chosen), tolerance, tuple(looks), seconds)
    if progress:
        print(report)
    if refused is not None:
        warnings.warn(f"cotrain: the original is returned: {refused}", stacklevel=2)
    returned = own if refused is None else model
    return (returned, report) if return_report else returned


def _no_gain(before: Verdict, after: Verdict) -> str | None:
    """Why a co-trained model is not worth having; None where it is."""
    theirs = before.outcome(before.best_classical())
    ours = min((after.outcome(name) for name in (after.best_classical(), after.name)), key=lambda one: one.mean)
    if ours.success < theirs.success - theirs.error:
        return f"{ours.success:.1%} of the problems are solved, {theirs.success:.1%} were before"
    if ours.mean >= theirs.mean:
        return f"a solve takes {ours.mean:.1f} evaluations in the mean, {theirs.mean:.1f} before"
    return None


@dataclass(frozen=True)
class _Comparing:
    """Comparisons on validation inputs, which no weights were trained on, with solvers tuned on training inputs."""

    inputs: Any
    held: list[Any]
    rtol: float
    seed: int
    layout: str | None

    def before(self, model: nn.Module) -> Verdict:
        """The classical solvers."""
        target = target_of(model)
        with resting(model):
            job = FitJob.of(
                target, self.inputs, device_of(target, self.inputs), self.seed, self.rtol, self.layout, None
            )
            return self._on_held(target, UNTUNED, job.classical.solvers)

    def after(self, model: nn.Module, solver: Any) -> tuple[Verdict, Any]:
        """The same and the solver, trained further; and the solver that `fit_solver` returns."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fit_solver")  # the table says who is faster
            found, verdict = fit_solver(
                model, self.inputs, solver=solver, layout=self.layout, rtol=self.rtol, seed=self.seed, progress=False,
                return_report=True,
            )  # fmt: skip
        with resting(model):
            return self._on_held(target_of(model), verdict.name, verdict.solvers), found

    def _on_held(self, target: Target, name: str, solvers: dict[str, Any]) -> Verdict:
        held = concatenate(self.held)
        device = device_of(target, held)
        held = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), held)
        start = target.prepare(rows(held, slice(1)))[0]
        held = rows(held, slice(min(COMPARED, room(state_layout(target.f, start, self.layout)))))
        problems = HeldOut(target.f, *target.prepare(held))
        return compare_solvers(problems, name, solvers, rtol=self.rtol, max_nfe=MAX_NFE)


def fine_tune(
    model: nn.Module,
    solver: Any,
    losses: Iterator[Tensor],
    judged: Callable[[nn.Module, Any], Judged],
    standard: Standard | None,
    *,
    steps: int,
    config: CoTrainConfig,
    learning_rate: float,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    seed: int = 0,
    report: Callable[[int, str], None] | None = None,
) -> tuple[list[Look], Look | None, float]:
    """Train a model and its solver in place; they end with the weights of the best look, see `cotrain`.

    Args:
        model: with one DEQ.
        solver: a learned solver of its forward pass.
        losses: task losses with their graphs, each of a batch that goes through the model when it is asked for.
        judged: what a model does on validation with a solver, see `judge`.
        standard: which scores will do. None: λ₂ stays as it is, and the last look is the best one.
        steps: of training.
        config: of the `CoTrainer`.
        learning_rate: peak rate.
        optimizer: (parameters, lr) → optimizer.
        seed: of what the `CoTrainer` draws, and of dropout.
        report: called with steps made and words after each look.

    Returns:
        (looks, the best one, or None where none will do, seconds without looks).

    Raises:
        ValueError: nothing to train; a DEQ that finds no equilibrium with gradients when a loss is made.
        FloatingPointError: gradients that stay non-finite.
    """
    deq, trained = layer_of(model), _trained(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(max(0.0, 1 - 1 / (AVERAGED * steps))))
    usual, trainer = deq.solver, CoTrainer(deq, solver, config=config, seed=seed)
    step_of, looks = _Steps(trainer, optimizer(trained, lr=learning_rate), trained), _Looks(standard)
    at = {round(steps * number / LOOKS) for number in range(1, LOOKS + 1)}
    cuda = sorted({weight.device.index for weight in trained if weight.is_cuda})
    with _training(model, trained), torch.random.fork_rng(cuda), torch.enable_grad():
        torch.manual_seed(seed)
        for step in range(1, steps + 1):
            step_of.take(losses, learning_rate * learning_share(step, steps))
            average.update_parameters(model)
            if step not in at:
                continue
            now = judged(average.module, solver)
            looks.add(average.module, solver, step, now, trainer.residual_weight, step_of.seconds)
            if standard is not None:
                trainer.judge(standard.pressure(now))
            if report is not None:
                report(step, f"score {float(now.scores.mean()):.4g}, {now.evaluations:.1f} evaluations")
    trainer.close()
    deq.solver = usual
    step_of.optimizer.zero_grad()
    model.eval()
    if looks.best is not None:
        model.load_state_dict(looks.weights[0])
        solver.load_state_dict(looks.weights[1])
    return looks.all, looks.best, step_of.seconds


class _Steps:
    """Training steps of a model and its solver.

    Attributes:
        seconds: that they took.
    """

    def __init__(self, trainer: CoTrainer, optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> None:
        self.trainer, self.optimizer, self.weights = trainer, optimizer, weights
        self.seconds, self._bad = 0.0, 0

    def take(self, losses: Iterator[Tensor], rate: float) -> None:
        """One step; none of the model where the gradient is not finite."""
        began = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        task = next(losses)
        if not self.trainer.watching:
            raise ValueError("the model did not call its DEQ with gradients enabled")
        self.trainer.loss(task).backward()
        norm = nn.utils.clip_grad_norm_(self.weights, CLIP)
        self._bad = 0 if bool(torch.isfinite(norm)) else self._bad + 1
        if self._bad == 0:
            self.optimizer.step()
        elif self._bad == BAD_STEPS:
            raise FloatingPointError(f"the gradient was not finite in {BAD_STEPS} training steps in a row")
        self.trainer.step()
        self.seconds += time.perf_counter() - began


class _Looks:
    """Looks at validation, and the weights of model and solver at the best one."""

    def __init__(self, standard: Standard | None) -> None:
        self.standard, self.all = standard, list[Look]()
        self.best: Look | None = None
        self.weights: Any = None

    def add(self, model: nn.Module, solver: Any, step: int, now: Judged, weight: float, seconds: float) -> None:
        """Note a look, and the weights where they are the best so far."""
        used = 0.0 if self.standard is None else self.standard.used(now)
        moved = None if self.standard is None else self.standard.divergence(now)
        score, spent = float(now.scores.mean()), now.evaluations
        self.all.append(Look(step, score, used <= 1, moved, spent, weight, round(seconds, 2)))
        fewest = min((one.evaluations for one in self.all if one.passed), default=math.inf)
        if used <= 1 and (self.standard is None or spent <= LATE * fewest):
            self.best, self.weights = self.all[-1], copy.deepcopy((model.state_dict(), solver.state_dict()))


def _trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require gradients; of a frozen model all of them. ValueError where there is none."""
    every = [weight for weight in model.parameters() if weight.is_floating_point()]
    found = [weight for weight in every if weight.requires_grad] or every
    if not found:
        raise ValueError(f"{type(model).__name__} has no parameters to train")
    return found


@contextmanager
def _training(model: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    """While it lasts these parameters require gradients, and a model in evaluation mode is in training."""
    frozen = [weight for weight in trained if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    if not model.training:
        model.train()
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def untrained(
    target: Target,
    inputs: Any,
    *,
    start: Any = None,
    layout: str | None = None,
    conditioning: str = "auto",
    seed: int = 0,
) -> Any:
    """A MetaBroyden for the problems of a target, made for unrolls of `UNROLL` steps; start: where they begin, if known."""
    z0, x = target.prepare(inputs) if start is None else (start, inputs)
    where = state_layout(target.f, z0, layout)
    seen = context_options(target.f, where, z0, x, conditioning)
    options = {"dilations": dilations(target.f, where.kind), **gated_steps(UNROLL), **seen}
    first = pytree.tree_leaves(z0)[0]
    return make_learned("meta-broyden", where, seed=seed, **options).to(device=first.device, dtype=first.dtype)


def habits(steps: int) -> dict[str, Any]:
    """Fields of the `CoTrainConfig` of a fine-tuning."""
    rates = {name: 0.5 * rate for name, rate in RATES.items()}
    return {"warmup_steps": min(40, steps // 4), "every": EVERY, "unroll": UNROLL, **rates}


def learning_share(step: int, steps: int) -> float:
    """Of the peak learning rate, at a step counted from 1."""
    return min(1.0, step / max(1.0, WARMUP * steps)) * (1 + math.cos(math.pi * (step - 1) / steps)) / 2


def _check(model: Any, *, tolerance: Any, **positive: Any) -> None:
    if not isinstance(model, nn.Module) or not (isinstance(model, DEQ) or deqs_in(model)):
        raise TypeError(f"model must be a module with a metabroyden.DEQ in it, got {type(model).__name__}")
    if not isinstance(model, DEQ) and len(deqs_in(model)) > 1:
        raise ValueError(f"{type(model).__name__} has several DEQs ({', '.join(deqs_in(model))}): cotrain takes one")
    for name, value in positive.items():
        whole = name == "learning_rate" or isinstance(value, int)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf and whole):
            kind = "a positive number" if name == "learning_rate" else "an integer of at least 1"
            raise ValueError(f"{name} must be {kind}, got {value!r}")
    if tolerance is not None and not (isinstance(tolerance, int | float) and tolerance >= 0):
        raise ValueError(f"tolerance must be a number of at least 0, or None for one standard error, got {tolerance!r}")
