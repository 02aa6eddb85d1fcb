"""Checks and words that errors have in common."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral, Real


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that does not exist: the nearest one first, then all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return f"{what} {name!r};{hint} known: {', '.join(known) or 'none'}"


def check_at_least(name: str, value: object, least: float, *, whole: bool = False) -> None:
    """Raise ValueError unless an option is None or a number from `least` on."""
    number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if value is not None and not (number and value >= least):  # type: ignore[operator]  # a number
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{name}={value!r} must be {kind}, at least {least}, or None for none")
