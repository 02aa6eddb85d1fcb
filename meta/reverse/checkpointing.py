"""Which states of a chain of steps are kept, so that it can be gone back through.

Going back needs every state once, the last first; one that is not kept is made again from the
nearest kept one before it. Griewank & Walther 2000, Algorithm 799, doi:10.1145/347837.347846 (the
fewest steps for a number of states); Wang, Moin & Iaccarino 2009, doi:10.1137/080727890, and Stumm
& Walther 2010, doi:10.1137/080742439 (the same without knowing the number of steps beforehand).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from math import comb
from numbers import Integral
from typing import Generic, TypeVar

from ...inner.core.messages import unknown
from .state_store import Store, find_store

S = TypeVar("S")


@dataclass(frozen=True)
class CheckpointPlan:
    """Which states are kept.

    slots: how many at once, besides the one at hand. let_go(kept, hand, steps): which of the
    kept steps, or of the state at hand after them, is forgotten when the next one arrives, if any.
    foresight: whether steps must be known by then; it is None where it is not.
    """

    slots: int
    let_go: Callable[[Sequence[int], int, int | None], int | None]
    foresight: bool = False


def keep_all() -> CheckpointPlan:
    """Every state; nothing is done again."""
    return every(1)


def every(k: int) -> CheckpointPlan:
    """Every k-th state; going back, all of a segment at once: steps / k + k states, and each step
    done at most once more. The fewest states for k = √steps.
    """
    _check_count("every", "k", k)
    return CheckpointPlan(sys.maxsize, lambda kept, hand, steps: hand if hand % k else None)


def revolve(slots: int) -> CheckpointPlan:
    """The states from which a known number of steps is reversed in fewest: `revolve_steps`."""
    _check_count("revolve", "slots", slots)

    def let_go(kept: Sequence[int], hand: int, steps: int | None) -> int | None:
        if not kept:
            return None
        if len(kept) == slots or steps is None:
            return hand
        next_one = kept[-1] + _stride(steps - kept[-1], slots - len(kept) + 1)
        return None if hand == next_one else hand

    return CheckpointPlan(slots, let_go, foresight=True)


def online(slots: int) -> CheckpointPlan:
    """States kept without knowing when training ends: whenever it does, they reverse it in few.

    In `revolve_steps` and no more if that is at most (slots + 1)(slots + 2) / 2 + 1 steps. After
    that in at most 7 % more, with two slots 14 %: measured for up to 8000 steps and 32 slots, not
    proved. Choosing costs a few microseconds per slot and step.
    """
    _check_count("online", "slots", slots)

    def let_go(kept: Sequence[int], hand: int, steps: int | None) -> int | None:
        if len(kept) < slots:
            return None
        # The one whose loss costs least if training ends with the state that arrives. Of equals
        # the first: so early gaps are filled up before later ones, which keeps to the optimum
        # for as long as no step need be done more than twice.
        marks = [*kept, hand, hand + 1]
        gaps = [after - before for before, after in pairwise(marks)]
        # A gap with j states before it and one at its start is reversed in slots - j slots, and
        # in one more after one of these is gone.
        here = [revolve_steps(gap, slots - j) for j, gap in enumerate(gaps[:-1])]
        moved = [revolve_steps(gap, slots - j + 1) for j, gap in enumerate(gaps)]
        left = list(accumulate(here, initial=0))
        right = list(accumulate(reversed(moved), initial=0))[::-1]
        costs = [
            left[j - 1] + revolve_steps(gaps[j - 1] + gaps[j], slots - j + 1) + right[j + 1]
            for j in range(1, len(gaps))
        ]
        return marks[1 + costs.index(min(costs))]

    return CheckpointPlan(slots, let_go)


def find_checkpoint_plan(spec: str | int) -> CheckpointPlan:
    """The plan of "all", "every:K", "revolve:S", "online:S" or, for revolve, the number S."""
    if spec == "all":
        return keep_all()
    match = re.fullmatch(r"(?:(\w+):)?(-?\d+)", str(spec).strip())
    plans = {"every": every, "revolve": revolve, "online": online}
    if match and (match[1] or "revolve") in plans:
        return plans[match[1] or "revolve"](int(match[2]))
    known = ["all", *(f"{name}:N" for name in plans)]
    raise ValueError(f"{unknown('there is no plan', str(spec), known)}; or give a number of states")


@lru_cache(maxsize=2**16)
def revolve_steps(steps: int, slots: int) -> int:
    """The fewest steps that reverse so many with so many states kept, the first among them.

    Counts the first sweep, but the last step of a sweep never: its pullback does it.
    """
    _check_count("revolve", "slots", slots)
    sweeps = _sweeps(steps, slots)
    return sweeps * steps - comb(slots + sweeps, slots + 1)


def _sweeps(steps: int, slots: int) -> int:
    """How often the step done most often is, at the least: C(slots + sweeps, slots) >= steps."""
    if slots == 1:
        return max(steps - 1, 0)
    sweeps, reach = 0, 1
    while reach < steps:
        sweeps += 1
        reach = reach * (slots + sweeps) // sweeps
    return sweeps


@lru_cache(maxsize=2**16)
def _stride(steps: int, slots: int) -> int:
    """How far on the next state is kept, the one before these steps being the first in a slot."""
    sweeps = _sweeps(steps, slots)
    # Between this and a larger number everything costs the same; the shortest writes less.
    fewest = comb(slots + sweeps - 2, slots)
    return max(1, fewest, steps - comb(slots + sweeps - 1, slots - 1))


def _check_count(plan: str, name: str, value: int) -> None:
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}={value!r} of {plan} is not a count; give a whole number from 1")


class Checkpoints(Generic[S]):
    """The kept states of one sweep forth, and the way back through all of them.

    Besides the kept states there is one at hand: forth the latest, back the one being used.
    steps: the number that will be offered, for a plan that must know.
    """

    def __init__(self, plan: CheckpointPlan, store: Store[S], steps: int | None = None) -> None:
        if plan.foresight and steps is None:
            raise ValueError("steps=None, but revolve must know them from the start; use online")
        self.recomputed = 0
        """Steps done again so far."""
        self.peak = 0
        """Most states held at once, the one at hand among them where there is a slot for it."""
        self._plan, self._store, self._steps = plan, store, steps
        self._kept: list[int] = []
        self._handles: list[int] = []
        self._hand: S | None = None
        self._offered = 0

    def offer(self, i: int, state: S) -> None:
        """The state before step i; from 0 on, each once. Whether it is kept turns out later."""
        if i != self._offered:
            raise ValueError(
                f"state {i} is offered where {self._offered} is next; offer them in order, each "
                "before its step"
            )
        if self._steps is not None and i >= self._steps:
            raise ValueError(
                f"state {i} is offered after all of steps={self._steps}; name more steps, or use "
                "online"
            )
        if self._hand is not None:
            self._decide(i - 1, self._hand)
        self._hand, self._offered = state, i + 1
        self._count()

    def backwards(self, steps: int, advance: Callable[[int, S], S]) -> Iterator[tuple[int, S]]:
        """(i, state before step i) from the last to the first; once.

        advance(i, state) does step i again.
        """
        if steps != self._offered:
            raise ValueError(
                f"backwards over {steps} steps where {self._offered} states were offered; offer "
                "one before every step, and go back once"
            )
        self._offered = 0
        return self._back(steps, advance)

    def _back(self, steps: int, advance: Callable[[int, S], S]) -> Iterator[tuple[int, S]]:
        if self._hand is not None:
            state, self._hand = self._hand, None
            yield steps - 1, state
        for i in reversed(range(steps - 1)):
            at, state = self._kept[-1], self._store.get(self._handles[-1])
            while at < i:
                free = min(self._plan.slots - len(self._kept), i - at)
                goal = at + _stride(i + 1 - at, free + 1)
                for j in range(at, goal):
                    state = advance(j, state)
                self.recomputed += goal - at
                at = goal
                if at < i:
                    self._keep(at, state)
            if self._kept[-1] == i:
                self._drop(-1)
            self._count()
            yield i, state

    def _decide(self, hand: int, state: S) -> None:
        gone = self._plan.let_go(self._kept, hand, self._steps)
        if gone == hand:
            return
        if gone is not None:
            self._drop(self._kept.index(gone))
        self._keep(hand, state)

    def _keep(self, i: int, state: S) -> None:
        self._handles.append(self._store.put(state))
        self._kept.append(i)

    def _drop(self, index: int) -> None:
        self._kept.pop(index)
        self._store.drop(self._handles.pop(index))

    def _count(self) -> None:
        self.peak = max(self.peak, min(len(self._kept) + 1, self._plan.slots))


__all__ = [
    "CheckpointPlan",
    "Checkpoints",
    "every",
    "find_checkpoint_plan",
    "find_store",
    "keep_all",
    "online",
    "revolve",
    "revolve_steps",
]
