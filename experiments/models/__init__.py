"""Every model of the sources on real data: train it beside its twins, look at its equilibria, and say how hard they are."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from experiments.bench import measure, problems, solvers
from experiments.bench.options import Compared, OnDevice, Seeded, Timed
from experiments.bench.runner import Row, config_hash, plain, provenance, publish, read_rows, ticks
from experiments.models import report, rows, texts
from metabroyden.learned.fingerprint import fingerprint
from metabroyden.meta.progress import progress_bar
from metabroyden.solvers import Anderson, Broyden, Picard
from metabroyden.storage import atomic_write
from metabroyden.zoo.models import Episodes, EpochEnd, Training, history, load_model, save_model, train
from metabroyden.zoo.models.criteria import Criterion, NextToken
from metabroyden.zoo.models.episodes import episodes_in
from metabroyden.zoo.models.families import FAMILIES, Family, get_family
from metabroyden.zoo.models.fit import by_epoch
from metabroyden.zoo.models.twins import explicit_twin, flow_twin, unrolled_twin

DEQ, REGULARISED = "DEQ", "DEQ, Jacobian penalty"


@dataclass(frozen=True)
class Models(Seeded, Compared, Timed, OnDevice, command="models"):
    """Train a family's DEQ and its twins, measure them, and write results/models/FAMILY/ and the report over all."""

    family: str = "all"
    """A family of metabroyden.zoo.models.FAMILIES, or "all", one after another."""
    preset: str = "cpu"
    """"cpu", at most half an hour a model on two cores, or "gpu", larger."""
    epochs: int | None = None
    """Epochs of every training, instead of the family's own; pretraining is shortened alike."""


def run(config: Models) -> None:
    """The whole job. Interrupted, it goes on where it stopped."""
    console = Console()
    if config.preset not in ("cpu", "gpu"):
        raise ValueError(f'preset must be "cpu" or "gpu", got {config.preset!r}')
    for name in FAMILIES if config.family == "all" else [config.family]:
        _Job(name, config).run()
        report.write_family(config.results / name)
        console.print(f"{name}: {config.results / name}")
    console.print(Markdown(report.write(config.results).read_text()))


class _Job:
    """One family: trainings, each in a file of its own, then measurements, then what is published."""

    def __init__(self, name: str, config: Models) -> None:
        self.name, self.config = name, config
        family = get_family(name)
        self.family = _shortened(family.enlarged() if config.preset == "gpu" else family, config)
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = auto if config.device == "auto" else config.device
        self.criterion: Criterion = self.family.criterion()
        self.work = config.runs / f"{name}-{_recipe_hash(self.family, self.criterion)}"
        if config.overwrite and self.work.exists():
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        identity = replace(config, family=name, results=Path(), runs=Path(), overwrite=False, progress=True, device="")
        self.measured = self.work / f"measured-{config_hash(identity)}"
        started = self.work / "trained.json"
        if not started.exists():
            atomic_write(started, json.dumps(provenance(), indent=2) + "\n")
        self.started = json.loads(started.read_text())
        self.episodes = Episodes(self.family.training.epochs, min(8, self.family.training.epochs))

    def run(self) -> None:
        """Everything."""
        models = {way: self._trained(way, build) for way, build in self._ways().items()}
        if not (self.measured / "rows.jsonl.gz").exists():
            publish(self.measured, self._measured(models), self._described(models))
        self._publish()

    def _ways(self) -> dict[str, Callable[[], Any]]:
        """How each variant is built."""
        family = self.family
        ways: dict[str, Callable[[], Any]] = {DEQ: family.build}
        if family.jacobian:
            ways[REGULARISED] = family.build
        twins = {
            "unrolled": lambda: unrolled_twin(family.build(), family.depth),
            "explicit": lambda: explicit_twin(family.model, family.config, family.depth),
            # about as many evaluations
            "flow": lambda: flow_twin(family.build(), steps=max(1, round(family.depth / 4))),
        }
        return ways | {name: twins[name] for name in family.twins}

    def _training(self, way: str) -> Training:
        return replace(self.family.training, jacobian=self.family.jacobian if way == REGULARISED else 0.0)

    def _at(self, way: str, ending: str = "training.safetensors") -> Path:
        return self.work / f"{way.replace(', ', '-').replace(' ', '-')}.{ending}"

    def _trained(self, way: str, build: Callable[[], Any]) -> Any:
        training = self._training(way)
        with progress_bar(f"{self.name}, {way}", training.epochs, show=self.config.progress) as bar:
            show = by_epoch(bar, self.criterion.metric)

            def noted(now: EpochEnd, model: Any) -> None:
                if way == DEQ:
                    self.episodes.note(now.epoch, model, self.work)
                    if now.epoch == training.pretrain + 1:  # the checkpoint is that of the epoch before
                        self._begin(REGULARISED)
                show(now, model)

            model = train(build, self.criterion, training, path=self._at(way), device=self.device, report=noted)
        model = model.cpu().requires_grad_(False)
        if way in (DEQ, REGULARISED):
            described = {"family": self.name, "way": way, "training": asdict(training)}
            path = save_model(model, self._at(way, "safetensors"), described, slim=True)
            model.load_state_dict(load_model(path).state_dict())  # the weights that people get are those measured
        return model

    def _begin(self, way: str) -> None:
        """Let a variant go on from the DEQ's checkpoint: the epochs unrolled are the same for both."""
        if self.family.jacobian and self.family.training.pretrain and not self._at(way).exists():
            atomic_write(self._at(way), self._at(DEQ).read_bytes())

    def _measured(self, models: dict[str, Any]) -> list[Row]:
        config, criterion = self.config, self.criterion
        parts = [way for way in (DEQ, REGULARISED, "unrolled") if way in models]
        found: list[Row] = []
        with ticks(f"{self.name}, measuring", len(models) + len(parts) + 2, show=config.progress) as tick:
            for way, model in models.items():
                past = history(self._at(way))
                found += [{"row": "epoch", "way": way, **asdict(epoch)} for epoch in past]
                found.append(rows.quality_row(way, model, criterion, past[-1].seconds))
                tick(f"score, {way}")
            for way in parts:
                found += self._examined(way, models[way])
                tick(f"equilibria, {way}")
            if isinstance(criterion, NextToken):
                found += texts.token_rows(DEQ, models[DEQ], criterion)
                found += texts.ngram_rows(criterion)
                tolerances = (self.family.rtol, rows.EXACT)
                found += measure.leak_rows(models[DEQ], criterion, {"way": DEQ}, tolerances=tolerances)
            tick("tokens")
            for model in models.values():
                model.requires_grad_(True)
            trainings = {way: self._training(way) for way in models}
            found += rows.step_rows(models, trainings, criterion, repeats=config.repeats)
            tick("training steps")
        return found

    def _examined(self, way: str, model: Any) -> list[Row]:
        """How hard the equilibria are to find, what the score is on the way there, and what pictures show."""
        held = problems.held_out(model, self.criterion, "test", self.config.samples)
        found = [] if way == "unrolled" else self._raced(way, model, held)
        found += rows.depth_rows(way, held)
        if self.family.pictures and way != REGULARISED:
            found += rows.unit_rows(way, held, solver=Broyden(memory=200))
        return found + (rows.part_rows(way, held) if way == DEQ and isinstance(held.z0, tuple) else [])

    def _raced(self, way: str, model: Any, held: problems.HeldOut) -> list[Row]:
        """Classical solvers, as they are and tuned, on a DEQ's equilibria."""
        budget, validation = self.config.budget, problems.held_out(model, self.criterion, "validation", 64)
        known: dict[str, Any] = {"Picard": Picard(), "Anderson": Anderson(), "Broyden": Broyden(budget)}
        known |= solvers.tuned(validation, budget, splitting=self.family.splitting)
        splitting: dict[str, Any] = {
            name: known[name] for name in ("forward-backward", "Peaceman-Rachford") if name in known
        }
        found = rows.difficulty_rows(way, held, known, budget=budget)
        if splitting:
            everything = problems.held_out(model, self.criterion, "test", sys.maxsize)
            found += rows.guarantee_rows(way, everything, splitting)
        sure = splitting.get("Peaceman-Rachford", Broyden(memory=100))
        return found + rows.spectrum_rows(way, held, solver=sure) + rows.depth_rows(way, held, self.family.solver)

    def _described(self, models: dict[str, Any]) -> dict[str, Any]:
        command = f"python -m experiments models --family {self.name}"
        command += f" --preset {self.config.preset}" * (self.config.preset != "cpu")
        command += f" --seed {self.config.seed}" * (self.config.seed != 0)
        return {
            "command": command,
            "config": plain(self.config),
            "model": asdict(self.family.config),
            "kind": models[DEQ].kind,
            "training": asdict(self.family.training),
            "depth": self.family.depth,
            "jacobian": self.family.jacobian,
            "solver": repr(self.family.solver),
            "backward": repr(self.family.backward),
            "rtol": self.family.rtol,
            "fingerprint": {way: fingerprint(models[way].cell) for way in (DEQ, REGULARISED) if way in models},
            "trained": self.started,
            "provenance": provenance(),
        }

    def _publish(self) -> None:
        """Copy what a person wants to results/, each model with the hash of its file."""
        folder = self.config.results / self.name
        described = json.loads((self.measured / "config.json").read_text())
        described["sha256"] = {}
        for way, name in ((DEQ, "model.safetensors"), (REGULARISED, "regularised.safetensors")):
            if way in described["fingerprint"]:
                data = self._at(way, "safetensors").read_bytes()
                described["sha256"][name] = hashlib.sha256(data).hexdigest()
                atomic_write(folder / name, data)
        described["episodes"] = episodes_in(self.episodes.collect(self.work, folder / "episodes.safetensors"))
        publish(folder, read_rows(self.measured / "rows.jsonl"), described)


def _recipe_hash(family: Family, criterion: Criterion) -> str:
    """Eight hex digits that change when anything about how a family is trained does, its data's name included."""
    recipe = {item.name: repr(getattr(family, item.name)) for item in fields(family) if item.name != "criterion"}
    read = {name: getattr(value, "__qualname__", value) for name, value in vars(criterion).items() if name != "data"}
    recipe["criterion"] = f"{family.criterion.__qualname__}{read}"
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]


def _shortened(family: Family, config: Models) -> Family:
    """The family with the seed of a config and, where one is given, its number of epochs."""
    training = replace(family.training, seed=config.seed)
    if config.epochs is not None:
        pretrain = min(round(training.pretrain * config.epochs / training.epochs), config.epochs - 1)
        training = replace(training, epochs=config.epochs, pretrain=pretrain)
    return replace(family, training=training)
