"""Every model of the sources on real data: train it beside its twins, look at its equilibria, and say how hard they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from experiments.bench.options import Compared, OnDevice, Seeded, Timed
from experiments.bench.runner import Row, Run, digest, publish, sha256, show
from experiments.models import report, rows
from experiments.models.rows import DEQ, REGULARISED
from metabroyden.learned.fingerprint import fingerprint
from metabroyden.meta.distributed import resolve
from metabroyden.progress import progress_bar
from metabroyden.storage import atomic_write
from metabroyden.zoo.models import Episodes, EpochEnd, Training, load_model, save_model, train
from metabroyden.zoo.models.episodes import episodes_in
from metabroyden.zoo.models.families import FAMILIES, Family, get_family
from metabroyden.zoo.models.fit import by_epoch
from metabroyden.zoo.models.twins import explicit_twin, flow_twin, unrolled_twin

FREE = ("family", "device")
MEASURING = ("budget", "samples", "repeats")
"""Options that no training depends on."""
FILES = {DEQ: "model.safetensors", REGULARISED: "regularised.safetensors"}


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
    if config.preset not in ("cpu", "gpu"):
        raise ValueError(f'preset must be "cpu" or "gpu", got {config.preset!r}')
    for name in FAMILIES if config.family == "all" else [config.family]:
        job = Job(replace(config, family=name))
        job.run()
        report.write_family(job.folder)
    show(report.write(job.folder.parent))


class Job:
    """One family: trainings, each in a file of its own, then measurements, then what is published."""

    def __init__(self, config: Models) -> None:
        self.config, self.name, self.device = config, config.family, resolve(config.device)
        self.family = _shortened(get_family(self.name), config)
        self.criterion = self.family.criterion()
        recipe = {**vars(self.family), **vars(self.criterion), "data": None}  # a family's criterion is a function
        inputs = [(name, getattr(value, "__qualname__", value)) for name, value in recipe.items()]
        self._run = Run(
            config, free=FREE, shared=(*FREE, *MEASURING), inputs=[self.name, *inputs], always=f"--family {self.name}"
        )
        self.work, self.folder = self._run.work, self._run.folder / self.name
        self.measured = f"measured-{digest(*(getattr(config, name) for name in MEASURING))}"  # the unit's name
        self.episodes = Episodes(self.family.training.epochs, min(8, self.family.training.epochs))

    def run(self) -> None:
        """Everything."""
        models = {way: self.trained(way, build) for way, build in self._ways().items()}
        found = self._run.unit(self.measured, lambda: rows.measured(self, models))
        family, kept = self.family, [way for way in FILES if way in models]
        for way in kept:
            atomic_write(self.folder / FILES[way], self.at(way, "safetensors").read_bytes())
        described: Row = {name: repr(getattr(family, name)) for name in ("config", "training", "solver", "backward")}
        described |= {name: getattr(family, name) for name in ("depth", "jacobian", "rtol")}
        described["fingerprint"] = {way: fingerprint(models[way].cell) for way in kept}
        described["sha256"] = {FILES[way]: sha256(self.folder / FILES[way]) for way in kept}
        described["episodes"] = episodes_in(self.episodes.collect(self.work, self.folder / "episodes.safetensors"))
        publish(self.folder, found, self._run.described(**described))

    def _ways(self) -> dict[str, Callable[[], Any]]:
        """How each variant is built."""
        family = self.family
        twins = {
            "unrolled": lambda: unrolled_twin(family.build(), family.depth),
            "explicit": lambda: explicit_twin(family.model, family.config, family.depth),
            # about as many evaluations
            "flow": lambda: flow_twin(family.build(), steps=max(1, round(family.depth / 4))),
        }
        regularised = {REGULARISED: family.build} if family.jacobian else {}
        return {DEQ: family.build, **regularised, **{name: twins[name] for name in family.twins}}

    def training(self, way: str) -> Training:
        """How a variant is trained."""
        return replace(self.family.training, jacobian=self.family.jacobian if way == REGULARISED else 0.0)

    def at(self, way: str, ending: str = "training.safetensors") -> Path:
        """A variant's file of unfinished work."""
        return self.work / f"{way.replace(', ', '-').replace(' ', '-')}.{ending}"

    def trained(self, way: str, build: Callable[[], Any]) -> Any:
        """A variant; what is finished is read, what was interrupted goes on."""
        training = self.training(way)
        with progress_bar(f"{self.name}, {way}", training.epochs, show=self.config.progress) as bar:
            shown = by_epoch(bar, self.criterion.metric)

            def noted(now: EpochEnd, model: Any) -> None:
                if way == DEQ:
                    self.episodes.note(now.epoch, model, self.work)
                    # the checkpoint is that of the epoch before; the epochs unrolled are the same for both
                    if now.epoch == training.pretrain + 1 and training.pretrain and not self.at(REGULARISED).exists():
                        atomic_write(self.at(REGULARISED), self.at(DEQ).read_bytes())
                shown(now, model)

            device = self.device.type
            model = train(build, self.criterion, training, path=self.at(way), device=device, report=noted)
        model = model.cpu().requires_grad_(False)
        if way in FILES:
            summary = {"family": self.name, "way": way, "training": asdict(training)}
            path = save_model(model, self.at(way, "safetensors"), summary, slim=True)
            model.load_state_dict(load_model(path).state_dict())  # the weights that people get are those measured
        return model


def _shortened(family: Family, config: Models) -> Family:
    """The family in the preset, with the seed and, where one is given, the number of epochs of a config."""
    family = family.enlarged() if config.preset == "gpu" else family
    training = replace(family.training, seed=config.seed)
    if config.epochs is not None:
        pretrain = min(round(training.pretrain * config.epochs / training.epochs), config.epochs - 1)
        training = replace(training, epochs=config.epochs, pretrain=pretrain)
    return replace(family, training=training)
