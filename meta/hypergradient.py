"""One training and one hypergradient, for users who bring their own loop around them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import overload

from torch import Tensor

from ..inner.core.hyper import Grain, Tensors
from ..inner.core.rule import Rule
from ..inner.registry import find_rule
from ..inner.schedules.schedule import Schedule, find_schedule
from .compare import Comparison, Reference, compare
from .methods import find_method
from .problems.data import Split
from .problems.problem import Problem
from .training.estimate import Estimate, Estimator
from .training.training import Training


@dataclass(frozen=True)
class Trained:
    """params, buffers: what training ended with, by name. measures: of each held-out split."""

    params: Tensors
    buffers: Tensors
    measures: dict[Split, dict[str, float]]


def make_training(
    problem: Problem,
    rule: str | Rule,
    steps: int,
    schedules: Mapping[str, str | Schedule] | None,
    grains: Mapping[str, Grain] | None,
    given: Mapping[str, float | Tensor] | None,
) -> Training:
    """A Training from names and specs, as every public function takes them."""
    found = {name: find_schedule(spec) for name, spec in (schedules or {}).items()}
    return Training(problem, find_rule(rule), steps, found, dict(grains or {}), dict(given or {}))


def split_names(learn: str | Iterable[str]) -> tuple[str, ...]:
    """("lr", "beta1") from "lr,beta1" or from any iterable of names."""
    if isinstance(learn, str):
        return tuple(name for part in learn.split(",") if (name := part.strip()))
    return tuple(learn)


@overload
def hypergradient(
    problem: Problem,
    rule: str | Rule = ...,
    *,
    learn: str | Iterable[str] = ...,
    steps: int = ...,
    schedules: Mapping[str, str | Schedule] | None = ...,
    grains: Mapping[str, Grain] | None = ...,
    given: Mapping[str, float | Tensor] | None = ...,
    seed: int = ...,
    method: str | Estimator = ...,
) -> Estimate: ...


@overload
def hypergradient(
    problem: Problem,
    rule: str | Rule = ...,
    *,
    learn: str | Iterable[str] = ...,
    steps: int = ...,
    schedules: Mapping[str, str | Schedule] | None = ...,
    grains: Mapping[str, Grain] | None = ...,
    given: Mapping[str, float | Tensor] | None = ...,
    seed: int = ...,
    method: list[str] | tuple[str, ...] | Mapping[str, Estimator],
    reference: Reference | Estimator = ...,
) -> Comparison: ...


def hypergradient(
    problem: Problem,
    rule: str | Rule = "adamw",
    *,
    learn: str | Iterable[str] = ("lr",),
    steps: int = 200,
    schedules: Mapping[str, str | Schedule] | None = None,
    grains: Mapping[str, Grain] | None = None,
    given: Mapping[str, float | Tensor] | None = None,
    seed: int = 0,
    method: str | Estimator | list[str] | tuple[str, ...] | Mapping[str, Estimator] = "auto",
    reference: Reference | Estimator = "replay",
) -> Estimate | Comparison:
    """The held-out loss after training and its derivative in every hyper of learn.

    given: the values to differentiate at, where not the starting ones. method: "replay" and
    "forward" are exact for the training as it is, in every hyper, and "auto" is the cheaper of the
    two for this many hypers, steps and bytes of memory; "implicit" is the limit of training to the
    end, in hypers of the loss only; `METHODS` in meta/methods.py lists the others. Or an estimator
    with options of its own, such as Replay(memory="4GiB"). note.how says what was done. The
    derivatives are in the values, not in their logarithms.

    Several names, or estimators by a name of your own, are compared: cosine and relative error
    against `reference` (see meta.compare.compare), and cost, in a Comparison to print and plot.
    """
    training = make_training(problem, rule, steps, schedules, grains, given)
    names = split_names(learn)
    if not names:
        raise ValueError(
            f"learn names no hyper to differentiate in; known: {', '.join(training.hypers)}"
        )
    point = training.start(names)
    if isinstance(method, Mapping):
        return compare(training, point, method, reference=reference, seed=seed)
    if isinstance(method, list | tuple):
        methods = {name: find_method(name) for name in method}
        return compare(training, point, methods, reference=reference, seed=seed)
    found = find_method(method) if isinstance(method, str) else method
    estimate, _ = found(training, point, None, seed=seed)
    return estimate


def train(
    problem: Problem,
    rule: str | Rule = "adamw",
    *,
    steps: int = 200,
    schedules: Mapping[str, str | Schedule] | None = None,
    grains: Mapping[str, Grain] | None = None,
    given: Mapping[str, float | Tensor] | None = None,
    seed: int = 0,
) -> Trained | None:
    """Train once with given values; None if the weights stopped being finite."""
    training = make_training(problem, rule, steps, schedules, grains, given)
    resolved = training.resolve({})
    state = training.run(resolved, seed)
    if state is None:
        return None
    last = resolved.at(steps - 1)
    measures = {split: training.measure(state, last, split) for split in problem.splits}
    return Trained(training.params(state, last), state.buffers, measures)
