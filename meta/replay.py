"""Replayed reverse mode: the exact gradient of the held-out loss through every training step.

The states of training are kept; going backwards, one step at a time is done again with a graph and
pulled back, so that no graph is ever longer than a step. Maclaurin, Duvenaud & Adams 2015,
arXiv:1502.03492; Engstrom et al. 2025, arXiv:2503.13751.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..inner.hyper import Tensors
from .estimate import Estimate, Note, finished
from .outcome import Outcome
from .training import Resolved, State, Training


@dataclass(frozen=True)
class Replay:
    """Exact in every hyperparameter of rule, schedule and loss, for any number of them.

    Takes about 4 plain trainings of time and (steps + 1) states of memory.
    """

    def __call__(
        self, training: Training, point: Tensors, carry: None = None, *, seed: int
    ) -> tuple[Estimate, None]:
        leaves = {name: value.detach().requires_grad_() for name, value in point.items()}
        resolved = training.resolve(leaves)
        plain = _detached(resolved)
        states: list[State] = []
        if training.run(plain, seed, watch=lambda i, state: states.append(state)) is None:
            reason = f"the weights stopped being finite by step {len(states)}"
            return Estimate.diverged(len(states), reason), None

        cotangents = _Cotangents(resolved)
        loss, adjoint = _seed_adjoint(training, states.pop(), plain, cotangents)
        if adjoint is None:
            reason = f"the held-out loss of {training.problem.name} has no graph to the parameters"
            note = Note(Outcome.NOT_DIFFERENTIABLE, reason, training.steps)
            return Estimate(float(loss), {}, note), None
        norms = [adjoint[0].norm()]
        for i in reversed(range(training.steps)):
            adjoint = _pull_back(training, states.pop(), adjoint, plain, i, seed, cotangents)
            norms.append(adjoint[0].norm())
        _pull_back_start(training, adjoint, plain, seed, cotangents)
        note = Note(steps=training.steps, adjoint=torch.stack(norms[::-1]))
        return finished(loss, cotangents.through(resolved, leaves), note), None


class _Cotangents:
    """Sums d loss / d value in force, per step where scheduled, and pulls them to the knobs."""

    def __init__(self, resolved: Resolved) -> None:
        self.names = [
            name
            for name, value in (resolved.varying | resolved.constant).items()
            if value.requires_grad
        ]
        self._varying = {n: torch.zeros_like(v) for n, v in resolved.varying.items()}
        self._constant = {n: torch.zeros_like(v) for n, v in resolved.constant.items()}

    def add(self, step: int, grads: Sequence[Tensor | None]) -> None:
        for name, grad in zip(self.names, grads, strict=True):
            if grad is not None:
                if name in self._varying:
                    self._varying[name][step] += grad
                else:
                    self._constant[name] += grad

    def through(self, resolved: Resolved, leaves: Tensors) -> Tensors:
        """The gradient in the knobs."""
        outputs = resolved.varying | resolved.constant
        sums = self._varying | self._constant
        grads = torch.autograd.grad(
            [outputs[name] for name in self.names],
            list(leaves.values()),
            [sums[name] for name in self.names],
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(leaves, grads, strict=True))


def _detached(resolved: Resolved) -> Resolved:
    return Resolved(
        {name: table.detach() for name, table in resolved.varying.items()},
        {name: value.detach() for name, value in resolved.constant.items()},
    )


def _leaf_values(plain: Resolved, step: int, names: Sequence[str]) -> tuple[Tensors, list[Tensor]]:
    values = plain.at(step)
    leaves = {name: values[name].detach().requires_grad_() for name in names}
    return values | leaves, list(leaves.values())


def _leaf_state(state: State) -> State:
    def leaf(x: Tensor) -> Tensor:
        return x.detach().requires_grad_() if x.is_floating_point() else x

    return State(
        leaf(state.p),
        {name: leaf(x) for name, x in state.slots.items()},
        {name: leaf(x) for name, x in state.buffers.items()},
    )


def _floats(state: State) -> list[Tensor]:
    parts = [state.p, *state.slots.values(), *state.buffers.values()]
    return [x for x in parts if x.is_floating_point()]


def _seed_adjoint(
    training: Training, last: State, plain: Resolved, cotangents: _Cotangents
) -> tuple[Tensor, list[Tensor] | None]:
    """The held-out loss and its gradient in the final state; None if it has no graph to it."""
    final = training.steps - 1
    values, hypers = _leaf_values(plain, final, cotangents.names)
    state = _leaf_state(last)
    loss = training.outer_loss(state, values)
    if not loss.requires_grad:
        return loss, None
    inputs = _floats(state)
    grads = torch.autograd.grad(loss, inputs + hypers, allow_unused=True, materialize_grads=True)
    cotangents.add(final, grads[len(inputs) :])
    return loss.detach(), list(grads[: len(inputs)])


def _pull_back(
    training: Training,
    state: State,
    adjoint: list[Tensor],
    plain: Resolved,
    i: int,
    seed: int,
    cotangents: _Cotangents,
) -> list[Tensor]:
    """Step i done again with a graph; returns d loss / d state before it."""
    values, hypers = _leaf_values(plain, i, cotangents.names)
    before = _leaf_state(state)
    after = _floats(training.step(before, values, i, seed, graph=True))
    live = [(x, bar) for x, bar in zip(after, adjoint, strict=True) if x.requires_grad]
    inputs = _floats(before)
    grads = torch.autograd.grad(
        [x for x, _ in live],
        inputs + hypers,
        [bar for _, bar in live],
        allow_unused=True,
        materialize_grads=True,
    )
    cotangents.add(i, grads[len(inputs) :])
    return list(grads[: len(inputs)])


def _pull_back_start(
    training: Training, adjoint: list[Tensor], plain: Resolved, seed: int, cotangents: _Cotangents
) -> None:
    """The share of hypers that fill a slot before the first step."""
    values, hypers = _leaf_values(plain, 0, cotangents.names)
    start = _floats(training.begin(values, seed))
    live = [(x, bar) for x, bar in zip(start, adjoint, strict=True) if x.requires_grad]
    if live:
        outputs, bars = zip(*live, strict=True)
        cotangents.add(0, torch.autograd.grad(outputs, hypers, bars, allow_unused=True))
