"""A contract: properties by name, each checked by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple


class Check(NamedTuple):
    """name: of the property. run: raises where it does not hold. remedy: what to do then."""

    name: str
    run: Callable[[], None]
    remedy: str


def run_checks(of: str, checks: Iterable[Check]) -> None:
    """Raise AssertionError at the first property of a thing that does not hold.

    Args:
        of: what the thing is called.
        checks: its contract.
    """
    for check in checks:
        try:
            check.run()
        except Exception as error:
            said = str(error).strip() or type(error).__name__
            raise AssertionError(
                f"{of} breaks its contract: {check.name}. {said}\nWhat to do: {check.remedy}"
            ) from error


__all__ = ["Check", "run_checks"]
