"""Implicit differentiation of any update rule: where its step no longer moves, or as if it did not.

With s' = step(s, hypers) and s' = s, d F / d hypers = dF/dhypers + J_hypers' x, where
x = J_s' x + dF/ds. Grazzi et al. 2020, arXiv:2006.16218; with few terms and during training,
Clarke, Oldewage & Hernandez-Lobato 2022, arXiv:2110.10461.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...inner.core.hyper import Tensors
from ...inner.numerics.pullback import vjp
from ..training.adjoint import Cotangents, carrying_adjoint, leaf_values, leaves
from ..training.estimate import Estimate, GoingOn, Note, finished
from ..training.state import Resolved
from ..training.training import Training
from .implicit import unsolved, warn_if_far
from .inner_solution import (
    InnerSolution,
    check_moves_optimum,
    continue_training,
    no_graph,
    no_second_derivative,
)

# The one hyper of a rule that moves the point where its steps end.
_DECAY = ("weight_decay",)


@dataclass(frozen=True)
class FixedPoint(GoingOn):
    """The gradient of the held-out loss at the fixed point of the training step.

    The step is the rule's own, slots and moving buffers included, so that decoupled weight decay
    counts as it does in training; other hypers of the rule, of which hardly one moves its fixed
    point, raise ValueError. What the series leaves, note.residual, falls as the step's contraction
    to the power of terms + 1: a map that does not contract, as Adam's with a small eps near an
    exact optimum, has no such series. note.gap: as for Implicit. Every term costs one pass back
    through a step.

    Args:
        terms: of the series.
        tolerance: a larger residual is NOISY, not used.
        warm_start: as for Implicit.
    """

    terms: int = 20
    tolerance: float = 0.1
    warm_start: bool = False

    def __post_init__(self) -> None:
        _check_terms(self.terms)

    def __call__(
        self, training: Training, point: Tensors, carry: InnerSolution | None = None, *, seed: int
    ) -> tuple[Estimate, InnerSolution | None]:
        check_moves_optimum(training, point, also=_DECAY)
        estimate, reached = _estimate(self.terms, training, point, carry, seed, slots=True)
        note = estimate.note
        if note.residual is not None and not note.residual <= self.tolerance:
            estimate = Estimate(estimate.loss, {}, unsolved(note, self.tolerance))
        if not self.warm_start:
            warn_if_far(training, estimate)
        return estimate, reached if self.warm_start else None


@dataclass(frozen=True)
class OnePass(GoingOn):
    """The gradient of the held-out loss as if the weights were at a fixed point of the next step.

    For one training during which hypers move: each call trains `training.steps` steps on from the
    last one and looks `terms` steps back, as if these had all been like the next. So it sees every
    hyper of a step, learning rate and momentum among them, for the price of a few passes back; it
    is biased, by few terms towards what acts soon, by many because earlier steps were not alike.
    Slots are constants. note.residual is what the terms leave; no size of it is refused.
    """

    terms: int = 5

    def __post_init__(self) -> None:
        _check_terms(self.terms)

    def __call__(
        self, training: Training, point: Tensors, carry: InnerSolution | None = None, *, seed: int
    ) -> tuple[Estimate, InnerSolution | None]:
        if training.schedules:
            raise ValueError(
                f"{', '.join(training.schedules)} has a schedule, which would begin anew at every "
                "call of OnePass; leave it out: what is learned on the way is the schedule"
            )
        return _estimate(self.terms, training, point, carry, seed, slots=False)


def _estimate(
    terms: int,
    training: Training,
    point: Tensors,
    carry: InnerSolution | None,
    seed: int,
    *,
    slots: bool,
) -> tuple[Estimate, InnerSolution | None]:
    knobs = {name: value.detach().requires_grad_() for name, value in point.items()}
    resolved = training.resolve(knobs)
    reached = continue_training(training, resolved.detach(), carry, seed)
    if isinstance(reached, Estimate):
        return reached, None
    try:
        return _series(terms, training, resolved, knobs, reached, seed, slots=slots), reached
    except RuntimeError as error:
        return no_second_derivative(training, error), None


def _series(
    terms: int,
    training: Training,
    resolved: Resolved,
    knobs: Tensors,
    reached: InnerSolution,
    seed: int,
    *,
    slots: bool,
) -> Estimate:
    last, sums, plain = training.steps - 1, Cotangents(resolved), resolved.detach()
    values, hypers = leaf_values(plain, last, sums.names)
    # What a step leaves alone, such as frozen weights, has no adjoint.
    still = _still(training, reached, plain.at(last), seed)
    before = leaves(reached.state, still)
    after = training.step(before, values, reached.steps, seed, graph=True)
    ends = carrying_adjoint(after, still) if slots else [after.p]
    starts = carrying_adjoint(before, still) if slots else [before.p]

    loss = training.outer_loss(before, values)
    if not loss.requires_grad:
        return no_graph(training, loss)
    slopes = vjp([loss], [*starts, *hypers], [None])
    first, direct = slopes[: len(starts)], slopes[len(starts) :]

    total = term = first
    for _ in range(terms):
        term = vjp(ends, starts, term)
        total = [x + y for x, y in zip(total, term, strict=True)]
    # By linearity the shares of the hypers, and the residual, are those of the sum.
    found = vjp(ends, [*starts, *hypers], total)
    again, shares = found[: len(starts)], found[len(starts) :]
    left = [b + y - x for x, y, b in zip(total, again, first, strict=True)]
    residual = _norm(left) / max(_norm(first), 1e-300)
    gap = sum(
        float((x * (y - z).detach()).sum()) for x, y, z in zip(total, ends, starts, strict=True)
    )
    how = f"{terms} terms through a step of {training.rule.name}, residual {residual:.1e}"
    note = Note(steps=training.steps, residual=residual, gap=gap, how=how)
    sums.add(last, [x + y for x, y in zip(direct, shares, strict=True)], sums.names)
    return finished(loss.detach(), sums.through(knobs), note)


def _still(training: Training, reached: InnerSolution, values: Tensors, seed: int) -> Tensors:
    """The buffers that a step does not replace."""
    buffers = reached.state.buffers
    if not buffers:
        return {}
    after = training.step(reached.state, values, reached.steps, seed).buffers
    return {name: x for name, x in buffers.items() if after[name] is x}


def _norm(vectors: list[Tensor]) -> float:
    return float(torch.stack([x.double().norm() for x in vectors]).norm())


def _check_terms(terms: int) -> None:
    if terms < 0:
        raise ValueError(f"terms={terms} is negative; it is the number of steps looked back")


__all__ = ["FixedPoint", "OnePass"]
