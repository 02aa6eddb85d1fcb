"""MEHA: a single loop without second derivatives, by the Moreau envelope of the training loss.

Liu et al. 2024, arXiv:2405.09927.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...inner.core.hyper import Tensors
from ..implicit.inner_solution import (
    check_moves_optimum,
    held_out,
    no_graph,
    partial_in_hypers,
    step_along,
    total,
)
from ..training.estimate import Estimate, Estimator, Note, finished
from ..training.loop import TrainingLoop
from ..training.state import State, finite
from ..training.training import Training


class MEHAState(NamedTuple):
    """Where MEHA's loop is: y, the point theta that it is held near, and the steps done."""

    y: State
    theta: State
    steps: int


@dataclass(frozen=True)
class MEHA(Estimator):
    """The gradient of F(x, y) + c (f(x, y) - v(x, y)) in the hypers x, where v(x, y) is the least
    f(x, theta) + |theta - y|^2 / 2 gamma, f the training loss and F the held-out one.

    For training losses that are no more than weakly convex, many minimisers included. Every step of
    the training is a step of y on F / c + f - v and one of theta, both by its rule and learning
    rate. c grows as c0 (steps + 1) ** power, the paper's way (its published code multiplies where
    it should divide). Calls go on from the last one; with steps=1 it is the paper's algorithm.

    Args:
        gamma: of the envelope; the larger, the farther theta may be from y.
        c0: the penalty c at the start.
        power: of its growth, at least 0 and below 1/2; a fixed c leaves a bias of the order of 1 /
            c.
        speed: theta's steps are so many times as long as y's, for it must be faster or both
            diverge.
    """

    gamma: float = 1.0
    c0: float = 2.0
    power: float = 0.25
    speed: float = 1.0

    def __post_init__(self) -> None:
        for name in ("gamma", "c0", "speed"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name):g} must be positive and finite")
        if not 0 <= self.power < 0.5:
            raise ValueError(f"power={self.power:g} must be at least 0 and below 1/2")

    def __call__(
        self, training: Training, point: Tensors, carry: MEHAState | None = None, *, seed: int
    ) -> tuple[Estimate, MEHAState | None]:
        check_moves_optimum(training, point)
        resolved = training.resolve({name: value.detach() for name, value in point.items()})
        if carry is None:
            with torch.no_grad():
                start = training.begin(resolved.at(0), seed)
            carry = MEHAState(start, start, 0)
        theta, done = carry.theta, carry.steps

        with TrainingLoop(carry.y, training.steps) as loop:
            for i, y in loop:
                step, values = done + i, resolved.at(i)
                if step:  # The paper's order: x moves between theta and y.
                    apart, outer = (theta.p - y.p) / self.gamma, 1 / self._c(step)
                    loop.state = step_along(
                        training, y, values, step, seed, outer=outer, pull=apart
                    )
                back = (theta.p - loop.state.p) / self.gamma
                faster = values | {"lr": values["lr"] * self.speed} if "lr" in values else values
                theta = step_along(training, theta, faster, step, seed, pull=back)
        done += training.steps
        y = loop.state
        if not loop.ok or not finite(theta):
            reason = f"the weights stopped being finite within {done} steps"
            return Estimate.diverged(training.steps, reason), None

        values, names, c = resolved.at(training.steps - 1), list(point), self._c(done)
        loss, slope, direct = held_out(training, y, values, names)
        if slope is None:
            return no_graph(training, loss), None
        at_y, at_theta = (
            partial_in_hypers(training, state, values, names, done - 1, seed)
            for state in (y, theta)
        )
        shares = {name: c * (at_y[name] - at_theta[name]) for name in names}
        note = Note(steps=2 * training.steps, how=f"penalty {c:.3g}")
        return finished(loss, total(direct, shares), note), MEHAState(y, theta, done)

    def _c(self, step: int) -> float:
        return float(self.c0 * max(step, 1) ** self.power)


__all__ = ["MEHA"]
