"""What derivatives of a training begin and end with: leaves, the first adjoint, cotangents."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...inner.core.hyper import Tensors
from ...inner.core.rule import Rule
from ...inner.numerics.pullback import vjp
from .state import Resolved, State
from .training import Training


class Cotangents:
    """Sums d loss / d value in force, per step where scheduled, and pulls them to the knobs."""

    def __init__(self, resolved: Resolved) -> None:
        everything = resolved.varying | resolved.constant
        self.names = [name for name, value in everything.items() if value.requires_grad]
        self._resolved = resolved
        self._varying = {n: torch.zeros_like(v) for n, v in resolved.varying.items()}
        self._constant = {n: torch.zeros_like(v) for n, v in resolved.constant.items()}

    def add(self, step: int, grads: Sequence[Tensor | None], names: Sequence[str]) -> None:
        """Gradients in the values of names at one step."""
        for name, grad in zip(names, grads, strict=True):
            if grad is not None:
                if name in self._varying:
                    self._varying[name][step] += grad
                else:
                    self._constant[name] += grad

    def add_all(self, tables: Tensors) -> None:
        """Gradients in values at every step, the first dimension time."""
        for name, table in tables.items():
            if name in self._varying:
                self._varying[name] += table.to(self._varying[name])
            else:
                self._constant[name] += table.sum(0).to(self._constant[name])

    def empty(self) -> Cotangents:
        """Sums for the same values with nothing in them."""
        return Cotangents(self._resolved)

    def at(self, name: str, step: int) -> Tensor:
        """What was added for a value at a step; for a constant one, at all steps."""
        return self._varying[name][step] if name in self._varying else self._constant[name]

    def through(self, leaves: Tensors) -> Tensors:
        """The gradient in the knobs."""
        outputs = self._resolved.varying | self._resolved.constant
        sums = self._varying | self._constant
        grads = vjp(
            [outputs[name] for name in self.names],
            list(leaves.values()),
            [sums[name] for name in self.names],
            keep=False,
        )
        return dict(zip(leaves, grads, strict=True))


def seed_adjoint(
    training: Training, plain: Resolved, last: State, fixed: Tensors, sums: Cotangents
) -> tuple[Tensor, list[Tensor] | None]:
    """The held-out loss and its gradient in the final state; None if it has no graph to it."""
    final = training.steps - 1
    values, hypers = leaf_values(plain, final, sums.names)
    state = leaves(last, fixed)
    loss = training.outer_loss(state, values)
    if not loss.requires_grad:
        return loss, None
    inputs = carrying_adjoint(state, fixed)
    grads = vjp([loss], inputs + hypers, [None], keep=False)
    sums.add(final, grads[len(inputs) :], sums.names)
    return loss.detach(), list(grads[: len(inputs)])


def norm_at_end(rule: Rule, adjoint: Sequence[Tensor]) -> Tensor:
    """Of the held-out loss's gradient in the weights to use, which a readout may take from slots
    alone: the gradient in p is 0 then, beside which any other would be endless.
    """
    norms: list[Tensor] = [bar.norm().to(adjoint[0]) for bar in adjoint]
    whole: Tensor = torch.stack(norms).norm()
    return whole if rule.readout else norms[0]


def pull_back_start(
    training: Training, plain: Resolved, seed: int, adjoint: list[Tensor], sums: Cotangents
) -> None:
    """The share of hypers that fill a slot before the first step."""
    values, hypers = leaf_values(plain, 0, sums.names)
    state = training.begin(values, seed)
    start = carrying_adjoint(state, state.buffers)
    live = [(x, bar) for x, bar in zip(start, adjoint, strict=False) if x.requires_grad]
    if live:
        outputs, bars = zip(*live, strict=True)
        grads = torch.autograd.grad(outputs, hypers, bars, allow_unused=True)
        sums.add(0, grads, sums.names)


def missing_derivative(error: RuntimeError) -> str:
    """Why a training step has no derivative; any other error is raised again."""
    op = re.search(r"derivative for '?([\w:]+)'? is not implemented", str(error))
    if not op:
        raise error
    return (
        f"a training step cannot be differentiated: torch has no derivative for {op[1]}; use "
        "another form of that operation in the model or its loss"
    )


def leaf_values(plain: Resolved, step: int, names: Sequence[str]) -> tuple[Tensors, list[Tensor]]:
    """The values at a step, those of names as leaves of a graph, and these leaves."""
    values = plain.at(step)
    made = {name: values[name].detach().requires_grad_() for name in names}
    return values | made, list(made.values())


def leaves(state: State, fixed: Tensors) -> State:
    """The state as leaves of a graph."""
    return each_moving(state, fixed, lambda x: x.detach().requires_grad_())


def carrying_adjoint(state: State, fixed: Tensors) -> list[Tensor]:
    """The tensors that can carry an adjoint, in a fixed order."""
    buffers = [x for name, x in state.buffers.items() if x is not fixed.get(name)]
    return [x for x in (state.p, *state.slots.values(), *buffers) if x.is_floating_point()]


def each_moving(state: State, fixed: Tensors, change: Callable[[Tensor], Tensor]) -> State:
    """A state with every tensor that can carry an adjoint changed."""

    def through(x: Tensor) -> Tensor:
        return change(x) if x.is_floating_point() else x

    buffers = {n: x if x is fixed.get(n) else through(x) for n, x in state.buffers.items()}
    return State(through(state.p), {name: through(x) for name, x in state.slots.items()}, buffers)
