"""The one inner loop: steps of a training, done by whoever iterates."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Self

import torch

from ...inner.core.hyper import Tensors
from .outcome import Outcome
from .state import Resolved, State, finite
from .training import Training

# Steps between two looks at the weights, for each of which a GPU waits.
_CHECK_EVERY = 50


class TrainingLoop:
    """Gives (i, the state before step i); the body does the step and sets `state` to the next one.

        with TrainingLoop(state, training.steps) as loop:
            for i, state in loop:
                loop.state = training.step(state, resolved.at(i), i, seed)

    It ends early, its outcome DIVERGED, where weights are no longer finite: seen every 50 steps, at
    the end, and when the body raises, for a model may refuse NaN in any way it likes; what it said
    is then in `reason`. Anything else that is raised goes on. done: the steps begun.
    """

    def __init__(self, state: State, steps: int) -> None:
        self.state, self.steps, self.done = state, steps, 0
        self.outcome, self.reason = Outcome.OK, ""

    @property
    def ok(self) -> bool:
        return self.outcome is Outcome.OK

    def __iter__(self) -> Iterator[tuple[int, State]]:
        for i in range(self.steps):
            self.done = i + 1
            yield i, self.state
            if self.done % _CHECK_EVERY == 0 and not finite(self.state):
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if error is not None and not isinstance(error, Exception):
            return False
        if finite(self.state):
            return False
        said = f" ({type(error).__name__}: {str(error).partition(chr(10))[0]})" if error else ""
        self.outcome = Outcome.DIVERGED
        self.reason = f"the weights stopped being finite by step {self.done}{said}"
        return True


def run_training(
    training: Training,
    resolved: Resolved,
    seed: int,
    *,
    start: State | None = None,
    first: int = 0,
    overwrite: bool = False,
) -> TrainingLoop:
    """Train without a graph; the loop at its end, which holds the state and the outcome.

    Args:
        training: what is trained, `training.steps` steps.
        resolved: the hypers in force.
        seed: of initial weights, batches and draws.
        start: a state to go on from instead of fresh weights, reached after `first` steps.
        first: the number of the first step.
        overwrite: whether the tensors of start may be those of the result.
    """
    if start is None:
        with torch.no_grad():
            start = training.begin(resolved.at(0), seed)
    with TrainingLoop(start, training.steps) as loop:
        for i, state in loop:
            values = resolved.at(i)
            loop.state = training.step(state, values, first + i, seed, overwrite=overwrite)
            overwrite = True  # From here on states are its own.
    return loop


def held_out_curve(
    training: Training, point: Tensors, seed: int, points: int = 25
) -> list[tuple[int, float]]:
    """(step, held-out loss) along training at a point, about `points` of them."""
    every = max(1, training.steps // points)
    resolved = training.resolve(point)
    marks: list[tuple[int, float]] = []

    def mark(i: int, state: State) -> None:
        values = resolved.at(min(i, training.steps - 1))
        marks.append((i, training.measure(state, values, "valid")["loss"]))

    with torch.no_grad():
        start = training.begin(resolved.at(0), seed)
    with TrainingLoop(start, training.steps) as loop:
        for i, state in loop:
            if i % every == 0:
                mark(i, state)
            loop.state = training.step(state, resolved.at(i), i, seed)
        mark(training.steps, loop.state)
    return marks


__all__ = ["TrainingLoop", "held_out_curve", "run_training"]
