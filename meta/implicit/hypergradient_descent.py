"""The gradient of the next batch's loss through the last step: greedy, and nearly free."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...inner.core.hyper import Tensors
from ...inner.numerics.pullback import vjp
from ..training.adjoint import Cotangents, leaf_values, leaves
from ..training.estimate import Estimate, GoingOn, Note, finished
from ..training.state import State
from ..training.training import Training
from .inner_solution import InnerSolution, continue_training


@dataclass(frozen=True)
class HypergradientDescent(GoingOn):
    """The gradient of the next batch's training loss through the last step alone.

    For one training during which hypers move, each call `training.steps` steps: for the learning
    rate of SGD it is minus the product of two gradients in a row. Greedy: it knows nothing of what
    a rate does later, and chooses rates that are too small where that counts (Wu et al. 2018,
    arXiv:1803.02021). Hypers of the loss raise ValueError. Baydin et al. (2018, arXiv:1703.04782)
    add it to the rate itself, which may turn negative; moved in unconstrained coordinates it
    cannot.
    """

    def __call__(
        self, training: Training, point: Tensors, carry: InnerSolution | None = None, *, seed: int
    ) -> tuple[Estimate, InnerSolution | None]:
        if of_loss := [name for name in training.expand(training.problem.hypers) if name in point]:
            raise ValueError(
                f"{', '.join(of_loss)} is in the training loss, on which hypergradient descent "
                "learns: that would only switch it off; use OnePass() or SAMA(warm_start=True)"
            )
        knobs = {name: value.detach().requires_grad_() for name, value in point.items()}
        resolved = training.resolve(knobs)
        plain, sums = resolved.detach(), Cotangents(resolved)
        last = training.steps - 1
        if last:
            reached = continue_training(replace(training, steps=last), plain, carry, seed)
            if isinstance(reached, Estimate):
                return reached, None
        elif carry:
            carry.take()
            reached = carry
        else:
            with torch.no_grad():
                reached = InnerSolution(training.begin(plain.at(0), seed), 0)
        values, hypers = leaf_values(plain, last, sums.names)
        before = leaves(reached.state, reached.state.buffers)
        after = training.step(before, values, reached.steps, seed, graph=True)
        done = reached.steps + 1
        loss, _ = training.inner_loss(after, values, done, seed)
        sums.add(last, vjp([loss], hypers, [None]), sums.names)
        if not bool(loss.isfinite()):
            reason = f"the training loss stopped being finite by step {done}"
            return Estimate.diverged(done, reason), None
        slots, buffers = (
            {name: x.detach() for name, x in each.items()} for each in (after.slots, after.buffers)
        )
        state = State(after.p.detach(), slots, buffers)
        held_out = training.outer_loss(state, plain.at(last)).detach()
        note = Note(steps=training.steps, how="the training loss after one step")
        return finished(held_out, sums.through(knobs), note), InnerSolution(state, done)
