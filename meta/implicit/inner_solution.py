"""Where training leads, on its own loss or on both: where implicit and bilevel methods begin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...inner.core.hyper import Tensors
from ...inner.numerics.pullback import vjp
from ...inner.torch_internals import version_of
from ..training.adjoint import missing_derivative
from ..training.estimate import Estimate, Note
from ..training.loop import TrainingLoop, run_training
from ..training.outcome import Outcome
from ..training.state import Resolved, State
from ..training.training import Training


@dataclass(frozen=True)
class InnerSolution:
    """Where a training ended, for one other to go on from, which may do so in the same memory.
    steps: done since the start.
    """

    state: State
    steps: int
    _written: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_written", version_of(self.state.p))

    def __reduce__(self) -> tuple[type[InnerSolution], tuple[State, int]]:
        return InnerSolution, (
            self.take(),
            self.steps,
        )  # A copy's tensors count their versions anew.

    def take(self) -> State:
        """The state, to be overwritten; ValueError if it was already."""
        if version_of(self.state.p) != self._written:
            raise ValueError(
                f"the training that this carry stopped at step {self.steps} of has gone on since, "
                "in the same memory: a carry serves one call; for several, copy.deepcopy it before"
            )
        return self.state


def continue_training(
    training: Training,
    resolved: Resolved,
    carry: InnerSolution | None,
    seed: int,
    *,
    inner: float = 1.0,
    outer: float = 0.0,
) -> InnerSolution | Estimate:
    """Where `training.steps` more steps lead from carry, or from fresh weights, on inner * f +
    outer * F, f the training loss and F the held-out one.
    """
    done = carry.steps if carry else 0
    start = carry.take() if carry else None
    if (inner, outer) == (1.0, 0.0):
        loop = run_training(training, resolved, seed, start=start, first=done, overwrite=True)
    else:
        if start is None:
            with torch.no_grad():
                start = training.begin(resolved.at(0), seed)
        with TrainingLoop(start, training.steps) as loop:
            for i, state in loop:
                loop.state = step_along(
                    training, state, resolved.at(i), done + i, seed, inner=inner, outer=outer
                )
    done += training.steps
    if not loop.ok:
        return Estimate.diverged(
            training.steps, f"the weights stopped being finite within {done} steps"
        )
    return InnerSolution(loop.state, done)


def step_along(
    training: Training,
    state: State,
    values: Tensors,
    i: int,
    seed: int,
    *,
    inner: float = 1.0,
    outer: float = 0.0,
    pull: Tensor | None = None,
) -> State:
    """Step i of the rule, without a graph, on inner * f + outer * F, f the training loss and F the
    held-out one; pull is added to the gradient. The rule's weight decay goes with f.
    """
    p = state.p.detach().requires_grad_()
    f, buffers = training.inner_loss(state._replace(p=p), values, i, seed)
    total = inner * f
    if outer:
        total = total + outer * training.outer_loss_at(p, state, values)
    (g,) = torch.autograd.grad(total, p)
    if "weight_decay" in values:
        values = values | {"weight_decay": inner * values["weight_decay"]}
    g = g if pull is None else g + pull
    return apply_gradient(training, state, values, i, g, buffers, loss=total.detach())


def apply_gradient(
    training: Training,
    state: State,
    values: Tensors,
    i: int,
    g: Tensor,
    buffers: Tensors,
    *,
    loss: Tensor,
) -> State:
    """The state after step i on a gradient at hand and the loss it is of, without a graph."""
    t = torch.tensor(float(i + 1), dtype=torch.float64)
    same = state.buffers
    buffers = {n: b if b is same.get(n) else b.detach() for n, b in buffers.items()}
    with torch.no_grad():
        return training.apply(state, g.detach(), values, t, buffers, loss=loss)


def partial_in_hypers(
    training: Training, state: State, values: Tensors, names: Sequence[str], i: int, seed: int
) -> Tensors:
    """The partial derivatives of the training loss at step i in hypers of it."""
    leaves = {name: values[name].detach().requires_grad_() for name in names}
    f, _ = training.inner_loss(state, values | leaves, i, seed)
    return dict(zip(names, vjp([f], list(leaves.values()), [None]), strict=True))


def held_out(
    training: Training, state: State, values: Tensors, names: Sequence[str]
) -> tuple[Tensor, Tensor | None, Tensors]:
    """(the held-out loss, its gradient in the weights, its partial derivatives in those hypers that
    it contains); without a gradient where the loss has no graph to anything.
    """
    leaves = {name: values[name].detach().requires_grad_() for name in names}
    weights = state.p.detach().requires_grad_()
    loss = training.outer_loss_at(weights, state, values | leaves)
    if not loss.requires_grad:
        return loss, None, {}
    inputs = [weights, *leaves.values()]
    slope, *direct = torch.autograd.grad(loss, inputs, allow_unused=True)
    slope = torch.zeros_like(weights) if slope is None else slope
    found = {name: d for name, d in zip(names, direct, strict=True) if d is not None}
    return loss.detach(), slope, found


def total(direct: Tensors, shares: Tensors) -> Tensors:
    """Derivatives in hypers: what they do to the held-out loss by themselves and through weights.

    A hyper may have as many numbers as the model, so what there is not is not made of zeros.
    """
    return {name: x + direct[name] if name in direct else x for name, x in shares.items()}


def no_graph(training: Training, loss: Tensor) -> Estimate:
    """What to answer where the held-out loss cannot be differentiated."""
    reason = f"the held-out loss of {training.problem.name} has no graph to the parameters"
    return Estimate(float(loss), {}, Note(Outcome.NOT_DIFFERENTIABLE, reason, training.steps))


def no_second_derivative(training: Training, error: RuntimeError) -> Estimate:
    """What to answer where torch has no second derivative; any other error is raised again."""
    note = Note(Outcome.NOT_DIFFERENTIABLE, missing_derivative(error), training.steps)
    return Estimate(float("nan"), {}, note)


def check_moves_optimum(training: Training, point: Tensors, also: Iterable[str] = ()) -> None:
    """Raise ValueError for a name in point that does not move where training leads to.

    also: hypers of the rule that do.
    """
    learnable = [
        name
        for name in (*training.problem.hypers, *also)
        if name in training.declared and name not in training.schedules
    ]
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


__all__ = [
    "InnerSolution",
    "apply_gradient",
    "check_moves_optimum",
    "continue_training",
    "held_out",
    "no_graph",
    "no_second_derivative",
    "partial_in_hypers",
    "step_along",
    "total",
]
