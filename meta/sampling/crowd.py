"""Trainings under one seed with points of their own: in one step for all, or one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ...inner.core.hyper import Tensors
from ...inner.torch_internals import Refused
from ..tracing.state_layout import UnevenBatches
from ..training.loop import TrainingLoop
from ..training.state import Resolved, State, finite
from ..training.training import Training
from .batched_steps import BatchedSteps


class Crowd(Protocol):
    """Trainings with points of their own under one seed, stepped together."""

    how: str

    def start(self) -> Any: ...

    def run(self, states: Any, first: int, last: int) -> Any: ...

    def losses(self, states: Any) -> list[float]: ...

    def repeat_first(self, states: Any) -> Any:
        """The first state for all."""
        ...

    def taken_over(self, states: Any) -> Any:
        """States that an earlier crowd left, which may have been of the other kind."""
        ...


A = TypeVar("A")


def together(
    attempt: Callable[[Crowd], A],
    training: Training,
    points: list[Tensors],
    seed: int,
    compile: bool,
) -> tuple[A, str]:
    """(what attempt makes of the trainings, how they were done): together where that can be, one
    after the other where not, from where attempt begins.
    """
    try:
        many = BatchedSteps(training, points, [seed] * len(points), compile)
        # Together their draws would differ, and with them the losses of a pair.
        refused = "its loss draws at random" if many.machine.graph.random else ""
        if not refused:
            together = _Together(many)
            return attempt(together), together.how
    except (Refused, UnevenBatches) as why:
        refused = str(why)
    alone = _OneByOne(training, points, seed, refused)
    return attempt(alone), alone.how


class _Together:
    def __init__(self, many: BatchedSteps) -> None:
        self._many = many
        self.how = f"{many.count} trainings at once"

    def start(self) -> State:
        return self._many.start

    def run(self, states: State, first: int, last: int) -> State:
        return self._many.run(states, first, last)

    def losses(self, states: State) -> list[float]:
        return self._many.losses(states)

    def taken_over(self, states: State | list[State | None]) -> State:
        if isinstance(states, State):
            return states
        raise Refused("its trainings were not done together so far")

    def repeat_first(self, states: State) -> State:
        def first(x: Tensor) -> Tensor:
            return x[:1].expand_as(x).contiguous()

        return State(
            first(states.p),
            {name: first(x) for name, x in states.slots.items()},
            {name: first(x) for name, x in states.buffers.items()},
        )


class _OneByOne:
    def __init__(self, training: Training, points: list[Tensors], seed: int, why: str) -> None:
        self._training, self._seed = training, seed
        self._resolved = [training.resolve(point) for point in points]
        self.how = f"one training after the other: {why}"

    def start(self) -> list[State | None]:
        with torch.no_grad():
            return [self._training.begin(r.at(0), self._seed) for r in self._resolved]

    def run(self, states: list[State | None], first: int, last: int) -> list[State | None]:
        training = self._training

        def go_on(state: State, resolved: Resolved) -> State | None:
            with TrainingLoop(state, last - first) as loop:
                for i, state in loop:
                    values = resolved.at(first + i)
                    loop.state = training.step(state, values, first + i, self._seed)
            return loop.state if loop.ok else None

        return [
            state and go_on(state, resolved)
            for state, resolved in zip(states, self._resolved, strict=True)
        ]

    def losses(self, states: list[State | None]) -> list[float]:
        last = self._training.steps - 1
        found = []
        for state, resolved in zip(states, self._resolved, strict=True):
            loss = math.inf
            if state is not None and finite(state):
                with torch.no_grad():
                    loss = float(self._training.outer_loss(state, resolved.at(last)))
            found.append(loss if math.isfinite(loss) else math.inf)
        return found

    def taken_over(self, states: State | list[State | None]) -> list[State | None]:
        if not isinstance(states, State):
            return states

        def one(each: Tensors, k: int) -> Tensors:
            return {name: x[k] for name, x in each.items()}

        p, slots, buffers = states
        return [State(p[k], one(slots, k), one(buffers, k)) for k in range(len(p))]

    def repeat_first(self, states: list[State | None]) -> list[State | None]:
        return [states[0]] * len(states)


__all__ = ["Crowd", "together"]
