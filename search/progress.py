"""Progress on the terminal, unless the caller watches for themselves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .log import Event


@contextmanager
def watching(progress: bool | Callable[[Event], None]) -> Iterator[Callable[[Event], None]]:
    """A watcher from tune's progress argument: True draws a bar where a terminal shows it."""
    if callable(progress):
        yield progress
    elif progress and sys.stderr.isatty():
        with _bar() as watch:
            yield watch
    else:
        yield lambda event: None


@contextmanager
def _bar() -> Iterator[Callable[[Event], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[told]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("start", total=1.0, told="")
        count = 0

        def watch(event: Event) -> None:
            nonlocal count
            count += 1
            told = f"{count} evaluations  loss {event.loss:.4f}  best {event.best:.4f}"
            bar.update(task, description=event.route, completed=min(event.progress, 1), told=told)

        yield watch
