"""What is remembered of a problem for as long as it lives, such as its compiled steps."""

from __future__ import annotations

import weakref
from typing import Any

from ..problems.problem import Problem

_KEPT: dict[int, dict[Any, Any]] = {}


def cache_of(problem: Problem) -> dict[Any, Any]:
    """A dict that lives with the problem, this very object; a new one if it cannot be watched."""
    at = id(problem)
    if at not in _KEPT:
        try:
            weakref.finalize(problem, _KEPT.pop, at, None)
        except TypeError:
            return {}
        _KEPT[at] = {}
    return _KEPT[at]
