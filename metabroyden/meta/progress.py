"""Progress bars where rich is installed and somebody wants them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from metabroyden.meta.trainer import Progress


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
