"""SAMA: an implicit hypergradient from first derivatives alone, a direction and no more.

Choe et al. 2023, arXiv:2310.05674.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...inner.core.hyper import Tensors
from ...inner.numerics.pullback import vjp
from ..implicit.inner_solution import (
    InnerSolution,
    check_moves_optimum,
    continue_training,
    held_out,
    no_graph,
    partial_in_hypers,
    total,
)
from ..training.estimate import Estimate, GoingOn, Note, finished
from ..training.training import Training


@dataclass(frozen=True)
class SAMA(GoingOn):
    """The gradient of the held-out loss with the inverse Hessian taken for what the rule itself
    makes of a gradient, and the mixed derivative for a difference.

    With v = (d step / d gradient)' dF/dw it is dF/dhypers - (df/dhypers at w + h v, minus that at w
    - h v) / 2h. Two more gradients and no second derivative, whatever the model; no size and no
    sign of it is sure. Only hypers of the training loss; others raise ValueError.

    Args:
        radius: h |v|, the length of the difference in the weights.
        warm_start: go on from where the last call ended.
    """

    radius: float = 0.01
    warm_start: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.radius < math.inf:
            raise ValueError(
                f"radius={self.radius:g} must be positive; it is a distance of weights"
            )

    def __call__(
        self, training: Training, point: Tensors, carry: InnerSolution | None = None, *, seed: int
    ) -> tuple[Estimate, InnerSolution | None]:
        check_moves_optimum(training, point)
        resolved = training.resolve({name: value.detach() for name, value in point.items()})
        reached = continue_training(training, resolved, carry, seed)
        if isinstance(reached, Estimate):
            return reached, None
        values = resolved.at(training.steps - 1)
        state, names = reached.state, list(point)
        loss, slope, direct = held_out(training, state, values, names)
        if slope is None:
            return no_graph(training, loss), None

        v = _preconditioned(training, reached, values, slope, seed)
        h = self.radius / float(v.norm().clamp(min=torch.finfo(v.dtype).tiny))
        above, below = (
            partial_in_hypers(training, state._replace(p=p), values, names, reached.steps, seed)
            for p in (state.p + h * v, state.p - h * v)
        )
        shares = {name: (below[name] - above[name]) / (2 * h) for name in names}
        note = Note(steps=training.steps, how="a direction: the inverse Hessian is the rule's own")
        return finished(loss, total(direct, shares), note), reached if self.warm_start else None


def _preconditioned(
    training: Training, reached: InnerSolution, values: Tensors, slope: Tensor, seed: int
) -> Tensor:
    """How far a step goes against a slope: for an elementwise rule, its derivative in the gradient
    times the slope.
    """
    state = reached.state
    p = state.p.detach().requires_grad_()
    f, _ = training.inner_loss(state._replace(p=p), values, reached.steps, seed)
    (g,) = torch.autograd.grad(f, p)
    g.requires_grad_()
    t = torch.tensor(float(reached.steps + 1), dtype=torch.float64)
    fixed = {n: x.detach() for n, x in values.items()}
    after = training.apply(state, g, fixed, t, {}, loss=f.detach())
    return -vjp([after.p], [g], [slope])[0]


__all__ = ["SAMA"]
