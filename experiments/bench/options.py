"""Options of the experiments: a dataclass is a command line, the string below a field its help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints


@dataclass(frozen=True)
class Options:
    """Options of every experiment; those below have options that several of them share.

    Class arguments: command, the experiment's name on the command line; other defaults than those of the classes above,
    by option. Results go to results/COMMAND where nothing else is said, unfinished work to runs/COMMAND.
    """

    command = ""
    results: Path = Path("results")
    """Where results go; those of a run with other settings than the usual ones to a trial- folder in it."""
    runs: Path = Path("runs")
    """Where finished pieces of work are kept, to go on from."""
    overwrite: bool = False
    """Throw away unfinished and finished work of this configuration and start anew."""
    progress: bool = True
    """Show progress bars."""

    def __init_subclass__(cls, command: str = "", **defaults: Any) -> None:
        """Make the defaults fields of the class, for `dataclass` to find; they keep their help."""
        if command:
            cls.command = command
            defaults = {"results": Path("results", command), "runs": Path("runs", command), **defaults}
        types = {name: of for base in cls.__bases__ for name, of in get_type_hints(base).items()}
        for name, default in defaults.items():
            cls.__annotations__[name] = types[name]
            setattr(cls, name, default)


@dataclass(frozen=True)
class Seeded(Options):
    """Experiments with a seed."""

    seed: int = 0
    """Seed of weights, batches and draws; data splits are always the same."""


@dataclass(frozen=True)
class Timed(Options):
    """Experiments that measure times in turns."""

    repeats: int = 5
    """Interleaved timing repeats."""


@dataclass(frozen=True)
class Budgeted(Options):
    """Experiments that solve with a budget."""

    budget: int = 60
    """Evaluations each sample may cost."""


@dataclass(frozen=True)
class Compared(Budgeted):
    """Experiments on held-out samples of a trained model."""

    samples: int = 256
    """Held-out samples used."""


@dataclass(frozen=True)
class OnModels(Options):
    """Experiments on trained models."""

    models: Path = Path("results/models")
    """Where the frozen models are."""


@dataclass(frozen=True)
class OnFamily(OnModels):
    """Experiments on the trained model of one family."""

    family: str = "conv-fashion"
    """A family of metabroyden.zoo.models.FAMILIES."""


@dataclass(frozen=True)
class OnDevice(Options):
    """Experiments that can run on a GPU."""

    device: str = "auto"
    """Where to run: auto (a GPU where there is one), cpu, cuda, cuda:N."""


@dataclass(frozen=True)
class Unrolled(Options):
    """Experiments that meta-train by backpropagation."""

    backend: str = "higher"
    """Unroll by "higher", or by plain autograd ("native"): the same gradients."""
