"""What is remembered of a problem for as long as it lives, such as its compiled steps."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from .problem import Problem

_KEPT: WeakKeyDictionary[Problem, dict[Any, Any]] = WeakKeyDictionary()


def kept_for(problem: Problem) -> dict[Any, Any]:
    """A dict that lives with the problem; a new one each time if it cannot be a weak key."""
    try:
        return _KEPT.setdefault(problem, {})
    except TypeError:
        return {}
