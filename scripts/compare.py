"""`hyperdescent compare`: every method as it comes, then the table and the picture."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ..inner.core.messages import unknown
from ..inner.core.rule import Rule
from ..meta.compare import compare
from ..meta.estimators import METHODS, find_estimator
from ..meta.implicit.implicit import Unconverged
from ..meta.problems.problem import Problem
from ..meta.training.spec import make_training, split_names
from .show import console, telling


def run_compare(
    problem: Problem,
    rule: Rule,
    *,
    learn: str,
    steps: int,
    schedules: dict[str, Any],
    granularity: dict[str, Any],
    values: dict[str, float],
    methods: str,
    reference: str,
    seed: int,
    out: Path | None,
) -> None:
    """Compare the methods named, all if none is; write the picture to out."""
    screen = console()
    if reference not in ("replay", "differences"):
        raise ValueError(unknown("there is no reference", reference, ["replay", "differences"]))
    training = make_training(problem, rule, steps, schedules, granularity, values)
    found = {name: find_estimator(name) for name in split_names(methods) or METHODS}
    with telling(screen) as say, warnings.catch_warnings():
        # What the table is there to show.
        warnings.simplefilter("ignore", Unconverged)
        comparison = compare(
            training,
            training.start(split_names(learn)),
            found,
            reference=reference,  # type: ignore[arg-type]  # one of the two, by the check above
            seed=seed,
            watch=lambda row: say(f"{row.method}: {row.seconds:.3g} s, {row.said}"),
        )
    screen.print(comparison.table())
    if out is not None:
        comparison.plot(out)
        screen.print(f"drawn in {out}", markup=False)


__all__ = ["run_compare"]
