"""One solver that is meta-trained on one family by its recipe, and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.bench import measure, solvers
from experiments.bench.measure import Rules, stamp_of
from experiments.bench.runner import Row, Run
from experiments.bench.user import family_of
from experiments.configs.recipes import HELD, POOL, recipe
from metabroyden import Broyden, load_solver, save_solver
from metabroyden.learned.fingerprint import fingerprint
from metabroyden.meta import MetaTrainer, Plan, TaskSet, distributed, plan
from metabroyden.meta.calibrate import calibrate
from metabroyden.meta.objectives import OBJECTIVES
from metabroyden.meta.plan import measure_classical
from metabroyden.progress import progress_bar, tensorboard

if TYPE_CHECKING:
    from experiments.meta import Meta

CLASSICAL = "classical"
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
FREE = ("family", "solver", "seed", "recipe", "models", "device")
"""Options that do not make a trial of a run."""


class Job:
    """One solver on one family, trained by its recipe.

    Args:
        config: the options.
        overrides: what takes the place of the recipe's choices, by flat name, see `metabroyden.meta.plan.plan`.
        prepare: what is done to the untrained solver.
    """

    def __init__(
        self,
        config: Meta,
        overrides: Mapping[str, Any] | None = None,
        prepare: Callable[[Any], Any] = lambda solver: solver,
    ) -> None:
        self.config, self.prepare = config, prepare
        self.device = distributed.resolve(config.device)
        self.family = family_of(config.family, config.models, self.device)
        usual = recipe(config.family, config.solver, texts=self.family.texts) if config.recipe else {}
        usual |= self.family.overrides
        self.overrides = {**usual, **({"steps": config.steps} if config.steps else {}), **(overrides or {})}
        if "steps" in self.overrides:
            self.overrides.setdefault("validate_every", max(1, self.overrides["steps"] // 8))
        always = f"--family {config.family} --solver {config.solver} --seed {config.seed}"
        always += "" if config.recipe else " --no-recipe"
        inputs = (self.overrides, TOLERANCES, self.device.type, *self.family.inputs)
        once = replace(config, overwrite=config.overwrite and distributed.rank() == 0)  # not in every process
        free = FREE[1:] if self.family.own else FREE  # one's own is no result of this repository's
        self.run = Run(once, free=free, shared=("models", "device"), inputs=inputs, always=always)
        self.path = self.run.work / "solver.safetensors"
        distributed.wait()

    def plan(self, tasks: TaskSet) -> tuple[Plan, Any]:
        """How the solver is made and trained, and its untrained self: as by `fit_solver`, but for the recipe."""
        config = self.config
        classical = replace(measure_classical(tasks, rtol=1e-3, max_nfe=config.budget), tuned=self.rivals)
        training = {
            "seed": config.seed,
            "validation_size": HELD if self.family.texts else 256,
            "estimator": config.estimator,
            "objective": OBJECTIVES[config.objective](),
            "backend": config.backend,
            "patience": config.patience,
            "budget_clock": "cpu",
            "validation_nfe": config.budget,
        }
        made = plan(
            tasks, classical, solver=config.solver, conditioning=config.conditioning, training=training,
            seconds=None if config.cpu_minutes is None else 60 * config.cpu_minutes, overrides=self.overrides,
        )  # fmt: skip
        names = [name for name in ("alpha", "damping") if name in made.options]
        measured = distributed.from_first([made.options[name] for name in names])
        made = replace(made, options=made.options | dict(zip(names, measured, strict=True)))
        if made.training.anchor:
            tasks.equilibria = classical.equilibria(tasks)
        return made, self.prepare(made.build(classical.problems[1]))

    def rivals(self) -> dict[str, Any]:
        """The classical solvers, tuned on validation problems."""
        held = self.family.problems("validation", 64)
        return solvers.tuned(held, self.config.budget, splitting=self.family.splitting)

    def trained(self) -> Any:
        """The solver: that of an earlier sitting where it was finished there."""
        if self.path.exists():
            return load_solver(self.path).to(self.device)
        config, first = self.config, distributed.rank() == 0
        tasks = self.family.tasks(config.seed, pool=POOL, held=HELD)
        made, solver = self.plan(tasks)
        trainer = MetaTrainer(solver, tasks, made.training, checkpoint=self.run.work / "training.safetensors")
        title, log = f"{config.family}, {config.solver}", self.run.work / "tensorboard"
        with (
            progress_bar(title, made.training.steps, show=config.progress and first) as bar,
            tensorboard(log, trainer.step) if first else nullcontext() as trainer.curves,
        ):
            trainer.run(bar)
        calibrate(solver, tasks, rtol=1e-3, max_nfe=config.budget, most=HELD)
        solver.fingerprint = fingerprint(tasks.f)
        if first:
            save_solver(solver, self.path)
        return solver

    def measured(self, solver: Any) -> list[Row]:
        """Rows of a solver and how it fares far beyond its unrolls; without one, of the classical solvers, tuned."""
        config, family = self.config, self.family
        held, rules = family.problems("test", config.samples), Rules(TOLERANCES, config.budget)
        if solver is None:
            everyone = solvers.contestants(**self.rivals(), Broyden=Broyden(config.budget))
            return measure.measure(held, everyone, rules, progress=config.progress)
        name = config.solver if config.recipe else f"{config.solver}, by the plan"
        one, told = solvers.contestant(name, solver, config.seed), solver.summary["meta_training"]
        rows = measure.measure(held, [one], rules, progress=config.progress)
        steps = 4 * told["segments"] * int(np.max(told["unroll"]))
        return rows + measure.horizon_rows(held, one, stamp_of(held), steps=steps)
