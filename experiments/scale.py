"""What meta-training for published models would take, by arithmetic on counted sizes, and what two processes gain, measured.

Rows:
  size     of a published cell with random weights, for one sample: coordinates of its state, weights of f and of a
           MetaBroyden for it, floating-point operations of f and of a solver step (f among them), bytes that
           backpropagation keeps for a step, and with checkpoint_steps
  shared   seconds of outer steps of one meta-training in so many processes (gloo), each on one thread, in rounds in turns;
           bytes of gradients that every segment exchanges

This file is also what torchrun starts: `python -m experiments.scale FAMILY BATCH STEPS OUT`.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from experiments.bench import report
from experiments.bench.options import OnModels, Timed
from experiments.bench.problems import Family
from experiments.bench.runner import Row, Run, at_least_one
from metabroyden.comparison.clock import saved_bytes
from metabroyden.comparison.tables import Table, chosen, grouped, listed, middle
from metabroyden.meta import MetaConfig, MetaTrainer, distributed
from metabroyden.meta.defaults import RATES, SEGMENTS, SOLVER_STEPS, context_options, state_layout
from metabroyden.meta.plan import make_learned
from metabroyden.meta.unroll import unroll
from metabroyden.zoo.models import MultiscaleCell, TransformerCell

UNROLL, BATCH = SEGMENTS[-1], 32
"""Solver steps of an outer step, and samples: those of `fit_solver` for a dear f."""
TUNING = 32 * 32 * 60
"""Evaluations that tuning the classical solvers takes, at most: options, samples, budget."""
RATE = 50e12
"""Operations a second that a card is assumed to do."""
ARITHMETIC = f"""\
A fit of {SOLVER_STEPS[0]:,} solver steps on batches of {BATCH} in unrolls of {UNROLL}, the fewest that `fit_solver`
chooses, at {RATE / 1e12:.0f}·10¹² operations a second (assumed); backpropagation counts as two forward passes. The cells
have the sizes of the published configurations and random weights; operations and bytes are counted on one sample.
"exchanged" are the gradients of one segment. Whether so few steps are enough at this size has not been tried."""
SHARED = """\
Meta-training on the families here, seconds of an outer step (batch of 32, two segments of 14), medians over rounds;
efficiency is the time of one process over twice that of two, each with half of the batch and one thread."""


class ExpandedCell(MultiscaleCell):
    """A `MultiscaleCell` whose blocks are MDEQ's for ImageNet: two convolutions with five times the channels between."""

    def __init__(self, widths: tuple[int, ...], groups: int, factor: int = 5) -> None:
        super().__init__(widths, groups)
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, factor * width, 3, padding=1, bias=False),
                nn.GroupNorm(groups, factor * width),
                nn.ReLU(),
                nn.Conv2d(factor * width, width, 3, padding=1, bias=False),
            )
            for width in widths
        )


def wikitext(width: int = 700, heads: int = 10, inner: int = 48_000, tokens: int = 150) -> tuple[Any, Any]:
    """(cell, context) of the DEQ-Transformer on WikiText-103, as locuslab/deq's wt103_deq_transformer.sh has it."""
    return TransformerCell(width, heads, inner), (torch.randn(1, tokens, 4 * width), torch.zeros(1, tokens, width))


def imagenet(widths: tuple[int, ...] = (32, 64, 128, 256), side: int = 56) -> tuple[Any, Any]:
    """(cell, context) of the small MDEQ on ImageNet, as locuslab/deq's cls_mdeq_SMALL.yaml has it."""
    return ExpandedCell(widths, groups=8), torch.randn(1, widths[0], side, side)


MODELS: dict[str, Any] = {"DEQ-Transformer, WikiText-103": wikitext, "MDEQ (small), ImageNet": imagenet}


@dataclass(frozen=True)
class Scale(OnModels, Timed, command="scale", repeats=3):
    """Count what meta-training for two published models would take, measure two processes and write results/scale/."""

    families: tuple[str, ...] = ("conv-digits", "trellisnet-shakespeare")
    """Families whose meta-training is timed, in one process and in two."""
    steps: int = 10
    """Timed outer steps of a round, after two to warm up."""
    batch: int = BATCH
    """Samples of an outer step, of all processes together."""


def run(config: Scale) -> None:
    """The whole job. Interrupted, it goes on with the next family."""
    at_least_one(config, "steps", "batch", "repeats")
    job = Run(config)
    rows = job.unit(
        "sizes", lambda: [{"row": "size", "model": name, **sizes(*make())} for name, make in MODELS.items()]
    )
    for family in config.families:
        rows += job.unit(family, lambda: shared(config, family))  # noqa: B023 (called at once)
    job.finish(rows, write)


def sizes(cell: nn.Module, context: Any) -> Row:
    """The figures of a row "size"."""
    cell.requires_grad_(False)
    z0: Any = cell.initial_state(context)  # type: ignore[operator]
    layout = state_layout(cell, z0, None)
    learned = make_learned("meta-broyden", layout, **context_options(cell, layout, z0, context, "auto"))

    def operations(steps: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unroll(learned, cell, z0, context, steps=steps, backend="native")
        return counter.get_total_flops()

    def kept(steps: int, **options: Any) -> int:
        def forward() -> Tensor:
            return unroll(learned, cell, z0, context, steps=steps, backend="native", **options).residuals.sum()

        return saved_bytes(forward, [*cell.parameters(), *learned.parameters()])

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cell(z0, context)
    return {
        "state": sum(part.numel() for part in pytree.tree_leaves(z0)), "weights": _count(cell), "learned": _count(learned),
        "operations": counter.get_total_flops(), "step": operations(3) - operations(2), "bytes": kept(3) - kept(2),
        "checkpointed": kept(3, checkpoint_steps=True) - kept(2, checkpoint_steps=True),
    }  # fmt: skip


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def shared(config: Scale, family: str) -> Iterator[Row]:
    """The rows of one family, processes in turns."""
    for number, processes in product(range(config.repeats), (1, 2)):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "found.json")
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(processes),
            ]
            told = [family, str(config.models), str(config.batch), str(config.steps), str(out)]
            done = subprocess.run(
                [*command, "-m", "experiments.scale", *told], env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"{processes} processes on {family} failed:\n{done.stderr}")
            yield {
                "row": "shared",
                "family": family,
                "round": number,
                "processes": processes,
                **json.loads(out.read_text()),
            }


def _work(family: str, models: str, batch: str, steps: str, out: str) -> None:
    """What each process does: train, and time all steps but the first two."""
    torch.set_num_threads(1)
    with distributed.processes(torch.device("cpu")):
        tasks = Family(family, Path(models), torch.device("cpu")).tasks(0, pool=128, held=32)
        z0, x = tasks.problems("validation")
        layout = state_layout(tasks.f, z0, None)
        learned = make_learned("meta-broyden", layout, **context_options(tasks.f, layout, z0, x, "auto"))
        count = int(steps) + 3  # two to warm up; the last one, with its look at validation, is not made
        config = MetaConfig(
            steps=count, unroll=UNROLL, segments=2, batch=int(batch), validate_every=count, backend="native", **RATES
        )
        trainer = MetaTrainer(learned, tasks, config)
        trainer.run(until=2)
        distributed.wait()
        began = time.perf_counter()
        trainer.run(until=count - 1)
        seconds = (time.perf_counter() - began) / int(steps)
        if distributed.rank() == 0:
            Path(out).write_text(json.dumps({"seconds": seconds, "exchanged": 4 * _count(learned)}))


@report.of_rows("Scaling out")
def write(rows: list[Row], described: Row, folder: Path) -> list[report.Section]:
    """report.md."""
    return [ARITHMETIC, _arithmetic(chosen(rows, "size")), SHARED, _efficiency(chosen(rows, "shared"))]


def _arithmetic(rows: list[Row]) -> Table:
    def minutes(row: Row) -> str:
        training = SOLVER_STEPS[0] * BATCH * 3 * row["step"]
        return f"{(training + TUNING * row['operations']) / RATE / 60:.1f}"

    def memory(key: str) -> Any:
        return lambda row: f"{UNROLL * BATCH * row[key] / 1e9:,.0f}"

    return listed("Counted", rows, [
        ("", "{model}"),
        ("state", "{state:,}"),
        ("weights of f", lambda row: f"{row['weights'] / 1e6:.1f} M"),
        ("of the solver", lambda row: f"{row['learned'] / 1e6:.2f} M"),
        ("f, GFLOP", lambda row: f"{row['operations'] / 1e9:.2f}"),
        ("solver's share of a step", lambda row: f"{1 - row['operations'] / row['step']:.1%}"),
        ("outer steps", lambda _: math.ceil(SOLVER_STEPS[0] / UNROLL)),
        ("minutes", minutes),
        ("GB of a batch", memory("bytes")),
        ("with checkpoint_steps", memory("checkpointed")),
        ("exchanged, MB", lambda row: f"{4 * row['learned'] / 1e6:.1f}"),
    ])  # fmt: skip


def _efficiency(rows: list[Row]) -> Table:
    def seconds(of: list[Row], processes: int) -> float:
        return middle(row["seconds"] for row in of if row["processes"] == processes)

    return listed("Measured", grouped(rows, "family"), [
        ("family", lambda of: of[0]["family"]),
        ("one process, s", lambda of: f"{seconds(of, 1):.2f}"),
        ("two, s", lambda of: f"{seconds(of, 2):.2f}"),
        ("efficiency", lambda of: f"{seconds(of, 1) / (2 * seconds(of, 2)):.0%}"),
        ("exchanged by a segment, MB", lambda of: f"{of[0]['exchanged'] / 1e6:.2f}"),
    ])  # fmt: skip


if __name__ == "__main__":
    _work(*sys.argv[1:])
