"""A few steps before the real run: is the loss finite, and does one evaluation fit the budget?"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import replace

from ..meta.training.estimate import Estimator
from ..meta.training.finite_differences import held_out_loss
from ..meta.training.training import Training

_SHORT, _LONG = 1, 3


def first_losses(training: Training, seed: int) -> dict[str, float]:
    """The training and the held-out loss before any update; ValueError if one is not finite.

    To five digits, which tell one problem from another and do not depend on the machine.
    """
    values = training.resolve({}).at(0)
    state = training.begin(values, seed)
    losses = {
        "train": training.inner_loss(state, values, 0, seed)[0],
        "held-out": training.outer_loss(state, values),
    }
    for name, loss in losses.items():
        if not math.isfinite(float(loss)):
            raise ValueError(
                f"{training.label}: the {name} loss is {float(loss)} at step 0, before any update; "
                "check the data for NaN, the model's initial weights and the loss function"
            )
    return {name: float(f"{float(loss):.5g}") for name, loss in losses.items()}


def check_budget(
    training: Training,
    learned: Iterable[str],
    estimator: Estimator | None,
    budget: float,
    seed: int,
) -> None:
    """Raise ValueError if one evaluation of the whole training takes longer than budget seconds.

    estimator: the one whose estimates are to be paid for; None for plain trainings.
    """
    # The first call of anything pays for what is loaded and allocated once.
    names = {name.partition(".")[0] for name in learned}
    _seconds(training, names, estimator, _SHORT, seed)
    short, longer = (
        min(_seconds(training, names, estimator, steps, seed) for _ in range(2))
        for steps in (_SHORT, _LONG)
    )
    per_step = max(longer - short, 0.0) / (_LONG - _SHORT)
    whole = short + per_step * (training.steps - _SHORT)
    if whole > budget:
        what = "metagradient" if estimator else "training"
        raise ValueError(
            f"budget={budget:g} s is too small for one {what} of {training.steps} steps, which "
            f"takes about {whole:.2g} s here; give at least {10 * whole:.2g} s, or fewer steps"
        )


def _seconds(
    training: Training, names: set[str], estimator: Estimator | None, steps: int, seed: int
) -> float:
    # Schedules cost nothing to speak of, and one of them may have a knob per step.
    given = {name: v for name, v in training.values.items() if name in training.declared}
    short = replace(training, steps=steps, schedules={}, values=given)
    point = {name: value for name, value in short.defaults().items() if name in names}
    began = time.monotonic()
    if estimator:
        estimator(short, point, seed=seed)
    else:
        held_out_loss(short, point, seed)
    return time.monotonic() - began
