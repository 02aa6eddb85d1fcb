"""Implicit differentiation: the hypergradient at an optimum of the training loss.

With f the training loss, F the held-out loss and grad f(w, hypers) = 0,
d F / d hypers = dF/dhypers - d<df/dw, q>/dhypers, where q solves H q = dF/dw and H is the Hessian
of f. Larsen et al. 1996; Bengio 2000, doi:10.1162/089976600300015187; Lorraine, Vicol & Duvenaud
2020, arXiv:1911.02590.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..inner.hyper import Tensors
from .estimate import Estimate, Note, finished
from .linear import Solve, conjugate_gradient
from .outcome import Outcome
from .training import Resolved, State, Training


class Reached(NamedTuple):
    """Where a training ended, for the next one to go on from. steps: done since the start."""

    state: State
    steps: int


@dataclass(frozen=True)
class Implicit:
    """The gradient of the held-out loss at the optimum that training leads to.

    Only hypers of the training loss move that optimum; others in the point raise ValueError. The
    answer is that of the optimum and not of `training.steps` steps: its error is of the order of
    note.inner_gradient, the gradient's norm where 0 is assumed. Memory does not grow with steps.

    batches: the Hessian is that of the mean loss over so many batches, those that training would
    draw next. tolerance: a larger residual of the solve is NOISY, not used. warm_start: go on from
    where the last call ended, its optimizer state included, so that few steps follow small moves.
    Buffers are constants here: the path through batch norm's running statistics is left out.
    """

    solve: Solve = field(default_factory=conjugate_gradient)
    batches: int = 1
    warm_start: bool = False
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ValueError(f"batches={self.batches} leaves no loss to differentiate; give >= 1")

    def __call__(
        self, training: Training, point: Tensors, carry: Reached | None = None, *, seed: int
    ) -> tuple[Estimate, Reached | None]:
        _check_point(training, point)
        resolved = training.resolve({name: value.detach() for name, value in point.items()})
        done = carry.steps if carry else 0
        state = training.run(resolved, seed, start=carry.state if carry else None, done=done)
        done += training.steps
        if state is None:
            reason = f"the weights stopped being finite within {done} steps"
            return Estimate.diverged(training.steps, reason), None
        carry = Reached(state, done) if self.warm_start else None
        return self._at(training, resolved, state, list(point), done, seed), carry

    def _at(
        self,
        training: Training,
        resolved: Resolved,
        state: State,
        names: list[str],
        done: int,
        seed: int,
    ) -> Estimate:
        values = resolved.at(training.steps - 1)
        leaves = {name: values[name].clone().requires_grad_() for name in names}
        weights = state.p.detach().requires_grad_()
        state, values = state._replace(p=weights), values | leaves

        loss = training.outer_loss(state, values)
        if not loss.requires_grad:
            reason = f"the held-out loss of {training.problem.name} has no graph to the parameters"
            return Estimate(
                float(loss), {}, Note(Outcome.NOT_DIFFERENTIABLE, reason, training.steps)
            )
        v, *direct = _grad(loss, [weights, *leaves.values()])
        ahead = range(done, done + self.batches)
        inner = torch.stack([training.inner_loss(state, values, i, seed)[0] for i in ahead]).mean()
        (g,) = torch.autograd.grad(inner, weights, create_graph=True)
        solved = self.solve(lambda x: _grad(g, [weights], x)[0], v)
        note = Note(
            steps=training.steps, residual=solved.residual, inner_gradient=float(g.detach().norm())
        )
        if not solved.residual <= self.tolerance:
            return Estimate(float(loss.detach()), {}, _unsolved(note, self.tolerance))
        mixed = _grad(g, list(leaves.values()), solved.x)
        grad = {n: d - m for n, d, m in zip(names, direct, mixed, strict=True)}
        return finished(loss.detach(), grad, note)


def _check_point(training: Training, point: Tensors) -> None:
    learnable = [name for name in training.problem.hypers if name not in training.schedules]
    for name in point:
        base = name.partition(".")[0]
        if base in learnable and name == base:
            continue
        whose = (
            f"a knob of the schedule of {base}"
            if base in training.schedules
            else f"a hyperparameter of {training.rule.name}"
        )
        raise ValueError(
            f"{name} is {whose}: it does not move the optimum of the training loss, so implicit "
            "differentiation cannot see it; differentiate training itself with Replay "
            f"(method='replay'), or learn only {', '.join(learnable) or 'hypers of the loss'}"
        )


def _grad(output: Tensor, inputs: list[Tensor], weight: Tensor | None = None) -> list[Tensor]:
    if not output.requires_grad:  # Constant in all inputs, which autograd calls an error.
        return [torch.zeros_like(x) for x in inputs]
    return list(
        torch.autograd.grad(
            output, inputs, weight, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    )


def _unsolved(note: Note, tolerance: float) -> Note:
    reason = (
        f"the Hessian's linear solve ended at residual {note.residual:.3g}, above {tolerance:g}"
        if note.residual != float("inf")
        else "the linear solve failed (residual inf): the Hessian of the training loss is not "
        "positive definite there, or the solver's step size is too large"
    )
    return Note(Outcome.NOISY, reason, note.steps, None, note.residual, note.inner_gradient)


__all__ = ["Implicit", "Reached"]
