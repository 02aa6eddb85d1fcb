"""Schedules: a hyperparameter as a function of the step, with knobs of its own.

A schedule turns one hyperparameter into the values it takes at steps 0 … T-1, differentiable in
every knob. Rules never see a schedule, only the value in force. Here are those of any shape, given
point by point, and the registry of all; inner/schedules/shapes.py has those of a given shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.catalogue import Catalogue
from ..core.hyper import Hyper, Tensors
from ..core.messages import unknown
from .shapes import (
    Schedule,
    constant,
    cosine,
    exponential,
    inverse_sqrt,
    linear_warmup,
    one_cycle,
    polynomial,
    rex,
    sgdr,
    step_decay,
    warmup_stable_decay,
)


def piecewise(knots: int = 16) -> Schedule:
    """Straight lines between equally spaced knots, in the hyper's coordinate (log for rates)."""
    if knots < 2:
        raise ValueError(f"piecewise needs at least 2 knots, not {knots}; use 'constant' for one")

    def values(i: Tensor, steps: int, k: Tensors, hyper: Hyper) -> Tensor:
        at = i / max(steps - 1, 1) * (knots - 1)
        left = at.floor().clamp(max=knots - 2)
        share = _column(at - left, k["knots"])
        free = hyper.free(k["knots"])
        # Only knots a step needs are touched: a product with a (steps, knots) matrix would let one
        # knot at 0 (log: -inf) turn all of them into NaN.
        lower, upper = free[left.long()], free[left.long() + 1]
        # 0 lies at -inf on a log scale: no line leads there, so it holds up to the next knot.
        rise = torch.where(lower.isinf() | upper.isinf(), 0.0, upper - lower)
        return hyper.value(lower + share * rise)

    return Schedule(
        f"piecewise:{knots}",
        lambda hyper, steps: {"knots": hyper.shaped(knots, *hyper.shape)},
        values,
        levels=("knots",),
    )


def _column(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(-1, *[1] * (like.ndim - 1))


def free() -> Schedule:
    """A value of its own for every step."""
    return Schedule(
        "free",
        lambda hyper, steps: {"steps": hyper.shaped(steps, *hyper.shape)},
        lambda i, steps, k, hyper: k["steps"][i.long()],
        levels=("steps",),
    )


SCHEDULES = Catalogue[Callable[..., Schedule]](
    "schedule", 'Every schedule by name: schedules.cosine(), or as text, "piecewise:16".'
)
SCHEDULES |= {
    make.__name__: make
    for make in (
        constant,
        linear_warmup,
        cosine,
        polynomial,
        rex,
        inverse_sqrt,
        exponential,
        step_decay,
        warmup_stable_decay,
        one_cycle,
        sgdr,
        piecewise,
        free,
    )
}


def find_schedule(spec: str | Schedule) -> Schedule:
    """The schedule for a spec such as "cosine" or "piecewise:16"."""
    if isinstance(spec, Schedule):
        return spec
    name, _, argument = spec.partition(":")
    if name not in SCHEDULES:
        raise ValueError(unknown("there is no schedule", name, SCHEDULES))
    make = SCHEDULES[name]
    if not argument:
        return make()
    try:
        return make(int(argument) if argument.removeprefix("-").isdigit() else argument)
    except TypeError as error:
        raise ValueError(f"schedule {spec!r}: {name} cannot take {argument!r}") from error


__all__ = ["SCHEDULES", "Schedule", "constant", "find_schedule", "free", "piecewise"]
