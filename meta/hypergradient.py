"""One training and one hypergradient, for users who bring their own loop around them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import overload

from torch import Tensor

from ..inner.core.hyper import Granularity
from ..inner.core.rule import Rule
from ..inner.schedules.schedule import Schedule
from .compare import Comparison, Reference, compare
from .estimators import find_estimator
from .problems.problem import Problem
from .training.estimate import Estimate, Estimator
from .training.loop import run_training
from .training.spec import make_training, split_names
from .training.trained import Trained, trained_to


@overload
def hypergradient(
    problem: Problem,
    rule: str | Rule = ...,
    *,
    learn: str | Iterable[str] = ...,
    steps: int = ...,
    schedules: Mapping[str, str | Schedule] | None = ...,
    granularity: Mapping[str, Granularity] | None = ...,
    values: Mapping[str, float | Tensor] | None = ...,
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
    granularity: Mapping[str, Granularity] | None = ...,
    values: Mapping[str, float | Tensor] | None = ...,
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
    granularity: Mapping[str, Granularity] | None = None,
    values: Mapping[str, float | Tensor] | None = None,
    seed: int = 0,
    method: str | Estimator | list[str] | tuple[str, ...] | Mapping[str, Estimator] = "auto",
    reference: Reference | Estimator = "replay",
) -> Estimate | Comparison:
    """The held-out loss after training and its derivative in every hyper of learn.

    Args:
        problem: what is trained, such as `problem_from_module` makes.
        rule: the optimizer, by name ("adamw", "clip_norm(adamw)") or as a Rule.
        learn: names of hypers, "lr,beta1" or any iterable of them; a scheduled one stands for all
            its knobs.
        steps: training steps.
        schedules: by hyper, such as {"lr": "piecewise:16"}; its knobs take its place.
        granularity: {"alpha": "tensor"} for one value per parameter tensor, "element" per weight.
        values: those to differentiate at, where not the starting ones.
        seed: of initial weights, batches and all other draws.
        method: "replay" and "forward" are exact for the training as it is, in every hyper, and
            "auto" is the cheaper of the two for this many hypers, steps and bytes of memory;
            "implicit" is the limit of training to the end, in hypers of the loss only;
            `estimators.METHODS` lists the others. Or an estimator with options of its own, such as
            Replay(memory="4GiB"). Several names, or estimators by names of your own, are compared.
        reference: what several methods are compared with (see meta/compare.py).

    Returns:
        An Estimate: loss, grad by full name (in the values, not in their logarithms), and a note
        that says what was done (note.how). Of several methods a Comparison to print and plot:
        cosine and relative error against the reference, and cost.

    Raises:
        ValueError, TypeError: for names and values that cannot work. Divergence is the estimate's
            outcome.
    """
    training = make_training(problem, rule, steps, schedules, granularity, values)
    names = split_names(learn)
    if not names:
        raise ValueError(
            f"learn names no hyper to differentiate in; known: {', '.join(training.hypers)}"
        )
    point = training.start(names)
    if isinstance(method, Mapping):
        return compare(training, point, method, reference=reference, seed=seed)
    if isinstance(method, list | tuple):
        methods = {name: find_estimator(name) for name in method}
        return compare(training, point, methods, reference=reference, seed=seed)
    found = find_estimator(method)
    estimate, _ = found(training, point, None, seed=seed)
    return estimate


def train(
    problem: Problem,
    rule: str | Rule = "adamw",
    *,
    steps: int = 200,
    schedules: Mapping[str, str | Schedule] | None = None,
    granularity: Mapping[str, Granularity] | None = None,
    values: Mapping[str, float | Tensor] | None = None,
    seed: int = 0,
) -> Trained:
    """Train once with given values.

    Args:
        problem: what is trained, such as `problem_from_module` makes.
        rule: the optimizer, by name ("adamw", "clip_norm(adamw)") or as a Rule.
        steps: training steps.
        schedules: by hyper, such as {"lr": "cosine"}.
        granularity: {"alpha": "tensor"} for one value per parameter tensor, "element" per weight.
        values: of hypers, where not the defaults.
        seed: of initial weights, batches and all other draws.

    Returns:
        The trained weights and their measures. Divergence is the outcome, and leaves none.
    """
    training = make_training(problem, rule, steps, schedules, granularity, values)
    resolved = training.resolve({})
    run = run_training(training, resolved, seed)
    if not run.ok:
        return Trained(outcome=run.outcome, reason=run.reason)
    return trained_to(training, run.state, resolved)
