"""Slots: the buffers of optimizer state that a rule declares, and how each begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..numerics.elementwise import at_least_float32
from .layout import Layout

Init = Callable[[Tensor, Mapping[str, Any], Layout], Tensor]


@dataclass(frozen=True)
class Slot:
    """One buffer of optimizer state.

    Args:
        init: (p, values, layout) -> its start, of any shape, from a unit's weights, layout, and
            hypers and options.
        shared: one number for all elements, a function of t only.
    """

    init: Init
    shared: bool = False


def _zeros(p: Tensor, values: Mapping[str, Any], layout: Layout) -> Tensor:
    return torch.zeros_like(p)


zeros = Slot(_zeros)


def _long_zeros(p: Tensor, values: Mapping[str, Any], layout: Layout) -> Tensor:
    return torch.zeros_like(p, dtype=at_least_float32(p.dtype))


# Of a dtype in which what is added up is not lost.
long_zeros = Slot(_long_zeros)


def _weights(p: Tensor, values: Mapping[str, Any], layout: Layout) -> Tensor:
    return p.clone()


# A buffer that starts as a copy of the weights.
weights = Slot(_weights)


def filled_with(name: str) -> Slot:
    """A buffer that starts at the value of the hyperparameter called name."""
    return Slot(partial(_filled_with, name))


def _filled_with(name: str, p: Tensor, values: Mapping[str, Any], layout: Layout) -> Tensor:
    value: Tensor = values[name]
    return torch.zeros_like(p) + value


def shared(number: float) -> Slot:
    """One float64 number that starts the same everywhere; one per element where hypers are that."""
    return Slot(partial(_shared, number), shared=True)


def _shared(number: float, p: Tensor, values: Mapping[str, Any], layout: Layout) -> Tensor:
    hypers = (v for v in values.values() if isinstance(v, Tensor))
    shape = torch.broadcast_shapes(*(v.shape for v in hypers))
    if shape:  # A float64 vector would make float64 weights of others.
        return torch.full(shape, number, dtype=p.dtype, device=p.device)
    return torch.tensor(number, dtype=torch.float64)


def number(start: float = 0.0) -> Slot:
    """One number for a whole unit, a tensor or the model; not of less than float32."""
    return Slot(partial(_number, start))


def _number(start: float, p: Tensor, values: Mapping[str, Any], layout: Layout) -> Tensor:
    return torch.full((), start, dtype=at_least_float32(p.dtype), device=p.device)


def with_shape(shape: Callable[[torch.Size], Sequence[int]]) -> Slot:
    """Zeros of a shape that is a function of the tensor's."""
    return Slot(partial(_with_shape, shape))


def _with_shape(
    shape: Callable[[torch.Size], Sequence[int]],
    p: Tensor,
    values: Mapping[str, Any],
    layout: Layout,
) -> Tensor:
    return p.new_zeros(tuple(shape(p.shape)))


def if_option(option: str, value: object, slot: Slot) -> Slot:
    """A slot of one entry per element that is empty unless an option has a value.

    Args:
        option: the option's name.
        value: the value under which there is a buffer.
        slot: the buffer.
    """
    return Slot(partial(_if_option, option, value, slot.init))


def _if_option(
    option: str, value: object, init: Init, p: Tensor, values: Mapping[str, Any], layout: Layout
) -> Tensor:
    return init(p, values, layout) if values[option] == value else p.new_zeros(0)


__all__ = [
    "Init",
    "Slot",
    "filled_with",
    "if_option",
    "long_zeros",
    "number",
    "shared",
    "weights",
    "with_shape",
    "zeros",
]
