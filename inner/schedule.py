"""Schedules: a hyperparameter as a function of the step, with knobs of its own.

A schedule turns one hyperparameter into the values it takes at steps 0 … T-1, in one vectorized
expression that is differentiable in every knob. Rules never see a schedule, only the value in
force. Sources: Loshchilov & Hutter 2017, arXiv:1608.03983 (cosine); Smith & Topin 2019,
arXiv:1708.07120 (one-cycle); Hu et al. 2024, arXiv:2404.06395 (warm-up, stable, decay).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .hyper import Hyper, Tensors, fraction, positive
from .rule import unknown

_TINY = 1e-6


@dataclass(frozen=True)
class Schedule:
    """name: as it is asked for. knobs(hyper, steps): the declarations that replace the scheduled
    hyper, by suffix. values(i, steps, knobs, hyper): its values at the float64 steps i, shape
    (len(i), *hyper.shape). levels: the knobs that are values of the hyper itself, in its unit and
    grain; a value given for the hyper is one for them.
    """

    name: str
    knobs: Callable[[Hyper, int], dict[str, Hyper]]
    values: Callable[[Tensor, int, Tensors, Hyper], Tensor]
    levels: tuple[str, ...] = ("peak",)

    def table(self, steps: int, knobs: Tensors, hyper: Hyper) -> Tensor:
        """The value in force at each of the steps, first dimension time."""
        return self.values(torch.arange(steps, dtype=torch.float64), steps, knobs, hyper)


def _scaled(factor: Tensor, peak: Tensor) -> Tensor:
    return factor.reshape(-1, *[1] * peak.ndim) * peak


def constant() -> Schedule:
    """The same value at every step."""
    return Schedule(
        "constant",
        lambda hyper, steps: {"": hyper},
        lambda i, steps, k, hyper: _scaled(torch.ones_like(i), k[""]),
        levels=("",),
    )


def linear_warmup() -> Schedule:
    """Up to the peak in equal steps over the first `warmup` share of training, then constant."""
    return Schedule(
        "linear_warmup",
        lambda hyper, steps: {"peak": hyper, "warmup": fraction(0.1)},
        lambda i, steps, k, hyper: _scaled(_warm(i, steps, k["warmup"]), k["peak"]),
    )


def _warm(i: Tensor, steps: int, warmup: Tensor) -> Tensor:
    # The first step is already one part of the peak: a rate of 0 would waste it.
    return ((i + 1) / (warmup * steps)).clamp(max=1)


def cosine() -> Schedule:
    """Half a cosine from the peak down to `floor` times the peak."""

    def values(i: Tensor, steps: int, k: Tensors, hyper: Hyper) -> Tensor:
        down = (1 + torch.cos(torch.pi * i / steps)) / 2
        return _scaled(k["floor"] + (1 - k["floor"]) * down, k["peak"])

    return Schedule("cosine", lambda hyper, steps: {"peak": hyper, "floor": _floor()}, values)


def _floor() -> Hyper:
    return fraction(0.0, search=(0.0, 0.5))


def polynomial() -> Schedule:
    """From the peak down to `floor` times the peak along (1 - i/T) ** power."""

    def values(i: Tensor, steps: int, k: Tensors, hyper: Hyper) -> Tensor:
        down = (1 - i / steps) ** k["power"]
        return _scaled(k["floor"] + (1 - k["floor"]) * down, k["peak"])

    return Schedule(
        "polynomial",
        lambda hyper, steps: {
            "peak": hyper,
            "power": positive(1.0, search=(0.1, 10.0)),
            "floor": _floor(),
        },
        values,
    )


def warmup_stable_decay(shape: Literal["linear", "cosine", "1-sqrt"] = "linear") -> Schedule:
    """Linear up, flat, then down over the last `decay` share to `floor` times the peak."""
    shapes: dict[str, Callable[[Tensor], Tensor]] = {
        "linear": lambda u: 1 - u,
        "cosine": lambda u: (1 + torch.cos(torch.pi * u)) / 2,
        # 1 - sqrt has an infinite slope at its start; where u = 0 nothing has decayed yet.
        "1-sqrt": lambda u: 1 - torch.where(u > 0, u, 1.0).sqrt() * (u > 0),
    }
    if shape not in shapes:
        raise ValueError(unknown("warmup_stable_decay has no shape", shape, shapes))

    def values(i: Tensor, steps: int, k: Tensors, hyper: Hyper) -> Tensor:
        length = k["decay"] * steps
        down = shapes[shape](((i - (steps - length)) / length).clamp(0, 1))
        down = k["floor"] + (1 - k["floor"]) * down
        return _scaled(_warm(i, steps, k["warmup"]) * down, k["peak"])

    return Schedule(
        f"warmup_stable_decay:{shape}",
        lambda hyper, steps: {
            "peak": hyper,
            "warmup": fraction(0.1),
            "decay": fraction(0.3),
            "floor": _floor(),
        },
        values,
    )


def one_cycle() -> Schedule:
    """Half a cosine up from peak/div over the `up` share, another down to peak/div/final_div."""

    def values(i: Tensor, steps: int, k: Tensors, hyper: Hyper) -> Tensor:
        turn = k["up"] * steps - 1
        # A leg without a step in it has no length to divide by.
        rising = (i / turn.clamp(min=_TINY)).clamp(0, 1)
        falling = ((i - turn) / (steps - 1 - turn).clamp(min=_TINY)).clamp(0, 1)
        start, end = 1 / k["div"], 1 / (k["div"] * k["final_div"])
        up = 1 + (start - 1) / 2 * (1 + torch.cos(torch.pi * rising))
        down = end + (1 - end) / 2 * (1 + torch.cos(torch.pi * falling))
        return _scaled(torch.where(i <= turn, up, down), k["peak"])

    return Schedule(
        "one_cycle",
        lambda hyper, steps: {
            "peak": hyper,
            "up": fraction(0.3, search=(0.05, 0.95)),
            "div": positive(25.0, search=(1.0, 1e3)),
            "final_div": positive(1e4, search=(1.0, 1e6)),
        },
        values,
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


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    make.__name__: make
    for make in (
        constant,
        linear_warmup,
        cosine,
        polynomial,
        warmup_stable_decay,
        one_cycle,
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
