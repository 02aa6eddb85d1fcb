"""Budgets of seconds, and the one clock that is charged with them."""

from __future__ import annotations

import re
import time

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(budget: str | float) -> float:
    """A budget such as "60s", "5m", "1.5h" or a number of seconds."""
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", budget)
        if not match or match[2] not in _UNITS:
            raise ValueError(f"budget={budget!r} is not a time; write it as 60s, 5m or 1.5h")
        budget = float(match[1]) * _UNITS[match[2]]
    if not 0 < budget < float("inf"):
        raise ValueError(f"budget={budget:g} seconds is not a positive time")
    return float(budget)


class Clock:
    """Seconds spent of a budget, counting those of earlier sessions of the same run."""

    def __init__(self, budget: float, spent: float = 0.0) -> None:
        self.budget = budget
        self._began = time.monotonic() - spent

    @property
    def spent(self) -> float:
        return time.monotonic() - self._began

    @property
    def left(self) -> float:
        return self.budget - self.spent

    @property
    def progress(self) -> float:
        return self.spent / self.budget
