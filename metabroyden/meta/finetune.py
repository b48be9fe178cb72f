"""`cotrain`: a trained model with a DEQ in, the same model with an easier DEQ and a root finder for it out."""

from __future__ import annotations

import copy
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from metabroyden.comparison.tables import Table, text_table
from metabroyden.comparison.verdict import UNTUNED, Verdict
from metabroyden.deq import DEQ
from metabroyden.meta.cotrainer import CoTrainConfig, CoTrainer
from metabroyden.meta.defaults import RATES, context_options, dilations, gated_steps, state_layout
from metabroyden.meta.fit import MAX_NFE, FitJob, device_of, fit_solver, refuse_inference
from metabroyden.meta.plan import make_learned, room
from metabroyden.meta.target import Target, call_arguments, deqs_in, resting, target_of
from metabroyden.meta.tasks import count, rows
from metabroyden.progress import progress_bar
from metabroyden.solvers.broyden import Broyden
from metabroyden.state import concatenate

LOOKS = 6
"""Looks at validation in a fine-tuning."""
LATE = 1.1
"""How many times the fewest evaluations a later look may need to be kept in the place of an earlier one."""
CHUNK, MOST = 256, 4096
"""Validation samples that go through the model at once, and in all at most."""
UNROLL, EVERY = 10, 4
"""Solver steps of a meta-step, and training steps from one to the next after the warm-up."""
WARMUP = 0.1
"""Share of a fine-tuning in which the learning rate rises."""
CLIP = 1.0
"""Norm that the model's gradients are clipped to."""


class Look(NamedTuple):
    """One look at validation."""

    step: int
    """Training steps made."""
    score: float
    """Mean score on validation samples, at equilibria; higher is better."""
    passed: bool
    """Whether that will do."""
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
        before: the classical solvers on the model as it was.
        after: the fitted solver and the classical ones on the co-trained model, on the same held-out inputs; None where no
            look at validation would do.
        scores: on the validation samples, of the model as it was and of what is returned.
        tolerance: by how much that might be lower; None: by a standard error of the difference.
        looks: at validation.
        seconds: of the fine-tuning, without the fit of the solver.
    """

    before: Verdict
    after: Verdict | None
    scores: tuple[float, float]
    tolerance: float | None
    looks: tuple[Look, ...]
    seconds: float

    @property
    def accepted(self) -> bool:
        """Whether the co-trained model is returned, and not the original."""
        return self.after is not None

    def table(self) -> Table:
        """Score and evaluations before and after."""
        body = [self._line("before", self.scores[0], self.before, self.before.best_classical())]
        if self.after is not None:
            names = [self.after.best_classical(), *([self.after.name] if self.after.fitted is not None else [])]
            body += [self._line("after", self.scores[1], self.after, name) for name in names]
        words = f"{self.before.samples} held-out inputs to {self.before.tolerances[-1]:g}"
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
            if self.accepted
            else f"The original is returned: at each look at validation the score was lower by more than {limit}."
        )
        return f"{text_table(self.table())}\n\n{verdict} {self.seconds:.0f} s of fine-tuning."


class Standard(NamedTuple):
    """Which scores will do beside those of the model as it was, (N,) of the same samples, or () their mean."""

    reference: Tensor
    tolerance: float | None

    def used(self, scores: Tensor) -> float:
        """What the mean has lost, as a share of what it may lose: the tolerance, or a standard error of the difference."""
        less = self.reference.double().cpu() - scores.double().cpu()
        lost, size = float(less.mean()), len(less) if less.dim() else 1
        allowed = self.tolerance
        if allowed is None:
            allowed = float(less.std()) / math.sqrt(size) if size > 1 else 0.0
        rounding = 1e-9 * float(self.reference.double().abs().mean())
        return 0.0 if lost <= rounding else (lost - rounding) / max(allowed, rounding)


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
    learning_rate: float = 1e-3,
    residual_weight: float = 0.06,
    layout: str | None = None,
    conditioning: str = "auto",
    seed: int = 0,
    progress: bool = True,
    return_report: bool = False,
) -> Any:
    """Fine-tune a trained model so that its DEQ is easy to solve at the same score, and fit a root finder to it.

    `fit_solver` leaves f as it is. Here f, what makes its context, the head and a learned solver are trained together by a
    `CoTrainer`: the task's loss, and the residuals of the solver's first steps. At six looks at validation the score is
    taken at equilibria; the weight of the residuals is doubled where nothing was lost, and in the second half of
    the training halved where too much was. Kept is the last look whose score will do and that needs at most a tenth more
    evaluations than another such; `fit_solver` then trains its solver further. The model that was given is left as it is.

    Args:
        model: a trained model with one `DEQ` of ours in it, called with inputs; or such a `DEQ` itself.
        data: (inputs, targets), each a tensor or a pytree of them with the samples first; or a `DataLoader` or another
            iterable of such pairs that can be read more than once.
        validation: other data, as `data`; at most 4,096 samples are looked at. None: a fifth of `data`, which must then be
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
        The co-trained copy in evaluation mode, its DEQ with the fitted solver (or a classical one where that is better); or
        the original itself, with a warning, where no look at validation would do. With return_report a pair of it and the
        `CoTraining`.

    Raises:
        ValueError, TypeError: bad input, saying what was given and what is wanted.
        RuntimeError: inference mode or autocast is on.
    """
    refuse_inference("cotrain")
    _check(model, steps=steps, batch_size=batch_size, learning_rate=learning_rate, tolerance=tolerance)
    config = CoTrainConfig(**habits(steps), residual_weight=residual_weight)
    train, held = _split(data, validation, seed)
    batches, held = _Batches(train, batch_size, seed), _validation(held)
    task = _Task(loss, score)
    own = copy.deepcopy(model)
    solver = untrained(target_of(own), batches.inputs(32), layout=layout, conditioning=conditioning, seed=seed)
    before, reference = before_training(model, batches, held, task, rtol=rtol, seed=seed, layout=layout)
    standard = Standard(reference, tolerance)

    def losses() -> Iterator[Tensor]:
        for inputs, targets in batches:
            yield task.loss(_run(own, inputs), targets)

    with progress_bar("co-training", steps, show=progress) as bar:
        looks, best, seconds = fine_tune(
            own, solver, losses(), lambda now, by: judge(now, by, held, task, rtol), standard, steps=steps, config=config,
            learning_rate=learning_rate, seed=seed, report=bar,
        )  # fmt: skip
    after, chosen = None, float(reference.mean())
    if best is not None:
        found, after = fit_solver(
            own,
            batches.inputs(),
            solver=solver,
            layout=layout,
            rtol=rtol,
            seed=seed,
            progress=False,
            return_report=True,
        )
        _layer(own).solver, chosen = found, best.score
    report = CoTraining(before, after, (float(reference.mean()), chosen), tolerance, tuple(looks), seconds)
    if progress:
        print(report)
    if best is None:
        reached = max(look.score for look in looks)
        warnings.warn(
            f"cotrain: the score was {float(reference.mean()):.4g} before, at best {reached:.4g} at a look at validation, "
            "so the original is returned; more steps, a lower residual_weight or a larger tolerance may help",
            stacklevel=2,
        )
    returned = model if best is None else own.eval()
    return (returned, report) if return_report else returned


def fine_tune(
    model: nn.Module,
    solver: Any,
    losses: Iterator[Tensor],
    judged: Callable[[nn.Module, Any], tuple[Tensor, float]],
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
        judged: (model, solver) → (scores, mean evaluations) on validation, see `judge`.
        standard: which scores will do. None: λ₂ stays as it is, and the last look is the best one.
        steps: of training.
        config: of the `CoTrainer`.
        learning_rate: peak rate.
        optimizer: (parameters, lr) → optimizer.
        seed: of what the `CoTrainer` draws, and of dropout.
        report: called with steps made and words after each look.

    Returns:
        (looks, the best one, or None where none will do, seconds without looks).
    """
    deq = _layer(model)
    usual, trainer = deq.solver, CoTrainer(deq, solver, config=config, seed=seed)
    stepper = optimizer(model.parameters(), lr=learning_rate)
    looks: list[Look] = []
    best: tuple[Look, Any] | None = None
    at = {round(steps * number / LOOKS) for number in range(1, LOOKS + 1)}
    spent, began = 0.0, time.perf_counter()
    model.requires_grad_(True).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step in range(1, steps + 1):
            for group in stepper.param_groups:
                group["lr"] = learning_rate * learning_share(step, steps)
            stepper.zero_grad()
            trainer.loss(next(losses)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            stepper.step()
            trainer.step()
            if step not in at:
                continue
            spent += time.perf_counter() - began
            scores, evaluations = judged(model, solver)
            score, used = float(scores.mean()), 0.0 if standard is None else standard.used(scores)
            passed = used <= 1
            looks.append(Look(step, score, passed, evaluations, trainer.residual_weight, round(spent, 2)))
            fewest = min((one.evaluations for one in looks if one.passed), default=math.inf)
            if passed and (standard is None or evaluations <= LATE * fewest):
                best = looks[-1], copy.deepcopy((model.state_dict(), solver.state_dict()))
            if standard is not None and (passed or 2 * step >= steps):  # before, a score suffers from the learning rate
                trainer.judge(used)
            if report is not None:
                report(step, f"score {score:.4g}, {evaluations:.1f} evaluations")
            model.train()
            began = time.perf_counter()
    trainer.close()
    deq.solver = usual
    model.eval().requires_grad_(False)
    if best is None:
        return looks, None, spent
    model.load_state_dict(best[1][0])
    solver.load_state_dict(best[1][1])
    return looks, best[0], spent


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


class _Batches:
    """(inputs, targets) without end: drawn from a pair, or read again and again from an iterable."""

    def __init__(self, data: Any, size: int, seed: int) -> None:
        self.data, self.size = data, size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        if _is_pair(self.data):
            total, size = count(self.data), min(self.size, count(self.data))
            while True:
                order = torch.randperm(total, generator=self.generator, device="cpu")
                for index in order[: total // size * size].split(size):
                    yield rows(self.data, index)
        for number in itertools.count():
            found = None
            for found in self.data:
                yield _pair(found)
            if found is None:
                again = "no batch to give" if number == 0 else "nothing left: give what can be read more than once"
                raise ValueError(f"data has {again}")

    def inputs(self, most: int = 2048) -> Any:
        """Inputs of the first samples."""
        if _is_pair(self.data):
            return rows(self.data[0], slice(most))
        return _joined((_pair(found)[0] for found in self.data), most)


class _Task:
    """Loss and score of outputs and targets."""

    def __init__(self, loss: Any, score: Any) -> None:
        for name, given in {"loss": loss, "score": score}.items():
            if given is not None and not callable(given):
                raise TypeError(f"{name} must be a function of outputs and targets, got {type(given).__name__}")
        self._loss, self._score = loss, score

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """A scalar with its graph."""
        if self._loss is not None:
            found = self._loss(outputs, targets)
        elif _are_classes(targets):
            found = functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())
        else:
            found = functional.mse_loss(outputs, targets)
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise ValueError("loss must give a scalar tensor: (outputs, targets) → the mean loss of a batch")
        return found.reshape(())

    def score(self, outputs: Any, targets: Any) -> Tensor:
        """(B,) scores, or () their mean."""
        if self._score is not None:
            found = torch.as_tensor(self._score(outputs, targets)).detach().double().cpu()
            if found.dim() > 1 or (found.dim() == 1 and len(found) != count(targets)):
                raise ValueError(
                    f"score must give ({count(targets)},) numbers, or their mean, got {tuple(found.shape)}"
                )
            return found
        hits = (outputs.argmax(dim=-1) == targets).double() if _are_classes(targets) else -(outputs - targets).square()
        return hits.double().flatten(1).mean(dim=1).cpu() if hits.dim() > 1 else hits.cpu()


def judge(model: nn.Module, solver: Any, held: Iterable[Any], task: _Task, rtol: float) -> tuple[Tensor, float]:
    """((N,) scores at equilibria found by a solver, or () their mean; mean evaluations, a failure as two budgets)."""
    deq, scores, spent = _layer(model), [], []
    kept = {name: getattr(deq, name) for name in ("solver", "rtol", "atol", "max_nfe", "_warn")}
    was = model.training
    try:
        deq.solver, deq.rtol, deq.atol, deq.max_nfe, deq._warn = solver, rtol, 0.0, MAX_NFE, False
        deq._forward_failures._warn = False
        with torch.no_grad():
            model.eval()
            for inputs, targets in held:
                scores.append(task.score(_run(model, inputs), targets))
                found = deq.last_solution
                assert found is not None
                spent.append(np.where(found.converged.cpu().numpy(), found.nfe.numpy(), 2 * MAX_NFE))
    finally:
        for name, value in kept.items():
            setattr(deq, name, value)
        deq._forward_failures._warn = kept["_warn"]
        model.train(was)
    whole = scores[0].dim() == 0
    return (torch.stack(scores).mean() if whole else torch.cat(scores)), float(np.concatenate(spent).mean())


def before_training(
    model: nn.Module, batches: _Batches, held: Iterable[Any], task: _Task, *, rtol: float, seed: int, layout: str | None
) -> tuple[Verdict, Tensor]:
    """(the classical solvers on a model as it is, (N,) its scores at equilibria or () their mean)."""
    target, inputs = target_of(model), batches.inputs()
    with resting(model):
        job = FitJob.of(target, inputs, device_of(target, inputs), seed, rtol, layout, None)
        start = job.tasks.problems("validation")[0]
        found = job.compared(UNTUNED, {}, room(state_layout(target.f, start, layout)))
    return found, judge(model, Broyden(MAX_NFE), held, task, rtol)[0]


def _run(model: nn.Module, inputs: Any) -> Any:
    positional, named = call_arguments(model, inputs)
    return model(*positional, **named)


def _layer(model: nn.Module) -> DEQ:
    return model if isinstance(model, DEQ) else next(iter(deqs_in(model).values()))


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


def _are_classes(targets: Any) -> bool:
    if not isinstance(targets, Tensor):
        raise TypeError(
            f"targets are {type(targets).__name__}: give loss= and score=, functions of outputs and targets"
        )
    return not targets.is_floating_point()


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple) and len(data) == 2


def _pair(found: Any) -> tuple[Any, Any]:
    """A batch as (inputs, targets); TypeError for anything else."""
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise TypeError(
            f"data must be (inputs, targets), or batches of such pairs, got a batch that is {type(found).__name__}"
        )
    return found[0], found[1]


def _split(data: Any, validation: Any, seed: int) -> tuple[Any, Any]:
    """(training, validation) data: as given, or four fifths and one of a pair, drawn by the seed."""
    if isinstance(data, Tensor) or (not _is_pair(data) and not isinstance(data, Iterable)):
        raise TypeError(f"data must be (inputs, targets), or batches of such pairs, got {type(data).__name__}")
    if validation is not None:
        return data, validation
    if not _is_pair(data):
        raise ValueError("of batches cotrain cannot hold out a part: give validation=, batches or a pair of their own")
    total = count(data)
    if total < 20:
        raise ValueError(f"data must be of at least 20 samples, got {total}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed), device="cpu")
    return rows(data, order[total // 5 :]), rows(data, order[: total // 5])


def _validation(data: Any) -> list[tuple[Any, Any]]:
    """Batches of at most `MOST` samples."""
    if not _is_pair(data):
        inputs, targets = (_joined(part, MOST) for part in zip(*map(_pair, data), strict=True))
        data = inputs, targets
    numbers = torch.arange(min(count(data), MOST), device="cpu")
    return [rows(data, index) for index in numbers.split(CHUNK)]


def _joined(parts: Iterable[Any], most: int) -> Any:
    """The first samples of batches."""
    kept, found = [], 0
    for part in parts:
        kept.append(part)
        found += count(part)
        if found >= most:
            break
    if not kept:
        raise ValueError("data has no batch to give")
    return rows(concatenate(kept), slice(most))
