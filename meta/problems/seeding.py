"""Random draws as functions of a seed: whoever repeats a step draws the same numbers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


def fold_in(*numbers: int) -> int:
    """One 63-bit seed from several numbers, by rounds of SplitMix64 (Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


@contextmanager
def fork_rng(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """torch's global generators seeded inside and as before outside."""
    generators = generators_of(device)
    with preserve_rng(generators):
        # Not torch.manual_seed: it formats a stack trace for every device that is not there.
        for generator in generators:
            generator.manual_seed(seed)
        yield


def generators_of(device: torch.device | None) -> list[torch.Generator]:
    """torch's global generators that draws on a device come from."""
    generators = [torch.default_generator]
    if device is not None and device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    return generators


@contextmanager
def preserve_rng(generators: Iterable[torch.Generator]) -> Iterator[None]:
    """What is drawn inside has not been drawn outside."""
    before = [(generator, generator.get_state()) for generator in generators]
    try:
        yield
    finally:
        for generator, state in before:
            generator.set_state(state)


@contextmanager
def fork_all_rngs(seed: int) -> Iterator[None]:
    """The three global generators that data may be augmented with, seeded inside."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed % 2**32)
    np.random.seed(seed % 2**32)
    try:
        with fork_rng(seed):
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
