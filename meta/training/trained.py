"""What a training ended with."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...inner.core.hyper import Tensors
from ..problems.data import Split
from .outcome import Outcome
from .state import Resolved, State
from .training import Training


@dataclass(frozen=True)
class Trained:
    """What a training ended with; empty where its outcome is not OK.

    Args:
        params: the weights to use, by name.
        buffers: such as batch norm's running statistics, by name.
        measures: of each held-out split, "loss" and metrics by name.
        outcome: how it ended.
        reason: why, where it did not end well.
    """

    params: Tensors = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)
    measures: dict[Split, dict[str, float]] = field(default_factory=dict)
    outcome: Outcome = Outcome.OK
    reason: str = ""

    @property
    def ok(self) -> bool:
        return self.outcome is Outcome.OK


def trained_to(training: Training, state: State, resolved: Resolved) -> Trained:
    """What is to be used and known of the state after the last step."""
    last = resolved.at(training.steps - 1)
    measures = {split: training.measure(state, last, split) for split in training.problem.splits}
    return Trained(training.params(state, last), state.buffers, measures)


__all__ = ["Trained", "trained_to"]
