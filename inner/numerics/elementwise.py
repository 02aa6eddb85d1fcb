"""Elementwise functions whose values or slopes torch's own do not give."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """What sums over many elements are made in."""
    return torch.promote_types(dtype, torch.float32)


def root(x: Tensor) -> Tensor:
    """The square root with slope 0 at 0, where the true slope is infinite.

    A weight that never saw a gradient has second moment 0; the true slope times its zero cotangent
    is NaN. Values are bit-identical to sqrt, negative and NaN inputs included.
    """
    zero = x == 0
    return torch.where(zero, x, torch.where(zero, 1.0, x).sqrt())


def sign(x: Tensor, smooth: bool, temperature: Tensor) -> Tensor:
    """The sign, or a surrogate that has a slope.

    Args:
        x: any tensor.
        smooth: whether to take the surrogate, tanh(x / temperature).
        temperature: the width of the surrogate, in the unit of x.
    """
    return torch.tanh(x / temperature) if smooth else x.sign()


def mask(x: Tensor, smooth: bool, temperature: Tensor) -> Tensor:
    """1 where x > 0 and else 0, or a surrogate that has a slope.

    Args:
        x: any tensor.
        smooth: whether to take the surrogate, sigmoid(x / temperature).
        temperature: the width of the surrogate, in the unit of x.
    """
    return torch.sigmoid(x / temperature) if smooth else (x > 0).to(x)
