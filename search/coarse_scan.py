"""A scan before the descent: how far off are the rates?

A metagradient says which way to go, and no trusted step is longer than a share of a rate, so from a
rate a hundred times too small a descent spends its budget on the way. A plain training costs a
third of a metagradient and crosses a factor of 4. The scan is the bracketing of a line search
(Nocedal & Wright 2006, section 3.5) along one hyper after the other, those moved by factors; every
point is trained under the same seeds, so that what differs between two of them is the hyper.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..meta.training.specification import levels
from .space import Point, Space

_FACTOR = 4.0
# The share by which a loss must fall to be worth a move: more than rounding.
_NOTICED = 1e-4


def scan(
    space: Space, start: Point, loss_at: Callable[[Point], float], more: Callable[[], bool]
) -> Point:
    """The best point found from start, each hyper on a log scale moved up, or else down, by factors
    of 4 as long as the loss falls, and then by 2 where that is better still. A schedule is moved as
    a whole, and values of any granularity together.

    loss_at(point): the held-out loss, inf where training diverged, always of the same points in the
    same order for the same losses. more(): whether there is time for another.
    """
    best, lowest = start, loss_at(start)
    for names in _lines(space):
        # What diverged has too much of something.
        factors = (1 / _FACTOR, _FACTOR) if math.isinf(lowest) else (_FACTOR, 1 / _FACTOR)
        before = best
        for factor in factors:
            at = best
            while more() and (ahead := _moved(space, at, names, factor)) is not None:
                loss = loss_at(ahead)
                if _lower(loss, lowest):
                    best, lowest = ahead, loss
                elif not math.isinf(loss) or not math.isinf(lowest):
                    break
                at = ahead
            if best is not before:
                break
        if best is before:
            continue
        # Between it and its neighbours: cheaper than what a descent pays for half the way.
        for factor in (_FACTOR**0.5, _FACTOR**-0.5):
            if more() and (near := _moved(space, best, names, factor)) is not None:
                loss = loss_at(near)
                if _lower(loss, lowest):
                    best, lowest = near, loss
                    break
    return best


def _lower(loss: float, lowest: float) -> bool:
    """Whether a loss is worth a move."""
    if math.isinf(lowest):
        return not math.isinf(loss)
    return lowest - loss > _NOTICED * abs(lowest)


def _lines(space: Space) -> list[list[str]]:
    """Which values to move together, in the order in which they are asked for."""
    training = space.training
    bases = dict.fromkeys(name.partition(".")[0] for name in space.learn)
    lines = [
        [name for name in levels(training, base) if name in space.smooth]
        for base in bases
        if base in training.declared
    ]
    return [names for names in lines if names and space.smooth[names[0]].scale == "log"]


def _moved(space: Space, point: Point, names: list[str], factor: float) -> Point | None:
    """The point with the values of names times factor; None if that leaves their range."""
    moved = {name: factor * point.smooth[name] for name in names}
    for name, value in moved.items():
        low, high = space.smooth[name].search
        if bool((value < low).any() | (value > high).any()):
            return None
    return Point(point.smooth | moved, point.discrete)


__all__ = ["scan"]
