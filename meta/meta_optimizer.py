"""The meta-optimizer: an update rule applied to the hyperparameters of another one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..inner.core.flat import flat_step, initial_slots
from ..inner.core.hyper import Tensors
from ..inner.core.rule import Rule
from ..inner.registry import find_rule
from .estimators import find_estimator
from .reverse.replay import Replay
from .training.coordinates import Coordinates
from .training.estimate import Estimate, Estimator
from .training.outcome import Outcome
from .training.training import Training

# How many losses the recent median is over, and how many of their spreads make an outlier.
_RECENT, _OUTLIER = 11, 5.0
# Of the anchor, per step; and the growth of a cut step per trusted estimate.
_KEPT, _RECOVERY = 0.8, 1.02


@dataclass
class Descent:
    """Where a descent stands: everything needed to go on with it.

    z: coordinates of the next estimate. anchor: a running average of those whose estimate was
    trusted. losses: theirs. refuge: where it goes back to while there is no anchor. steepest: the
    sum of squares of the largest entries of their relative gradients. best: the anchor when the
    median of recent losses was lowest, best_loss. since: how many were trusted since it last went
    back there. scale: the factor by which failures have cut the step.
    """

    z: Tensor
    slots: Tensors
    anchor: Tensor | None = None
    refuge: Tensor | None = None
    losses: list[float] = field(default_factory=list)
    steepest: float = 0.0
    best: Tensor | None = None
    best_loss: float = math.inf
    since: int = 0
    failures: int = 0
    scale: float = 1.0
    carry: Any = None
    outcome: Outcome = Outcome.OK
    reason: str = ""


@dataclass(frozen=True)
class MetaOptimizer:
    """Descends the held-out loss in unconstrained coordinates (logarithms, logits).

    Every metagradient has a training seed of its own, so that the expected loss is descended and
    not one seed's. An estimate is not trusted if training diverged, if the adjoint grew too much on
    its way back (chaos, not a direction: Metz et al. 2021, arXiv:2111.05803), or if the loss
    jumped. Such a step is taken back half the way to the anchor, a running average of trusted
    points, and the next are cut. Losses under different seeds are too noisy to accept or refuse a
    single step by, but where their recent median has risen over its lowest, the descent goes back
    to where that was, with a cut step: the gradient of runs that go well does not see the ones that
    are about to diverge.

    Args:
        estimator: what makes the metagradients.
        rule: any rule of the catalogue. It is given d log(loss) / d coordinate, the share by which
            the loss changes, over the root mean square of its largest entry so far, so that no
            units matter.
        rate: the rule's learning rate at the start, so 0.2 is at most about 20 % of a learning rate
            per step; it falls to 0 with the budget along half a cosine.
        eps: the share of the largest entry below which a coordinate is left to rest; without it
            Adam would march the ones that do not matter as fast as the ones that do.
        beta1, beta2: the rule's, where it has them.
        bound: the most that a coordinate moves along the gradient in one step.
        blow_up: the growth of the adjoint from which on an estimate is not trusted.
        jump: by how much of the recent median a loss must jump, and far out of its spread, for the
            same.
        drift: by how much of itself the recent median may be over its lowest.
        cut: what a failure leaves of the length of the next steps.
        patience: failures in a row that end the descent; one does before anything was trusted where
            no refuge was given.
    """

    estimator: Estimator = field(default_factory=Replay)
    rule: Rule = field(default_factory=lambda: find_rule("adam"))
    rate: float = 0.2
    eps: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    bound: float = 0.5
    blow_up: float = 1e6
    jump: float = 0.5
    drift: float = 0.15
    cut: float = 0.7
    patience: int = 12

    def __post_init__(self) -> None:
        find_estimator(self.estimator)

    def begin(
        self, coordinates: Coordinates, start: Tensors, refuge: Tensors | None = None
    ) -> Descent:
        """A descent about to take its first metagradient at start. refuge: where it may fall back
        to if that one fails.
        """
        z = coordinates.inside(coordinates.free(start))
        slots = initial_slots(self.rule, coordinates.layout, z, self._values(0.0))
        safe = None if refuge is None else coordinates.inside(coordinates.free(refuge))
        return Descent(z, slots, refuge=safe)

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
        note = estimate.note
        if note.outcome is Outcome.NOT_DIFFERENTIABLE:
            descent.outcome, descent.reason = note.outcome, note.reason
        elif why := self._distrust(descent, estimate):
            self._retreat(descent, note.outcome if not estimate.ok else Outcome.NOISY, why)
        else:
            grad = coordinates.pull(z, estimate.grad)
            if bool(grad.any()):
                self._advance(coordinates, descent, estimate.loss, grad, progress)
            else:
                descent.outcome = Outcome.STALLED
                descent.reason = "the metagradient is exactly zero: these hypers change nothing"
        return estimate

    def _distrust(self, descent: Descent, estimate: Estimate) -> str:
        """Why an estimate must not be followed; empty if it may."""
        if not estimate.ok:
            return estimate.note.reason or estimate.note.outcome.sentence
        adjoint = estimate.note.adjoint
        if adjoint is not None and bool(adjoint.max() > self.blow_up * adjoint[-1]):
            return f"the adjoint grew more than {self.blow_up:g} times on its way back"
        recent = descent.losses[-_RECENT:]
        if len(recent) > _RECENT // 2:
            middle = median(recent)
            spread = median(abs(loss - middle) for loss in recent)
            if estimate.loss > middle + max(self.jump * abs(middle), _OUTLIER * spread):
                return f"the loss jumped from about {middle:.3g} to {estimate.loss:.3g}"
        return ""

    def _advance(
        self, coordinates: Coordinates, descent: Descent, loss: float, grad: Tensor, progress: float
    ) -> None:
        z = descent.z
        descent.anchor = z if descent.anchor is None else torch.lerp(z, descent.anchor, _KEPT)
        descent.losses.append(loss)
        descent.failures = 0
        descent.scale = min(1.0, descent.scale * _RECOVERY)
        if self._drifted(descent):
            return
        # A loss may be 0 or cross it, where shares of it mean nothing.
        share = max(abs(loss), 1e-3 * max(map(abs, descent.losses)), 1e-30)
        descent.steepest += float((grad / share).abs().max()) ** 2
        moves = len(descent.losses)
        unit = share * math.sqrt(descent.steepest / moves)
        t = torch.tensor(float(moves), dtype=torch.float64)
        rate = descent.scale * self.rate * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
        moved, descent.slots = flat_step(
            self.rule,
            coordinates.layout,
            z,
            grad / unit,
            descent.slots,
            t,
            self._values(rate),
            loss=z.new_tensor(loss / unit),
        )
        descent.z = coordinates.inside(z + (moved - z).clamp(-self.bound, self.bound))

    def _drifted(self, descent: Descent) -> bool:
        """Whether the recent losses have risen over the lowest there were; if so, it goes back."""
        descent.since += 1
        if descent.since < _RECENT:
            return False
        recent = median(descent.losses[-_RECENT:])
        if recent < descent.best_loss:
            descent.best, descent.best_loss = descent.anchor, recent
        elif descent.best is not None and recent - descent.best_loss > self.drift * abs(recent):
            descent.z = descent.anchor = descent.best
            descent.scale *= self.cut
            descent.since = 0
            return True
        return False

    def _retreat(self, descent: Descent, outcome: Outcome, why: str) -> None:
        descent.failures += 1
        descent.scale *= self.cut
        # To the average and not to the last point, which may itself stand on the edge.
        safe = descent.refuge if descent.anchor is None else descent.anchor
        if safe is None or descent.failures >= self.patience:
            descent.outcome, descent.reason = outcome, why
        else:
            descent.z = torch.lerp(safe, descent.z, 0.5)

    def _values(self, rate: float) -> Tensors:
        own = {"lr": rate, "beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}
        # A rule may be made of several, such as Muon, which has an Adam for what is no matrix.
        roles = {name: hyper.role or name for name, hyper in self.rule.hypers.items()}
        return self.rule.values({n: own[role] for n, role in roles.items() if role in own})
