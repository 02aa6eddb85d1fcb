"""Schedules of a given shape, a few knobs each, in one vectorized expression.

Sources: Loshchilov & Hutter 2017, arXiv:1608.03983 (cosine, sgdr); Smith & Topin 2019,
arXiv:1708.07120 (one-cycle); Hu et al. 2024, arXiv:2404.06395 (warm-up, stable, decay); Vaswani et
al. 2017, arXiv:1706.03762 (inverse root); Chen et al. 2021, arXiv:2107.04197 (REX).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.hyper import Hyper, Tensors, fraction, positive
from ..core.messages import unknown

_TINY = 1e-6


@dataclass(frozen=True)
class Schedule:
    """name: as it is asked for. knobs(hyper, steps): the declarations that replace the scheduled
    hyper, by suffix. values(i, steps, knobs, hyper): its values at the float64 steps i, shape
    (len(i), *hyper.shape). levels: the knobs that are values of the hyper itself, in its unit and
    granularity; a value given for the hyper is one for them.
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


def sgdr() -> Schedule:
    """Half a cosine from the peak down to `floor` times the peak, again and again: the first takes
    the `period` share of training, every next one `mult` times as many steps, from `gamma` times
    the peak before.

    A restart that moves past a step makes it jump: the derivatives in period and mult are right
    between two such jumps and know nothing of them.
    """

    def values(i: Tensor, steps: int, k: Tensors, hyper: Hyper) -> Tensor:
        first, more = (k["period"] * steps).clamp(min=1), k["mult"] - 1
        level = more.abs() < _TINY
        rise = torch.where(level, 1.0, more)
        cycles = torch.where(level, i / first, torch.log1p(i * rise / first) / torch.log1p(rise))
        # Rounding must not put a restart one step late.
        n = (cycles + 1e-9).floor()
        # The sum of mult**j over j < n; where mult is nearly 1, its series.
        sums = torch.where(
            level, n + n * (n - 1) / 2 * more, torch.expm1(n * torch.log1p(rise)) / rise
        )
        done = (i - first * sums) / (first * k["mult"] ** n)
        down = (1 + torch.cos(torch.pi * done)) / 2
        return _scaled(k["floor"] + (k["gamma"] ** n - k["floor"]) * down, k["peak"])

    jumps = "a restart jumps past steps, of which its derivative knows nothing"
    return Schedule(
        "sgdr",
        lambda hyper, steps: {
            "peak": hyper,
            "period": fraction(0.2, search=(0.02, 1.0), rough=jumps),
            "mult": Hyper(2.0, 1.0, math.inf, "log", search=(1.0, 4.0), rough=jumps),
            "gamma": Hyper(1.0, 0.0, 1.0, "log", search=(0.1, 1.0)),
            "floor": _floor(),
        },
        values,
    )


def inverse_sqrt() -> Schedule:
    """Linear up over the first `warmup` share, then down as one over the root of the step.

    That of Vaswani et al. has a peak of 1 / sqrt(width * warmup * T).
    """

    def values(i: Tensor, steps: int, k: Tensors, hyper: Hyper) -> Tensor:
        turn = (k["warmup"] * steps).clamp(min=1)
        return _scaled(torch.minimum((i + 1) / turn, (turn / (i + 1)).sqrt()), k["peak"])

    return Schedule(
        "inverse_sqrt", lambda hyper, steps: {"peak": hyper, "warmup": fraction(0.1)}, values
    )


def rex() -> Schedule:
    """From the peak down to `floor` times the peak, slowly at first: (1 - i/T) / (1 - i/2T)."""

    def values(i: Tensor, steps: int, k: Tensors, hyper: Hyper) -> Tensor:
        down = (1 - i / steps) / (1 - i / (2 * steps))
        return _scaled(k["floor"] + (1 - k["floor"]) * down, k["peak"])

    return Schedule("rex", lambda hyper, steps: {"peak": hyper, "floor": _floor()}, values)


def step_decay(stages: int = 3) -> Schedule:
    """Equally long stages, each at `gamma` times the value of the one before.

    Their number is no knob: it has no derivative.
    """
    if stages < 2:
        raise ValueError(f"step_decay needs at least 2 stages, not {stages}; use 'constant' for 1")
    return Schedule(
        f"step_decay:{stages}",
        lambda hyper, steps: {"peak": hyper, "gamma": Hyper(0.1, 0.0, 1.0, "log", (1e-3, 1.0))},
        lambda i, steps, k, hyper: _scaled(k["gamma"] ** (i * stages / steps).floor(), k["peak"]),
    )


def exponential() -> Schedule:
    """By the same factor at every step, from the peak down to `floor` times the peak."""
    return Schedule(
        "exponential",
        lambda hyper, steps: {"peak": hyper, "floor": Hyper(0.01, 0.0, 1.0, "log", (1e-5, 1.0))},
        lambda i, steps, k, hyper: _scaled(k["floor"] ** (i / steps), k["peak"]),
    )


__all__ = [
    "Schedule",
    "constant",
    "cosine",
    "exponential",
    "inverse_sqrt",
    "linear_warmup",
    "one_cycle",
    "polynomial",
    "rex",
    "sgdr",
    "step_decay",
    "warmup_stable_decay",
]
