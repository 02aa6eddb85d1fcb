"""Optuna's journal file, opened by one writer at a time and repaired before the first append.

Optuna appends behind a torn last line (power loss, full disk), after which no reader ever opens
the file again, and a lock left by a killed process blocks the next one for 30 seconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.storages import JournalStorage


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold a run's folder; raise BlockingIOError if another process does.

    Where the system has no flock (Windows), a second run is not noticed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / "lock", "a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"{folder} is in use by another run; wait for it or give another folder"
            ) from error
        yield


def open_journal(path: Path) -> JournalStorage:
    """The storage at path; the caller must be its sole writer."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    if path.exists():
        repair(path)
    # As the sole writer, whatever lock is there was left behind by a process that is gone.
    for stale in path.parent.glob(path.name + ".lock*"):
        stale.unlink()
    return JournalStorage(JournalFileBackend(str(path)))


def repair(path: Path) -> None:
    """Cut an unfinished last line off a file of lines."""
    with open(path, "r+b") as file:
        whole = file.read().rfind(b"\n") + 1
        if whole < file.seek(0, os.SEEK_END):
            file.truncate(whole)
