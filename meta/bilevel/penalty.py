"""F2SA and its relatives: hypergradients from first derivatives by a penalty on the training loss.

Kwon et al. 2023, arXiv:2301.10945; V-PBGD, Shen & Chen 2023, arXiv:2302.05185.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...inner.core.hyper import Tensors
from ..implicit.inner_solution import (
    InnerSolution,
    check_moves_optimum,
    continue_training,
    held_out,
    no_graph,
    partial_in_hypers,
    total,
)
from ..training.estimate import Estimate, Estimator, Note, finished
from ..training.training import Training


class PenaltyState(NamedTuple):
    """Where the trainings of a penalty method ended. calls: how many there were."""

    above: InnerSolution
    below: InnerSolution
    calls: int


@dataclass(frozen=True)
class Penalty(Estimator):
    """The gradient of F(x, y) + penalty (f(x, y) - f(x, z)) in the hypers x, where y is trained on
    F + penalty f, z on f, f is the training loss and F the held-out one.

    For f with one minimiser it tends to the implicit hypergradient with an error of the order of 1
    / penalty. No second derivative, two trainings. Differences of nearly equal numbers are
    multiplied by the penalty: in float32 do not go beyond a thousand. Starting at 0 with a slow
    growth to a limit, and warm, this is V-PBGD.

    Args:
        penalty: at the first call.
        growth: added to it at each call.
        limit: up to which it grows.
        symmetric: train z on penalty f - F, for an error of the order of 1 / penalty^2, where that
            still has a minimum.
        batches: of the training loss, the same for y and z, that the difference is over.
        warm_start: trainings go on from the last call, a few steps at a time.
    """

    penalty: float = 10.0
    growth: float = 0.0
    limit: float = math.inf
    symmetric: bool = False
    batches: int = 1
    warm_start: bool = False

    def __post_init__(self) -> None:
        if self.penalty < 0 or self.growth < 0 or self.limit < self.penalty:
            raise ValueError(
                f"penalty={self.penalty:g} and growth={self.growth:g} must not be negative, and "
                f"limit={self.limit:g} not below the penalty"
            )
        if self.growth and not self.warm_start:
            raise ValueError(
                f"growth={self.growth:g} is from call to call, which needs warm_start=True"
            )
        if self.symmetric and not self.penalty > 1:
            raise ValueError(
                f"symmetric=True trains on penalty f - F, and with penalty={self.penalty:g} F "
                "outweighs f; give a penalty above 1"
            )
        if self.batches < 1:
            raise ValueError(f"batches={self.batches} leaves no loss to differentiate; give >= 1")

    def __call__(
        self, training: Training, point: Tensors, carry: PenaltyState | None = None, *, seed: int
    ) -> tuple[Estimate, PenaltyState | None]:
        check_moves_optimum(training, point)
        calls = carry.calls if carry else 0
        penalty = min(self.limit, self.penalty + calls * self.growth)
        resolved = training.resolve({name: value.detach() for name, value in point.items()})
        # Divided by the sum, or steps would have to shrink as the penalty grows.
        share = {"inner": penalty / (1 + penalty), "outer": 1 / (1 + penalty)}
        above = continue_training(training, resolved, carry and carry.above, seed, **share)
        if self.symmetric:
            share["outer"] = -share["outer"]
            below = continue_training(training, resolved, carry and carry.below, seed, **share)
        else:
            below = continue_training(training, resolved, carry and carry.below, seed)
        if isinstance(above, Estimate):
            return above, None
        if isinstance(below, Estimate):
            return below, None

        values, names = resolved.at(training.steps - 1), list(point)
        loss, slope, direct = held_out(training, above.state, values, names)
        if slope is None:
            return no_graph(training, loss), None
        factor = penalty / 2 if self.symmetric else penalty
        shares = {name: torch.zeros_like(values[name]) for name in names}
        for i in range(above.steps, above.steps + self.batches):
            x, y = (
                partial_in_hypers(training, at.state, values, names, i, seed)
                for at in (above, below)
            )
            for name in names:
                shares[name] += factor / self.batches * (x[name] - y[name])
        note = Note(steps=2 * training.steps, how=f"penalty {penalty:.3g}")
        carry = PenaltyState(above, below, calls + 1) if self.warm_start else None
        return finished(loss, total(direct, shares), note), carry


__all__ = ["Penalty"]
