"""Random numbers as a pure function of the step.

What a rule draws is the same on every device, in a traced or a compiled step, in a batch of
trainings, and when the step is done again on the way back.

Counters through the finalizer of MurmurHash3 (Appleby 2011, public domain), which spreads every
bit of its input over all of its output. Not for cryptography.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def uniform(t: Tensor, shape: Sequence[int], *, seed: int = 0, stream: int = 0) -> Tensor:
    """Numbers in (0, 1) in float64 on t's device, other ones for every step, seed and stream.

    Args:
        t: the step, a whole number as float64 holds it.
        shape: of what is returned.
        seed: any whole number.
        stream: to draw several times in one step.
    """
    count = torch.Size(shape).numel()
    # t as float64 holds whole numbers up to 2**53, and so many of 32 bits are enough.
    key = _mixed(t.long() & _MASK)
    key = _mixed((key + seed * 0x9E3779B9 + stream * 0x7F4A7C15) & _MASK)
    index = torch.arange(count, device=t.device)
    bits = _mixed(torch.bitwise_xor(_mixed((index + key) & _MASK), key))
    return ((bits.double() + 0.5) / 2**32).reshape(tuple(shape))


def normal(t: Tensor, shape: Sequence[int], *, seed: int = 0, stream: int = 0) -> Tensor:
    """Standard normal numbers in float64 on t's device, other ones for every step, seed and stream.

    Args:
        t: the step, a whole number as float64 holds it.
        shape: of what is returned.
        seed: any whole number.
        stream: to draw several times in one step.
    """
    quantiles: Tensor = torch.special.ndtri(uniform(t, shape, seed=seed, stream=stream))
    return quantiles


def _mixed(x: Tensor) -> Tensor:
    x = _times(x ^ (x >> 16), 0x85EBCA6B)
    x = _times(x ^ (x >> 13), 0xC2B2AE35)
    return torch.bitwise_xor(x, x >> 16)


def _times(x: Tensor, factor: int) -> Tensor:
    """x * factor modulo 2**32, in halves: signed 64 bits would overflow."""
    low, high = factor & 0xFFFF, factor >> 16
    product = x * low + (((x * high) & 0xFFFF) << 16)
    return torch.bitwise_and(product, _MASK)


__all__ = ["normal", "uniform"]
