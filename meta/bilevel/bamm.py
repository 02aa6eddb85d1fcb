"""sl-BAMM: a single loop with one Hessian product, for training losses with many minimisers.

Liu et al. 2023, arXiv:2302.03407.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...inner.core.hyper import Tensors
from ...inner.numerics.pullback import vjp
from ..implicit.inner_solution import (
    apply_gradient,
    check_moves_optimum,
    no_graph,
    no_second_derivative,
)
from ..training.estimate import Estimate, GoingOn, Note, finished
from ..training.loop import TrainingLoop
from ..training.state import Resolved, State
from ..training.training import Training


class BAMMState(NamedTuple):
    """Where the loop is: the weights, the multiplier v, and the steps done."""

    state: State
    v: Tensor
    steps: int


@dataclass(frozen=True)
class BAMM(GoingOn):
    """The gradient of F - <d psi / dy, v> in the hypers, psi = mu F + (1 - mu) f, f the training
    loss and F the held-out one, where v is on its way to the solution of psi's Hessian v = dF/dy.

    Every step of the training is one of v and one of the weights on psi by its rule. mu falls
    slowly, and with it the bias, which is that of F's say in where the weights go. A weight decay
    of the rule is not seen by v: put it into the training loss. Calls go on from the last one; with
    steps=1 it is the paper's algorithm, for which its outer steps must shrink as (steps + 1) **
    -1.5 tau mu^3.

    Args:
        mu0: mu is mu0 (steps + 1) ** -1/p; between 0 and 1.
        p: the larger, the slower mu falls.
        rate: a step of v is rate * (steps + 1) ** -tau/2 long.
        tau: how fast steps of v become shorter; at least 0.
    """

    mu0: float = 0.9
    p: float = 10.0
    rate: float = 0.1
    tau: float = 0.025

    def __post_init__(self) -> None:
        if not 0 < self.mu0 < 1:
            raise ValueError(f"mu0={self.mu0:g} must be between 0 and 1, both excluded")
        for name in ("p", "rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name):g} must be positive")
        if self.tau < 0:
            raise ValueError(f"tau={self.tau:g} must not be negative")

    def __call__(
        self, training: Training, point: Tensors, carry: BAMMState | None = None, *, seed: int
    ) -> tuple[Estimate, BAMMState | None]:
        check_moves_optimum(training, point)
        resolved = training.resolve({name: value.detach() for name, value in point.items()})
        if carry is None:
            with torch.no_grad():
                start = training.begin(resolved.at(0), seed)
            carry = BAMMState(start, torch.zeros_like(start.p), 0)
        try:
            return self._loop(training, resolved, carry, list(point), seed)
        except RuntimeError as error:
            return no_second_derivative(training, error), None

    def _loop(
        self,
        training: Training,
        resolved: Resolved,
        carry: BAMMState,
        names: list[str],
        seed: int,
    ) -> tuple[Estimate, BAMMState | None]:
        v, done = carry.v, carry.steps
        with TrainingLoop(carry.state, training.steps) as loop:
            for i, state in loop:
                step, values = done + i, resolved.at(i)
                mu = self.mu(step)
                leaves = {name: values[name].detach().requires_grad_() for name in names}
                y = state.p.detach().requires_grad_()
                known = values | leaves
                outer = training.outer_loss_at(y, state, known)
                if not outer.requires_grad:
                    return no_graph(training, outer), None
                slope, *direct = vjp([outer], [y, *leaves.values()], [None])
                inner, buffers = training.inner_loss(state._replace(p=y), known, step, seed)
                both = mu * outer + (1 - mu) * inner
                (g,) = torch.autograd.grad(both, y, create_graph=True)
                (curved,) = vjp([g], [y], [v])
                v = v - self.rate * (step + 1) ** (-self.tau / 2) * (curved - slope)
                if i == training.steps - 1:
                    mixed = vjp([g], list(leaves.values()), [v])
                loop.state = apply_gradient(
                    training, state, values, step, g, buffers, loss=both.detach()
                )
        done += training.steps
        if not loop.ok or not bool(v.isfinite().all()):
            reason = f"the weights or the multiplier stopped being finite within {done} steps"
            return Estimate.diverged(training.steps, reason), None
        grad = {n: d - m for n, d, m in zip(names, direct, mixed, strict=True)}
        note = Note(steps=training.steps, how=f"mu {mu:.3g}")
        return finished(outer.detach(), grad, note), BAMMState(loop.state, v, done)

    def mu(self, step: int) -> float:
        """F's share in the loss of a step."""
        return float(self.mu0 * (step + 1) ** (-1 / self.p))


__all__ = ["BAMM"]
