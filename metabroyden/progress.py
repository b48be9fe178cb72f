"""Progress bars by rich, curves by TensorBoard; nothing happens if they are not installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Progress = Callable[[int, str], None]
"""Called with the steps done and a few words on how it goes."""
Curves = Callable[[int, dict[str, float]], None]
"""Called with a step and its figures by name."""


@contextmanager
def progress_bar(title: str, total: int, *, show: bool = True) -> Iterator[Progress | None]:
    """A function (step, words) that moves a bar; None where bars are not wanted or cannot be shown.

    They need rich, and in a notebook ipywidgets too.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
    except ImportError:
        show = False
    if not show or (Console().is_jupyter and importlib.util.find_spec("ipywidgets") is None):
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Bar(*columns, TimeRemainingColumn(), TextColumn("{task.fields[words]}")) as bar:
        task = bar.add_task(title, total=total, words="")
        yield lambda step, words: bar.update(task, completed=step, words=words)


def phase(words: str, *, show: bool = True) -> None:
    """A line on standard error about what is done next, where there is no terminal for a bar."""
    if show and not sys.stderr.isatty():
        print(words, file=sys.stderr, flush=True)


@contextmanager
def ticks(title: str, total: int, *, show: bool) -> Iterator[Callable[..., None]]:
    """A function to be called, with a word or none, after each of `total` pieces of work; a bar where it is shown."""
    with progress_bar(title, total, show=show) as bar:
        count = iter(range(1, total + 1))
        yield lambda words="": None if bar is None else bar(next(count), words)


@contextmanager
def tensorboard(folder: Path, begin: int = 0) -> Iterator[Curves | None]:
    """What `MetaTrainer.curves` may be: a TensorBoard log in a folder; None where that is not installed.

    begin: steps made already; what an interrupted run had logged of later ones is hidden.
    """
    if importlib.util.find_spec("tensorboard") is None:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), purge_step=begin + 1 if begin else 0) as writer:

        def note(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield note
