"""The meta-optimizer: an update rule applied to the hyperparameters of another one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..inner.flat import flat_step, initial_slots
from ..inner.hyper import Tensors
from ..inner.rule import Rule
from ..inner.rules import find_rule
from .coordinates import Coordinates
from .estimate import Estimate, Estimator
from .outcome import Outcome
from .replay import Replay
from .training import Training


@dataclass
class Descent:
    """Where a descent stands: everything needed to go on with it.

    z: coordinates of the next estimate. trusted: the last ones whose metagradient could be used.
    scale: the factor by which failures have cut the step.
    """

    z: Tensor
    slots: Tensors
    trusted: Tensor | None = None
    moves: int = 0
    failures: int = 0
    scale: float = 1.0
    carry: Any = None
    outcome: Outcome = Outcome.OK
    reason: str = ""


@dataclass(frozen=True)
class MetaOptimizer:
    """Descends the held-out loss in unconstrained coordinates (logarithms, logits).

    rule: any rule of the catalogue, by default Adam, whose step does not depend on the scale of the
    gradient. rate: its learning rate at the start, in coordinates, so 0.2 is about 20 % of a
    learning rate per step; it falls to 0 with the budget along half a cosine. bound: the most that
    a coordinate moves in one step. blow_up: an adjoint that grows more than this over training
    is chaos, not a direction (Metz et al. 2021, arXiv:2111.05803).

    Every metagradient has a training seed of its own, so that the expected loss is descended and
    not one seed's. A training that diverges, or whose metagradient blows up, sends the descent back
    to the last trusted point and cuts the step to `cut` of what it was; only when `patience`
    failures in a row leave no step to cut does it give up.
    """

    estimator: Estimator = field(default_factory=Replay)
    rule: Rule = field(default_factory=lambda: find_rule("adam"))
    rate: float = 0.2
    bound: float = 0.5
    beta1: float = 0.9
    beta2: float = 0.99
    blow_up: float = 1e6
    cut: float = 0.5
    patience: int = 12

    def begin(self, coordinates: Coordinates, start: Tensors) -> Descent:
        """A descent about to take its first metagradient at start."""
        z = coordinates.inside(coordinates.free(start))
        return Descent(z, initial_slots(self.rule, coordinates.layout, z, self._values(0.0)))

    def step(
        self,
        training: Training,
        coordinates: Coordinates,
        descent: Descent,
        *,
        seed: int,
        progress: float,
    ) -> Estimate:
        """One metagradient and one move, in place; progress is the share of the budget spent."""
        z = descent.z
        estimate, descent.carry = self.estimator(
            training, coordinates.point(z), descent.carry, seed=seed
        )
        grad = coordinates.pull(z, estimate.grad) if estimate.ok else torch.zeros_like(z)
        if estimate.note.outcome is Outcome.NOT_DIFFERENTIABLE:
            descent.outcome, descent.reason = estimate.note.outcome, estimate.note.reason
        elif not estimate.ok or self._chaotic(estimate):
            self._retreat(descent, estimate)
        elif not bool(grad.any()):
            descent.outcome = Outcome.STALLED
            descent.reason = "the metagradient is exactly zero: these hypers do not move the loss"
        else:
            self._advance(coordinates, descent, estimate, grad, progress)
        return estimate

    def _advance(
        self,
        coordinates: Coordinates,
        descent: Descent,
        estimate: Estimate,
        grad: Tensor,
        progress: float,
    ) -> None:
        z = descent.trusted = descent.z
        descent.failures = 0
        descent.scale = min(1.0, descent.scale / self.cut**0.25)
        descent.moves += 1
        t = torch.tensor(float(descent.moves), dtype=torch.float64)
        rate = descent.scale * self.rate * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
        moved, descent.slots = flat_step(
            self.rule, coordinates.layout, z, grad, descent.slots, t, self._values(rate)
        )
        descent.z = coordinates.inside(z + (moved - z).clamp(-self.bound, self.bound))

    def _retreat(self, descent: Descent, estimate: Estimate) -> None:
        descent.failures += 1
        descent.scale *= self.cut
        kind = Outcome.NOISY if estimate.ok else estimate.note.outcome
        why = estimate.note.reason or "the adjoint blew up on its way back through training"
        if descent.trusted is None or descent.failures >= self.patience:
            descent.outcome, descent.reason = kind, why
        if descent.trusted is not None:
            # Part of the way back each time: the last move is what went wrong.
            descent.z = torch.lerp(descent.trusted, descent.z, self.cut)

    def _chaotic(self, estimate: Estimate) -> bool:
        adjoint = estimate.note.adjoint
        return adjoint is not None and bool(adjoint.max() > self.blow_up * adjoint[-1])

    def _values(self, rate: float) -> Tensors:
        own = {"lr": rate, "beta1": self.beta1, "beta2": self.beta2}
        return self.rule.values({name: v for name, v in own.items() if name in self.rule.hypers})
