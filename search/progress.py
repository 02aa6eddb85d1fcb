"""Progress on the terminal, unless the caller watches for themselves."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .run_log import Event

_LINE_SECONDS = 5.0


@contextmanager
def watching(progress: bool | Callable[[Event], None]) -> Iterator[Callable[[Event], None]]:
    """A watcher from tune's progress argument: True draws a bar, or lines where no terminal is."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda event: None
    elif sys.stderr.isatty():
        with _bar() as watch:
            yield watch
    else:
        yield _Lines()


class _Lines:
    """A line on standard error every few seconds."""

    def __init__(self) -> None:
        self._count, self._next = 0, time.monotonic() + _LINE_SECONDS

    def __call__(self, event: Event) -> None:
        self._count += 1
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _LINE_SECONDS
            share = min(event.progress, 1.0)
            print(f"{event.route}: {share:.0%}, {_told(self._count, event)}", file=sys.stderr)


def _told(count: int, event: Event) -> str:
    return f"{count} evaluations, loss {event.loss:.4f}, best {event.best:.4f}"


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
        counted = itertools.count(1)

        def watch(event: Event) -> None:
            told = _told(next(counted), event)
            share = min(event.progress, 1.0)
            bar.update(task, description=event.route, completed=share, told=told)

        yield watch
