"""Progress bars and tables: by rich where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from metabroyden.meta.trainer import Curves, Progress


@contextmanager
def progress_bar(title: str, total: int, *, show: bool = True) -> Iterator[Progress | None]:
    """A function (step, words) that moves a bar; None where bars are not wanted or rich is missing."""
    try:
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
    except ImportError:
        show = False
    if not show:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Bar(*columns, TimeRemainingColumn(), TextColumn("{task.fields[words]}")) as bar:
        task = bar.add_task(title, total=total, words="")
        yield lambda step, words: bar.update(task, completed=step, words=words)


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, its first column to the left, the others to the right; plain text where rich is missing."""
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        lines = [head, *rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        print(title)
        for line in lines:
            cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
            print("  ".join([line[0].ljust(widths[0]), *cells[1:]]))
        return
    print(title)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    for column, name in enumerate(head):
        table.add_column(name, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    terminal = Console()
    # a file or a notebook has no width of its own
    (terminal if terminal.is_terminal else Console(width=200)).print(table)


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
