"""The decision between gradient and search: a pure function with its reason in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..inner.core.messages import unknown
from ..meta.meta_optimizer import Descent
from ..meta.training.outcome import Outcome
from .space import SEARCHABLE, Space

Route = Literal["gradient", "search"]
ROUTES = ("auto", "gradient", "search")


@dataclass(frozen=True)
class Decision:
    """The route to take and why."""

    route: Route
    reason: str


def choose_route(space: Space, asked: str = "auto") -> Decision:
    """Before anything has run: what the space itself allows."""
    if asked not in ROUTES:
        raise ValueError(unknown("there is no route", asked, ROUTES))
    discrete = ", ".join(
        f"{name} ({type(option).__name__.lower()})" for name, option in space.discrete.items()
    )
    rough = "; ".join(f"{name}: {why}" for name, why in space.rough.items())
    if asked == "gradient" and discrete:
        raise ValueError(
            f"route='gradient' cannot learn {discrete}: there is no gradient; leave it out of "
            "learn or use route='auto'"
        )
    if asked == "gradient" and rough:
        rule = space.training.rule
        smooth = "give smooth=True, " if "smooth" in rule.choices else ""
        raise ValueError(
            f"route='gradient' cannot learn {', '.join(space.rough)} of {rule.name} ({rough}): "
            f"{smooth}leave it out of learn or use route='auto'"
        )
    if asked == "search":
        return Decision("search", "search was asked for")
    if discrete:
        return Decision("search", f"there is no gradient in {discrete}")
    if rough:
        return Decision("search", f"there is no useful gradient in {rough}")
    smooth = f"all {space.size} learned numbers are smooth in the held-out loss"
    return Decision("gradient", f"asked for; {smooth}" if asked == "gradient" else smooth)


def reconsider(descent: Descent, space: Space, asked: str = "auto") -> Decision | None:
    """After a metagradient: the switch to make, or None to go on."""
    if descent.outcome is Outcome.OK:
        return None
    reason = f"{descent.outcome.sentence} ({descent.reason})"
    if asked == "gradient":
        return Decision("gradient", reason)
    if space.size > SEARCHABLE:
        return Decision("gradient", f"{reason}; {space.size} numbers are too many to search")
    return Decision("search", reason)
