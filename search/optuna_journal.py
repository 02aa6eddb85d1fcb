"""Optuna's journal file, opened by one writer at a time and repaired before the first append.

Optuna appends behind a torn last line (power loss, full disk), after which no reader ever opens
the file again, and a lock left by a killed process blocks the next one for 30 seconds.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.storages import JournalStorage


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
