"""A run's folder: what was asked, how far it got, what came out; written so that it survives."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .folder_lock import sole_writer


class RunFolder:
    """settings.json, state.pt, trials.log, result.json and schedule.png of one run.

    Everything is written to a temporary name first and then moved, so that a reader or a resumed
    run sees either the old file or the new one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def journal(self) -> Path:
        return self.path / "trials.log"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @contextmanager
    def claimed(self, settings: dict[str, Any]) -> Iterator[None]:
        """Hold the folder; ValueError if it belongs to a run of other settings."""
        with sole_writer(self.path):
            file = self.path / "settings.json"
            if file.exists() and not (self.path / "state.pt").exists():
                # Nothing was evaluated, so a start that failed or was stopped binds nobody.
                self.journal.unlink(missing_ok=True)
            elif file.exists():
                before = json.loads(file.read_text())
                now = json.loads(json.dumps(settings))
                odd = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
                if odd:
                    told = "; ".join(f"{k} was {before.get(k)!r}, now {now.get(k)!r}" for k in odd)
                    raise ValueError(
                        f"{self.path} holds a run with other settings ({told}); "
                        "give another folder, or the same settings to go on with it"
                    )
            write_text(file, json.dumps(settings, indent=2))
            yield

    def save_state(self, state: dict[str, Any]) -> None:
        """Keep tensors and plain values for `load_state`."""
        partial = self.path / "state.pt.partial"
        torch.save(state, partial)
        os.replace(partial, self.path / "state.pt")

    def load_state(self) -> dict[str, Any] | None:
        """What was saved last, None in a new folder."""
        file = self.path / "state.pt"
        return dict(torch.load(file, weights_only=True)) if file.exists() else None


def write_text(path: Path, text: str) -> None:
    """Replace a file's text in one move."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
