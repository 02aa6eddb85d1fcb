"""Hyperparameters as declarations: default, legal values, search range and coordinate.

One declaration feeds the constructor checks of the torch form, the coordinates in which the
meta-optimizer moves, and the range in which Optuna samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Scale = Literal["linear", "log", "logit"]
Granularity = Literal["shared", "tensor", "element"]

_TO_FREE: dict[Scale, Callable[[Tensor], Tensor]] = {
    "linear": lambda v: v,
    "log": torch.log,
    "logit": torch.logit,
}
_TO_VALUE: dict[Scale, Callable[[Tensor], Tensor]] = {
    "linear": lambda z: z,
    "log": torch.exp,
    "logit": torch.sigmoid,
}


@dataclass(frozen=True)
class Hyper:
    """A continuous hyperparameter.

    Args:
        default: its value where none is given.
        low: the least legal value.
        high: the largest, exclusive on the logit scale and where infinite.
        scale: the coordinate in which a unit step means about the same everywhere.
        search: the range in which a tuner moves.
        start: where tuning begins, for a default that its scale cannot represent (0 has no
            logarithm).
        size_power: the start is multiplied by numel**size_power of the tensor it acts on.
        shape: () for one shared number, else one value per knot, tensor or element.
        when: the (option, value) under which it means anything.
        dtype: of its values; torch.float32 halves what tuning holds of a hyper with as many numbers
            as the model.
        rough: why its derivative says little of its effect, where that is so, such as of what
            enters through a sign.
        smoothed: whether it is a guide under a rule's option `smooth`.
        finest: the smallest things that may have a value each.
        role: what it is called in the rule that it is of, where a composed rule calls it otherwise,
            such as "lr" of "aux_lr".
    """

    default: float
    low: float
    high: float
    scale: Scale
    search: tuple[float, float]
    start: float | None = None
    size_power: float = 0.0
    shape: tuple[int, ...] = ()
    when: tuple[str, object] | None = None
    dtype: torch.dtype = torch.float64
    rough: str = ""
    smoothed: bool = True
    finest: Granularity = "element"
    role: str = ""

    def free(self, value: Tensor) -> Tensor:
        """The unconstrained coordinate of a value."""
        return _TO_FREE[self.scale](value)

    def value(self, free: Tensor) -> Tensor:
        """The value at an unconstrained coordinate: the inverse of `free`, legal everywhere."""
        return _TO_VALUE[self.scale](free)

    def box(self) -> tuple[float, float]:
        """The search range in unconstrained coordinates."""
        low, high = (self.free(torch.tensor(edge, dtype=torch.float64)) for edge in self.search)
        return float(low), float(high)

    @property
    def _open(self) -> bool:
        """Whether high itself is illegal."""
        return self.scale == "logit" or math.isinf(self.high)

    def legal(self) -> str:
        """The legal values as an interval."""
        return f"[{self.low:g}, {self.high:g}{')' if self._open else ']'}"

    def check(self, name: str, value: float | Tensor) -> None:
        """Raise ValueError unless every entry of value is legal."""
        values = torch.as_tensor(value, dtype=torch.float64)
        above = values >= self.high if self._open else values > self.high
        illegal = (values < self.low) | above | values.isnan()
        if bool(illegal.any()):
            worst = float(values[illegal].flatten()[0])
            raise ValueError(
                f"{name}={worst:g} is outside {self.legal()}; its default is {self.default:g}"
            )

    def check_start(self, name: str, value: Tensor) -> None:
        """Raise ValueError unless tuning can start at value."""
        self.check(name, value)
        if not bool(self.free(value.double()).isfinite().all()):
            worst = float(value.flatten()[~self.free(value.double()).isfinite().flatten()][0])
            low, high = self.search
            raise ValueError(
                f"{name}={worst:g} has no place on its {self.scale} scale, so tuning cannot start "
                f"there; start inside [{low:g}, {high:g}] or leave {name} out of learn"
            )

    def starting_value(self, sizes: Tensor) -> Tensor:
        """Where tuning begins, of this shape; sizes: the numel of the tensors it acts on, () or
        one per tensor or element.
        """
        base = self.default if self.start is None else self.start
        start = base * sizes.double() ** self.size_power
        return start.to(self.dtype).expand(self.shape).clone()

    def shaped(self, *shape: int) -> Hyper:
        return replace(self, shape=shape)


@dataclass(frozen=True)
class Choice:
    """One of several options.

    Args:
        default: the one in force where none is given.
        options: None, bool, int, float or str each, so that a saved run can hold them.
        when: the (option, value) of another one under which it means anything.
    """

    default: object
    options: tuple[object, ...]
    when: tuple[str, object] | None = None

    def __post_init__(self) -> None:
        for option in (self.default, *self.options):
            if not isinstance(option, bool | int | float | str | None):
                raise TypeError(
                    f"the option {option!r} is a {type(option).__name__}, which a saved run cannot "
                    "hold: options are None, bool, int, float or str; give its name instead and "
                    "look the name up, as in {'relu': nn.ReLU}[activation]"
                )

    def check(self, name: str, value: object) -> None:
        if value not in self.options:
            listed = ", ".join(map(repr, self.options))
            raise ValueError(f"{name}={value!r} is not one of {listed}")


@dataclass(frozen=True)
class Integer:
    """A whole number.

    Args:
        default: its value where none is given.
        low: the least.
        high: the largest, inclusive.
        log: sampled on a log scale.
        when: the (option, value) under which it means anything.
    """

    default: int
    low: int
    high: int
    log: bool = False
    when: tuple[str, object] | None = None

    def check(self, name: str, value: object) -> None:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not self.low <= value <= self.high:  # type: ignore[operator]  # int by now
            raise ValueError(f"{name}={value!r} is not a whole number in [{self.low}, {self.high}]")


Discrete = Choice | Integer


def positive(
    default: float,
    search: tuple[float, float],
    *,
    start: float | None = None,
    size_power: float = 0,
    when: tuple[str, object] | None = None,
    rough: str = "",
    finest: Granularity = "element",
) -> Hyper:
    """A rate or scale in [0, inf), moved by factors: its coordinate is the logarithm.

    Args:
        default: its value where none is given.
        search: the range in which a tuner moves.
        start: where tuning begins, if not at the default, such as for a default of 0.
        size_power: the start is multiplied by numel**size_power of the tensor it acts on.
        when: the (option, value) under which it means anything.
        rough: why its derivative says little of its effect, where that is so.
        finest: the smallest things that may have a value each.
    """
    made = Hyper(default, 0.0, math.inf, "log", search, start, size_power)
    return replace(made, when=when, rough=rough, finest=finest)


def learning_rate(default: float, search: tuple[float, float] = (1e-5, 1.0)) -> Hyper:
    """A rate per step.

    Args:
        default: its value where none is given.
        search: the range in which a tuner moves.
    """
    return positive(default, search)


def decay(
    default: float,
    search: tuple[float, float] = (0.05, 0.99999),
    *,
    start: float | None = None,
    when: tuple[str, object] | None = None,
    rough: str = "",
    finest: Granularity = "element",
) -> Hyper:
    """A kept share in [0, 1): its coordinate is the logit, log(1 - v) up to sign near one.

    Args:
        default: its value where none is given.
        search: the range in which a tuner moves.
        start: where tuning begins, if not at the default, such as for a default of 0.
        when: the (option, value) under which it means anything.
        rough: why its derivative says little of its effect, where that is so.
        finest: the smallest things that may have a value each.
    """
    made = Hyper(default, 0.0, 1.0, "logit", search, start)
    return replace(made, when=when, rough=rough, finest=finest)


def weight_decay(default: float) -> Hyper:
    """A weight decay per unit of learning rate, in [0, inf); tuned from 1e-4 where off."""
    return positive(default, (1e-6, 10.0), start=default or 1e-4)


def fraction(
    default: float,
    search: tuple[float, float] = (0.01, 0.99),
    *,
    when: tuple[str, object] | None = None,
    rough: str = "",
    finest: Granularity = "element",
) -> Hyper:
    """A share in [0, 1] on a linear scale.

    Args:
        default: its value where none is given.
        search: the range in which a tuner moves.
        when: the (option, value) under which it means anything.
        rough: why its derivative says little of its effect, where that is so.
        finest: the smallest things that may have a value each.
    """
    made = Hyper(default, 0.0, 1.0, "linear", search)
    return replace(made, when=when, rough=rough, finest=finest)


def temperature(default: float = 1e-3) -> Hyper:
    """The width of a smooth surrogate for a sign or a mask, in the unit of what it is of."""
    return positive(default, (1e-6, 10.0), when=("smooth", True))


__all__ = [
    "Choice",
    "Discrete",
    "Granularity",
    "Hyper",
    "Integer",
    "Tensors",
    "decay",
    "fraction",
    "learning_rate",
    "positive",
    "temperature",
    "weight_decay",
]
