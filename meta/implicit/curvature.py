"""Products with the second derivative of the training loss in the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ...inner.core.hyper import Tensors
from ...inner.numerics.pullback import vjp
from ..problems.problem import draws_of
from ..training.state import State
from ..training.training import Training
from .linear_solvers import Matvec

Curvature = Literal["hessian", "gauss-newton"]


@runtime_checkable
class SplitLoss(Protocol):
    """A problem whose training loss is a function of the model's output and of the weights."""

    def output(
        self, params: Tensors, buffers: Tensors, hypers: Tensors, batch: object
    ) -> tuple[Tensor, Tensors]:
        """What the model makes of a batch in training, and the buffers after it."""
        ...

    def loss_of(self, output: Tensor, params: Tensors, hypers: Tensors, batch: object) -> Tensor:
        """The scalar training loss of an output."""
        ...


def product_and_gradient(
    training: Training,
    state: State,
    values: Tensors,
    steps: Sequence[int],
    seed: int,
    curvature: Curvature,
) -> tuple[Matvec, Callable[[], Tensor]]:
    """For the mean training loss over the batches of some steps: (products of a vector with its
    curvature in state.p; its gradient in state.p, with a graph to it and to the values).

    "gauss-newton" is the Hessian with the model replaced by its tangent at state.p: positive
    semi-definite where the loss is convex in the output. A product costs one more pass back than
    the Hessian's. Schraudolph 2002, doi:10.1162/08997660260028683.
    """

    def gradient() -> Tensor:
        losses = [training.inner_loss(state, values, i, seed)[0] for i in steps]
        (g,) = torch.autograd.grad(torch.stack(losses).mean(), state.p, create_graph=True)
        return g

    if curvature == "hessian":
        g = gradient()
        return lambda v: vjp([g], [state.p], [v])[0], lambda: g
    # The gradient's graph is not part of these products: it is made once they are done.
    first, *others = [_gauss_newton(training, state, values, i, seed) for i in steps]

    def mean(v: Tensor) -> Tensor:
        summed = first(v)
        for product in others:
            summed += product(v)
        return summed.div_(len(steps))

    return mean, gradient


def _gauss_newton(training: Training, state: State, values: Tensors, i: int, seed: int) -> Matvec:
    """Products for the batch of step i: J' (d2 loss / d output2) J and what the weights do to the
    loss beside the output.
    """
    problem = cast(SplitLoss, training.problem)
    batch = training.problem.batch(i, seed)
    # Constants here: what a graph to them would keep may be as long as the weights.
    hypers = training.of_loss({name: x.detach() for name, x in values.items()})
    with draws_of(i, seed, state.p.device):
        z, _ = problem.output(training.layout.unflatten(state.p), state.buffers, hypers, batch)
    if not isinstance(z, Tensor):
        raise TypeError(
            f"curvature='gauss-newton' needs one tensor as the model's output, and that of "
            f"{training.problem.name} is a {type(z).__name__}; give curvature='hessian'"
        )
    # J v is the derivative in u of J' u, which is linear in u (Townsend 2017).
    u = torch.zeros_like(z, requires_grad=True)
    back = _ends(vjp([z], [state.p], [u], graph=True))
    top, weights = z.detach().requires_grad_(), state.p.detach().requires_grad_()
    loss = problem.loss_of(top, training.layout.unflatten(weights), hypers, batch)
    slopes = _ends(vjp([loss], [top, weights], [None], graph=True))

    def product(v: Tensor) -> Tensor:
        (forward,) = vjp(back, [u], [v])
        curved, beside = vjp(slopes, [top, weights], [forward, v])
        return beside.add_(vjp([z], [state.p], [curved])[0])

    return product


def _ends(outputs: Sequence[Tensor]) -> list[GradientEdge | None]:
    """Where the ways back from some outputs begin, without their values, which would stay in
    memory; None for constants.
    """
    return [get_gradient_edge(x) if x.requires_grad else None for x in outputs]
