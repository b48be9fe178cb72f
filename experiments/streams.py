"""Streams: problems that change little from one to the next, solved from the last solution or from zero each time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from experiments.bench import report, solvers
from experiments.bench.options import Compared, OnModels
from experiments.bench.problems import Family
from experiments.bench.runner import Row, Run, at_least_one, known, threads
from metabroyden.comparison import figures
from metabroyden.comparison.clock import laps
from metabroyden.comparison.figures import FLAGSHIP, label
from metabroyden.comparison.measure import Contestant
from metabroyden.comparison.statistics import geometric
from metabroyden.comparison.tables import Table, chosen, grouped
from metabroyden.deq import initial_state
from metabroyden.meta.calibrate import calibrate
from metabroyden.meta.tasks import TaskSet, rows
from metabroyden.nn.pin import pin
from metabroyden.progress import ticks
from metabroyden.solution import State
from metabroyden.solve import solve
from metabroyden.solvers import Broyden
from metabroyden.zoo.testbed import make_problem

IMAGES = ("conv-digits", "conv-fashion", "multiscale-digits")
TEXTS = ("trellisnet-words",)
GRIDS = ("power_flow_30", "power_flow_118")
COLD, WARM = "cold", "warm"
TOLERANCES = (1e-2, 1e-3)
DRIFT = 1 / 32
"""Of its side that an image moves from frame to frame: a quarter of a pixel of 8 × 8, nearly one of 28 × 28."""
LOAD = (0.75, 1.05)
"""Lowest and highest load of a day, as a share of the scheduled one."""
RIVAL = "tuned Anderson"
"""What times are held against."""
ROUNDS = 3


@dataclass(frozen=True)
class Streams(Compared, OnModels, command="streams", samples=32):
    """Solve images that drift, texts that grow and power networks over a day, warm and cold."""

    families: tuple[str, ...] = (*IMAGES, *TEXTS, *GRIDS)
    """What is solved."""
    frames: int = 12
    """Problems of a stream, one after the other."""
    solvers: Path = Path("results/meta")
    """Where the trained solvers are."""


class Frame(NamedTuple):
    """The problems of one moment, of all streams."""

    f: Any
    z0: State
    x: Any


def run(config: Streams) -> None:
    """The whole job, a few minutes. Interrupted, it goes on with the next family."""
    at_least_one(config, "frames", "samples", "budget")
    known("families", config.families, (*IMAGES, *TEXTS, *GRIDS))
    job, rows = Run(config, free=("models", "solvers"), inputs=(DRIFT, LOAD)), []
    with ticks("streams", len(config.families), show=config.progress) as done:
        for name in config.families:
            rows += job.unit(name, lambda: measured(config, name))  # noqa: B023 (called at once)
            done(name)
    job.finish(rows, write)


def measured(config: Streams, name: str) -> list[Row]:
    """Rows of one family."""
    with threads(1), torch.no_grad():
        return list(_measured(config, name))


def _measured(config: Streams, name: str) -> Iterator[Row]:
    frames, everyone = power_frames(config, name) if name in GRIDS else family_frames(config, name)
    for tolerance in TOLERANCES:
        options: dict[str, Any] = {"rtol": tolerance, "max_nfe": config.budget, "throw": False}

        def follow(one: Contestant, start: str) -> list[Any]:
            return followed(frames, one.solver, warm=start == WARM, **options)  # noqa: B023 (called at once)

        ways = [(one, start) for one in everyone for start in (COLD, WARM)]
        for one, start in ways:
            for frame, found in enumerate(follow(one, start)):
                spent = np.where(found.converged.numpy(), found.nfe.numpy(), config.budget)
                yield {
                    "row": "frame", "family": name, "solver": one.name, "kind": one.kind, "start": start,
                    "tolerance": tolerance, "frame": frame, "samples": len(spent), "mean": float(spent.mean()),
                    "median": float(np.median(spent)), "solved": float(found.converged.double().mean()),
                }  # fmt: skip
        timed = [(one, start) for one, start in ways if one.kind == "learned" or one.name == RIVAL]
        jobs = {(one.name, start): lambda one=one, start=start: follow(one, start) and None for one, start in timed}
        for (solver, start), seconds in laps(jobs, ROUNDS).items():
            stamp = {"row": "time", "family": name, "solver": solver, "start": start, "tolerance": tolerance}
            yield {**stamp, "seconds": seconds.tolist()}


def followed(frames: Sequence[Frame], solver: Any, *, warm: bool, **options: Any) -> list[Any]:
    """The solutions of a stream, frame by frame, each from the last one (where that is shorter, zeros after it) or not."""
    found: list[Any] = []
    for f, z0, x in frames:
        start = grown(found[-1].z, z0) if warm and found else z0
        found.append(solve(f, start, x, solver=solver, **options))
    return found


def grown(z: State, z0: State) -> State:
    """A solution z as the start of a problem of as many or more tokens, whose usual start is z0."""
    if not isinstance(z, Tensor) or not isinstance(z0, Tensor):
        return z
    start = z0.clone()
    start[tuple(slice(size) for size in z.shape)] = z
    return start


def family_frames(config: Streams, name: str) -> tuple[list[Frame], list[Contestant]]:
    """A stream for each test sample of a family; tuned classical solvers and its trained ones."""
    family = Family(name, config.models)
    model = family.model()
    contexts = text_contexts if family.texts else image_contexts
    frames = []
    for x in contexts(family, model, config):
        z0 = initial_state(model.cell, x)
        f, pinned = pin(model.cell, x, z0)
        frames.append(Frame(f, z0, pinned))
    held = family.problems("validation", 32 if family.texts else 64)
    theirs = solvers.contestants(**solvers.tuned(held, config.budget))
    (ours,) = solvers.learned(config.solvers, name, (FLAGSHIP,))[:1]
    if not family.texts:  # trained before solvers knew what warm starts are worth to them
        tasks = TaskSet(
            model.cell, rows(held.x, slice(32, None)), rows(held.x, slice(32)), z0=partial(initial_state, model.cell)
        )
        calibrate(ours.solver, tasks, rtol=TOLERANCES[-1], max_nfe=config.budget, most=32)
    return frames, [*theirs, ours]


def image_contexts(family: Family, model: Any, config: Streams) -> Iterator[Any]:
    """Contexts of test images that drift, each in its own direction, brought to their places between pixels."""
    data: Any = family.criterion.data
    images = data.test.images[: config.samples]
    generator = torch.Generator().manual_seed(0)
    angle = 2 * math.pi * torch.rand(len(images), generator=generator)
    direction = torch.stack([angle.cos(), angle.sin()], dim=1)
    for frame in range(config.frames):
        moved = 2 * DRIFT * (frame - (config.frames - 1) / 2) * direction  # the side is 2 in affine_grid's units
        theta = torch.cat([torch.eye(2).expand(len(images), 2, 2), moved.unsqueeze(2)], dim=2)
        grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
        yield model.inject(functional.grid_sample(images, grid, align_corners=False))


def text_contexts(family: Family, model: Any, config: Streams) -> Iterator[Any]:
    """Contexts of test windows that grow by a few tokens a frame."""
    x = family.problems("test", config.samples // 2).x
    x = getattr(x, "context", x)
    first, *rest = x if isinstance(x, tuple) else (x,)
    axis = 2 if model.cell.layout == "nct" else 1
    length = first.shape[axis]
    for frame in range(config.frames):
        part = first.narrow(axis, 0, length * (frame + 1) // config.frames)
        yield (part, *rest) if isinstance(x, tuple) else part


def power_frames(config: Streams, name: str) -> tuple[list[Frame], list[Contestant]]:
    """Days of a power network whose load rises and falls, by frames; the buses of a stream differ in their share of it."""
    batch = min(64, config.samples)
    problem = make_problem(name, dtype=torch.float32, batch=batch, seed=0)
    p, q = problem.context
    generator = torch.Generator().manual_seed(1)
    own = 1 + 0.02 * torch.randn(p.shape, generator=generator)
    scheduled = make_problem(name, dtype=torch.float32, batch=1, seed=0)
    scale = scheduled.context[0][:1].norm() / p.norm(dim=1, keepdim=True)  # every stream begins with the same load
    frames = []
    for frame in range(config.frames):
        share = LOAD[0] + (LOAD[1] - LOAD[0]) * math.sin(math.pi * frame / config.frames) ** 2
        frames.append(Frame(problem.f, problem.z0, (share * scale * own * p, share * scale * own * q)))
    tuned = solvers.grids.tuned_solvers(*frames[0], budget=config.budget)
    return frames, [*solvers.contestants(**tuned, Broyden=Broyden(config.budget)), solvers.universal()]


WORDS = """\
A stream is a row of problems that change little. *Images* drift by a thirty-second of their side a frame, between pixels;
*texts* grow by a few tokens, of which the last solution says nothing; *power networks* go through a day's load, each bus
with a share of its own. Warm: every solve begins at the last solution (zeros where a text is new); cold: at the usual
start. Picard, Anderson and Broyden are tuned on cold validation problems. Means over samples and all frames but the first,
which is cold for all; a sample that is not solved counts as the budget."""


@report.of_rows("Streams", "pypower")
def write(rows: list[Row], described: Row, folder: Path) -> list[report.Section]:
    """report.md and its figure."""
    return [WORDS, *(_table(rows, tolerance) for tolerance in TOLERANCES), _figure(rows, folder)]


def summary(rows: Sequence[Row], tolerance: float) -> dict[str, dict[tuple[str, str], Row]]:
    """By family, and by solver and start: mean evaluations and share solved over the later frames, seconds of a stream."""
    found: dict[str, dict[tuple[str, str], Row]] = {}
    at = [row for row in rows if row["tolerance"] == tolerance]
    for of in grouped(at, "family", "solver", "start"):
        later = [row for row in chosen(of, "frame") if row["frame"] > 0]
        timed = chosen(of, "time")
        found.setdefault(of[0]["family"], {})[of[0]["solver"], of[0]["start"]] = {
            "mean": float(np.mean([row["mean"] for row in later])),
            "solved": float(np.mean([row["solved"] for row in later])),
            "seconds": float(np.median(timed[0]["seconds"])) if timed else None, "kind": later[0]["kind"],
        }  # fmt: skip
    return found


def _table(rows: list[Row], tolerance: float) -> Table:
    body, ratios = [], []
    for family, of in summary(rows, tolerance).items():
        names = list(dict.fromkeys(name for name, _ in of))
        (ours,) = (name for name in names if of[name, COLD]["kind"] == "learned")
        warm = of[ours, WARM]
        over = {
            "Anderson warm": warm["mean"] / of[RIVAL, WARM]["mean"],
            "its own cold": warm["mean"] / of[ours, COLD]["mean"],
            "time": warm["seconds"] / of[RIVAL, WARM]["seconds"],
        }
        ratios.append(over)
        cells = [_cell(of[name, start]) for name in (RIVAL, "tuned Broyden", ours) for start in (COLD, WARM)]
        body.append([family, label(ours), *cells, *(f"{value:.2f}" for value in over.values())])
    whole = [f"**{geometric([ratio[key] for ratio in ratios]):.2f}**" for key in ratios[0]]
    body.append(["**all**", *[""] * 7, *whole])
    head = ["family", "learned", "Anderson cold", "warm", "Broyden cold", "warm", "learned cold", "warm",
            "warm over Anderson warm", "over its own cold", "time over Anderson warm"]  # fmt: skip
    return Table(f"To {tolerance:g}", head, body)


def _cell(row: Row) -> str:
    return f"{row['mean']:.1f}" + ("" if row["solved"] > 0.9995 else f" ({row['solved']:.1%})")


def _figure(rows: list[Row], folder: Path) -> report.Picture:
    """Evaluations frame by frame, to 1e-3."""

    def draw(place: Any, family: str) -> None:
        for of in grouped(chosen(rows, "frame", tolerance=TOLERANCES[-1], family=family), "solver", "start"):
            name, start = of[0]["solver"], of[0]["start"]
            if name not in (RIVAL, FLAGSHIP, "universal"):
                continue
            ink = "#0072B2" if name == RIVAL else figures.colour(FLAGSHIP)
            words = f"{'Anderson' if name == RIVAL else 'learned'}, {start}"
            place.plot(
                [row["frame"] for row in of], [row["mean"] for row in of], "-" if start == WARM else ":",
                color=ink, label=words,
            )  # fmt: skip
        place.set_ylim(0, None)

    names = list(dict.fromkeys(row["family"] for row in rows))
    figure = figures.panels(names, draw, "frame", "mean evaluations to 1e-3", columns=4, size=(3.2, 2.6))
    return report.Picture(
        figures.save(figure, folder / "frames.png"),
        "Mean evaluations frame by frame: warm starts (solid) save most where little changes.",
    )
