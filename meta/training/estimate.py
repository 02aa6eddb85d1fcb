"""One hypergradient: the value every estimator returns, whatever it is made of."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ...inner.core.hyper import Tensors
from .outcome import Outcome
from .state import State
from .training import Training


@dataclass(frozen=True)
class Note:
    """What else an estimator learned on the way.

    Args:
        outcome: how it ended.
        reason: why, where it did not end well.
        steps: inner steps trained.
        adjoint: norm of d loss / d parameters before each step, shape (steps + 1,), for methods
            that have one; the last is in the weights to use.
        residual: relative residual of a linear solve.
        inner_gradient: norm of the training loss's gradient where an implicit method assumes 0.
        gap: what the held-out loss would change by if training went on to the end, to first order.
        stderr: standard error of every number of the gradient, where it was sampled.
        graphs: steps whose graph was kept, so that they were not done again on the way back.
        states: the most that were kept at once.
        recomputed: steps done again to reach those that were not.
        how: in words, what was kept and whether steps were compiled.
    """

    outcome: Outcome = Outcome.OK
    reason: str = ""
    steps: int = 0
    adjoint: Tensor | None = None
    residual: float | None = None
    inner_gradient: float | None = None
    gap: float | None = None
    stderr: Tensors | None = None
    graphs: int = 0
    states: int = 0
    recomputed: int = 0
    how: str = ""

    def blows_up(self, factor: float = 1e6) -> int | None:
        """The last step before which the adjoint is more than factor times that of the end.

        Going back it is the first: the earlier ones tell of chaos, not of a direction (Metz et al.
        2021, arXiv:2111.05803), and a window behind it leaves them out. None if there is none.
        """
        if self.adjoint is None:
            return None
        beyond = (self.adjoint > factor * self.adjoint[-1]).nonzero()
        return int(beyond[-1]) if len(beyond) else None


@dataclass(frozen=True)
class Estimate:
    """One hypergradient.

    Args:
        loss: the held-out loss.
        grad: its derivative by full hyper name, in the values themselves (not in unconstrained
            coordinates); empty if the outcome is not OK.
        note: what else was learned on the way.
    """

    loss: float
    grad: Tensors
    note: Note = field(default_factory=Note)

    @property
    def ok(self) -> bool:
        return self.note.outcome is Outcome.OK

    @staticmethod
    def diverged(steps: int, reason: str, loss: float = float("inf")) -> Estimate:
        return Estimate(loss, {}, Note(Outcome.DIVERGED, reason, steps))


@runtime_checkable
class Estimator(Protocol):
    """(training, point, carry, seed) -> (estimate, carry); subclass it for one of your own.

    Only the call has to be written. The other methods say what else an estimator can do, and by
    default that is nothing.
    """

    def __call__(
        self, training: Training, point: Tensors, carry: Any = None, *, seed: int
    ) -> tuple[Estimate, Any]:
        """A hypergradient.

        Args:
            training: what is differentiated.
            point: the learned values by full name.
            carry: what the last call gave back, None at the first; a call may use it up.
            seed: of the training.
        """
        ...

    def expecting(self, seconds: float) -> Estimator:
        """The same estimator, told for how long it will be called, where that changes how."""
        return self

    def train_on(
        self, training: Training, point: Tensors, carry: Any, *, steps: int, seed: int
    ) -> tuple[Estimate, Any]:
        """A call that does the next `steps` steps of the one training that carry is in."""
        return self(replace(training, steps=steps), point, carry, seed=seed)

    def state(self, carry: Any) -> State | None:
        """That of the one training which the next call goes on with; None where there is none."""
        return None


class GoingOn(Estimator, Protocol):
    """An estimator whose calls go on with one training, where `carry.state` is."""

    def state(self, carry: Any) -> State | None:
        reached: State | None = carry and carry.state
        return reached


def finished(loss: Tensor, grad: Tensors, note: Note) -> Estimate:
    """An estimate, DIVERGED if any number in it is not finite."""
    bad = [name for name, value in grad.items() if not bool(torch.isfinite(value).all())]
    if not bool(torch.isfinite(loss)):
        return Estimate.diverged(note.steps, "the held-out loss is not finite", float(loss))
    if bad:
        where = f"the metagradient in {', '.join(bad)} is not finite"
        return Estimate(float(loss), {}, replace(note, outcome=Outcome.DIVERGED, reason=where))
    return Estimate(float(loss), grad, note)
