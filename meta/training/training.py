"""A training: fresh weights, one step, and the losses, as pure functions of its hypers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...inner.core.flat import flat_readout, flat_step, flat_step_, initial_slots
from ...inner.core.hyper import Tensors
from ..problems.data import Split
from ..problems.problem import draws_of, loss_at
from .specification import Specification
from .state import State

Loss = Callable[[Tensor], tuple[Tensor, tuple[Tensor, Tensors]]]
Gradient = Callable[[Loss, Tensor], tuple[Tensor, tuple[Tensor, Tensors]]]


@dataclass(frozen=True)
class Training(Specification):
    """What a specification says, done; `TrainingLoop` is what does it step after step."""

    def begin(self, values: Tensors, seed: int) -> State:
        """The state before the first step; differentiable in the values that fill slots."""
        params, buffers = self.problem.start(seed)
        p = self.layout.flatten(params)
        return State(p, self.slots(p, values), buffers)

    def slots(self, p: Tensor, values: Tensors) -> Tensors:
        """The slots before the first step."""
        return initial_slots(self.rule, self.layout, p, self._of_rule(values))

    def step(
        self,
        state: State,
        values: Tensors,
        i: int,
        seed: int,
        *,
        graph: bool = False,
        overwrite: bool = False,
    ) -> State:
        """Step i. With graph, the result is differentiable in state and values, and state.p must
        require grad; without, nothing is tracked, and with overwrite the tensors of state may be
        those of the result.
        """
        t = torch.tensor(float(i + 1), dtype=torch.float64)
        batch = self.problem.batch(i, seed)
        with draws_of(i, seed, state.p.device):
            if graph:
                return self.step_on(state, values, t, batch)
            p = state.p.detach().requires_grad_()
            after = self.step_on(
                state._replace(p=p), values, t, batch, graph=False, overwrite=overwrite
            )
        # What the step did not touch stays the same object: Replay takes it for a constant.
        same = state.buffers
        buffers = {n: b if b is same.get(n) else b.detach() for n, b in after.buffers.items()}
        return State(after.p.detach(), after.slots, buffers)

    def step_on(
        self,
        state: State,
        values: Tensors,
        t: Tensor,
        batch: Any,
        *,
        graph: bool = True,
        gradient: Gradient | None = None,
        overwrite: bool = False,
    ) -> State:
        """The step after t - 1 others on a batch at hand; random draws are torch's global ones.

        gradient(loss, p): the gradient of loss in p, and what else loss returns; by autograd,
        through the graph that p is in, if not given.
        """

        def loss(p: Tensor) -> tuple[Tensor, tuple[Tensor, Tensors]]:
            params = self.layout.unflatten(p)
            value, buffers = self.problem.inner_loss(
                params, state.buffers, self.of_loss(values), batch
            )
            return value, (value, buffers)

        if gradient:
            g, (value, buffers) = gradient(loss, state.p)
        else:
            with torch.enable_grad():
                value, (_, buffers) = loss(state.p)
                (g,) = torch.autograd.grad(value, state.p, create_graph=graph)
        with torch.set_grad_enabled(graph):
            value = value if graph or gradient else value.detach()
            return self.apply(state, g, values, t, buffers, loss=value, overwrite=overwrite)

    def apply(
        self,
        state: State,
        g: Tensor,
        values: Tensors,
        t: Tensor,
        buffers: Tensors,
        *,
        loss: Tensor | None = None,
        overwrite: bool = False,
    ) -> State:
        """What the rule makes of a gradient, and of the loss it is of, after t - 1 other steps."""
        step = flat_step_ if overwrite and _apart(state, buffers) else flat_step
        hypers = self._of_rule(values)
        p, slots = step(self.rule, self.layout, state.p, g, state.slots, t, hypers, loss=loss)
        return State(p, slots, buffers)

    def of_loss(self, values: Tensors) -> Tensors:
        """The values that the training loss is a function of."""
        return {name: values[name] for name in self.problem.hypers}

    def _of_rule(self, values: Tensors) -> Tensors:
        return {name: values[name] for name in self.rule.hypers}

    def inner_loss(
        self, state: State, values: Tensors, i: int, seed: int
    ) -> tuple[Tensor, Tensors]:
        """The training loss of a state at step i, and the buffers after it."""
        params = self.layout.unflatten(state.p)
        return loss_at(self.problem, params, state.buffers, self.of_loss(values), i, seed)

    def params(self, state: State, values: Tensors) -> Tensors:
        """The weights to use: those the rule reads out of a state, mostly its p."""
        hypers = self._of_rule(values)
        p = flat_readout(self.rule, self.layout, state.p, state.slots, hypers)
        return self.layout.unflatten(p)

    def outer_loss(self, state: State, values: Tensors) -> Tensor:
        """The held-out loss of a state, with a graph to whatever requires grad."""
        params = self.params(state, values)
        return self.problem.outer_loss(params, state.buffers, self.of_loss(values))

    def outer_loss_at(self, p: Tensor, state: State, values: Tensors) -> Tensor:
        """The held-out loss of other weights than a state's."""
        params = self.layout.unflatten(p)
        return self.problem.outer_loss(params, state.buffers, self.of_loss(values))

    def measure(self, state: State, values: Tensors, split: Split) -> dict[str, float]:
        return self.problem.measure(self.params(state, values), state.buffers, split)


def _apart(state: State, buffers: Tensors) -> bool:
    """Whether weights and slots share their memory with nothing: a slot or a buffer may be the
    weights.
    """
    written = [x.untyped_storage().data_ptr() for x in (state.p, *state.slots.values())]
    kept = {x.untyped_storage().data_ptr() for x in buffers.values()}
    return len({*written}) == len(written) and kept.isdisjoint(written)


__all__ = ["Gradient", "Loss", "Training"]
