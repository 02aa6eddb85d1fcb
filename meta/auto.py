"""The cheaper of the two exact methods, by the number of hypers, the steps and the memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..inner.core.hyper import Tensors
from .forward.forward import Forward
from .reverse.checkpointing import revolve_steps
from .reverse.memory_budget import comfortable, state_bytes
from .reverse.replay import Replay
from .training.estimate import Estimate, Estimator
from .training.outcome import Outcome
from .training.training import Training

# A pullback, and a step of one number's tangents, in plain steps; see BENCHMARKS.md.
REPLAY_STEPS, FORWARD_STEPS = 2.0, 0.7


@dataclass(frozen=True)
class Auto(Estimator):
    """Replay or Forward, whichever costs less; note.how says which and why."""

    def __call__(
        self, training: Training, point: Tensors, carry: None = None, *, seed: int
    ) -> tuple[Estimate, None]:
        method, reason = choose_method(training, point)
        estimate, _ = method(training, point, None, seed=seed)
        if estimate.note.outcome is Outcome.NOT_DIFFERENTIABLE and isinstance(method, Forward):
            reason = estimate.note.reason
            estimate, _ = Replay()(training, point, None, seed=seed)
        how = f"{estimate.note.how} ({reason})"
        return replace(estimate, note=replace(estimate.note, how=how)), None


def choose_method(
    training: Training, point: Tensors, memory: int | None = None
) -> tuple[Replay | Forward, str]:
    """(the cheaper exact method at a point, why). memory: bytes for the states of a replay."""
    columns = sum(value.numel() for value in point.values())
    with torch.no_grad():
        state = training.begin(training.resolve(point).at(0), 0)
    room = comfortable(state.p.device) if memory is None else memory
    slots = max(1, room // max(state_bytes(state), 1))
    if slots >= training.steps:
        return Replay(memory), f"all {training.steps} states fit"
    if low := training.problem.autocast:
        return Replay(memory), f"forward mode does not go through autocast={low}"
    sweeps = revolve_steps(training.steps, slots) / training.steps
    said = f"{columns} numbers at once cost {{}} than {sweeps:.1f} sweeps, {slots} states fit"
    if 1 + FORWARD_STEPS * columns < sweeps + REPLAY_STEPS:
        return Forward(), said.format("less")
    return Replay(memory), said.format("more")


__all__ = ["Auto", "choose_method"]
