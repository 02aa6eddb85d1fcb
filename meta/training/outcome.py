"""How a run of anything ended, as data: raising is the caller's choice."""

from __future__ import annotations

from enum import StrEnum


class Outcome(StrEnum):
    """What happened, each with a sentence a user can act on."""

    OK = "ok"
    DIVERGED = "diverged"
    NOISY = "noisy"
    STALLED = "stalled"
    NOT_DIFFERENTIABLE = "not_differentiable"
    OUT_OF_BUDGET = "out_of_budget"
    INTERRUPTED = "interrupted"

    @property
    def sentence(self) -> str:
        return _SENTENCES[self]


_SENTENCES = {
    Outcome.OK: "it ran as asked",
    Outcome.DIVERGED: "the loss or its metagradient stopped being finite, "
    "even with the step cut down",
    Outcome.NOISY: "the metagradient did not predict how the loss changes",
    Outcome.STALLED: "no step along the metagradient lowered the loss any further",
    Outcome.NOT_DIFFERENTIABLE: "the objective has no gradient in these hyperparameters",
    Outcome.OUT_OF_BUDGET: "the budget ended before anything was evaluated",
    Outcome.INTERRUPTED: "it was interrupted; the best point so far was kept",
}
