"""What a run has found so far: every evaluation, the clock, and the folder that outlives it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..inner.core.hyper import Tensors
from ..meta.meta_optimizer import Descent
from ..meta.training.outcome import Outcome
from .budget import Clock
from .run_folder import RunFolder
from .space import SEARCHABLE, Point

_SAVE_EVERY_SECONDS = 1.0
# Points of more numbers than a row repeats: how many of the best stay in memory.
_LARGE_KEPT = 8


@dataclass(frozen=True)
class Event:
    """One evaluation, for whoever watches. progress: share of the budget spent."""

    route: str
    loss: float
    best: float
    progress: float


@dataclass
class Log:
    """rows: one per evaluation, plain values. found: the finite ones as (loss, point). descent:
    the state of the gradient route, if it was taken, and scanned, where that began.
    """

    clock: Clock
    folder: RunFolder | None = None
    watch: Callable[[Event], None] = lambda event: None
    rows: list[dict[str, Any]] = field(default_factory=list)
    found: list[tuple[float, Point]] = field(default_factory=list)
    descent: Descent | None = None
    scanned: Point | None = None
    _saved: float = 0.0

    @property
    def best_loss(self) -> float:
        return min((loss for loss, _ in self.found), default=math.inf)

    def best(self, count: int = 1) -> list[Point]:
        """The points of the lowest losses seen, best first."""
        return [point for _, point in sorted(self.found, key=lambda f: f[0])[:count]]

    def note(self, route: str, loss: float, point: Point, **more: Any) -> None:
        """Keep one evaluation."""
        finite = math.isfinite(loss)
        self.rows.append(
            {
                "route": route,
                "loss": loss if finite else None,
                "seconds": self.clock.spent,
                "point": _readable(point),
                "options": point.discrete,
                **more,
            }
        )
        if finite:
            self.found.append((loss, point))
        if self.rows[-1]["point"] is None:
            self.found = sorted(self.found, key=lambda found: found[0])[:_LARGE_KEPT]
        if time.monotonic() - self._saved > _SAVE_EVERY_SECONDS:
            self.save()
        self.watch(Event(route, loss, self.best_loss, self.clock.progress))

    def save(self) -> None:
        if self.folder:
            self.folder.save_state(
                {
                    "rows": self.rows,
                    "large": [
                        (loss, point.smooth, point.discrete)
                        for loss, point in self.found
                        if _readable(point) is None
                    ],
                    "spent": self.clock.spent,
                    "descent": self.descent and _saved_descent(self.descent),
                }
            )
            self._saved = time.monotonic()

    def resume(self) -> None:
        """Take up what the folder holds."""
        state = self.folder.load_state() if self.folder else None
        if not state:
            return
        self.rows = state["rows"]
        self.clock = Clock(self.clock.budget, state["spent"])
        kept = state["descent"]
        self.descent = kept and Descent(**kept | {"outcome": Outcome(kept["outcome"])})
        self.found = [
            (row["loss"], Point(_tensors(row["point"]), row["options"]))
            for row in self.rows
            if row["loss"] is not None and row["point"] is not None
        ]
        self.found += [(loss, Point(*point)) for loss, *point in state["large"]]


def _saved_descent(descent: Descent) -> dict[str, Any]:
    # A carry is only a warm start and may be anything; it is made again.
    return {**vars(descent), "outcome": str(descent.outcome), "carry": None}


def _readable(point: Point) -> dict[str, Any] | None:
    """The values as lists; None where they are too many to repeat in every row."""
    if sum(value.numel() for value in point.smooth.values()) > SEARCHABLE:
        return None
    return {name: value.tolist() for name, value in point.smooth.items()}


def _tensors(point: dict[str, Any]) -> Tensors:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in point.items()}
