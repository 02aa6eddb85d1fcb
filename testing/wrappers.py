"""What every wrapper promises: whatever it wraps is a rule again, and wraps again."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..inner.compose.wrapper import Wrapper
from ..inner.registry import find_rule
from .contracts import Check, run_checks
from .rules import rule_checks

# Of each kind of unit one.
_INSIDE = ("adam", "normalizedsgd", "deltagclip")


def _composes(wrapper: Wrapper, name: str) -> None:
    inner = find_rule(name)
    made = wrapper(inner)
    missing = set(inner.hypers) - set(made.hypers) - set(wrapper.replaces)
    assert not missing, f"around {name} there is no {', '.join(sorted(missing))}"
    missing = set(inner.slots) - set(made.slots)
    assert not missing, f"around {name} there is no slot {', '.join(sorted(missing))}"


def _twice(wrapper: Wrapper) -> None:
    once = wrapper(find_rule("sgd"))
    try:
        twice = wrapper(once)
    except ValueError:  # Two may make no sense, and it says so.
        return
    own = len(once.hypers) - len(find_rule("sgd").hypers)
    assert len(twice.hypers) == len(once.hypers) + own, f"its hypers are {', '.join(twice.hypers)}"


def wrapper_checks(wrapper: Wrapper) -> Iterator[Check]:
    """The contract of a wrapper, a check per property.

    Args:
        wrapper: to be checked.
    """
    for name in _INSIDE:
        yield Check(
            f"around {name} it has all of its hypers and slots",
            partial(_composes, wrapper, name),
            "hand on what the rule inside returns",
        )
    yield Check(
        "around itself its hypers are told apart",
        partial(_twice, wrapper),
        "declare hypers by keyword, so that they can be renamed",
    )
    for check in rule_checks(wrapper(find_rule("adam"))):
        yield check._replace(name=f"around adam {check.name}")


def check_wrapper(wrapper: Wrapper) -> None:
    """Raise AssertionError unless a wrapper holds what every wrapper promises.

    Args:
        wrapper: one of your own, as `hyperdescent.wrapper` makes it.
    """
    run_checks(f"the wrapper {wrapper.name}", wrapper_checks(wrapper))


__all__ = ["check_wrapper", "wrapper_checks"]
