"""The space as Optuna sees it: distributions, suggestions, and points as parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..inner.core.hyper import Choice, Discrete, Hyper
from .space import SEARCHABLE, Point, Space, numel

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Optuna's distribution of every number and option, conditional ones included."""
    from optuna import distributions as d

    if space.size > SEARCHABLE:
        raise ValueError(
            f"{space.size} numbers are too many to search without gradients (limit "
            f"{SEARCHABLE}); use a coarser granularity or fewer knots"
        )
    out: dict[str, BaseDistribution] = {}
    for name, option in space.discrete.items():
        out[name] = (
            d.CategoricalDistribution(option.options)  # type: ignore[arg-type]  # any object
            if isinstance(option, Choice)
            else d.IntDistribution(option.low, option.high, log=option.log)
        )
    for name, hyper in space.smooth.items():
        for key in _keys(name, hyper):
            out[key] = _float(hyper)
    return out


def suggest(space: Space, trial: Trial) -> Point:
    """A point from the sampler, asking only for what its options make meaningful."""
    each = distributions(space)
    start = space.start()
    discrete: dict[str, object] = dict(start.discrete)
    for name, option in _conditions_first(space.discrete):
        if space.is_active(option, discrete):
            discrete[name] = _ask(trial, name, each[name])
    smooth = {}
    for name, hyper in space.smooth.items():
        if space.is_active(hyper, discrete):
            numbers = [float(_ask(trial, k, each[k])) for k in _keys(name, hyper)]
            smooth[name] = _from_numbers(hyper, numbers)
    return space.settled(start.smooth | smooth, discrete)


def parameters(space: Space, point: Point) -> dict[str, object]:
    """A point as Optuna's parameters, only the meaningful ones."""
    out: dict[str, object] = {
        name: point.discrete[name]
        for name, option in space.discrete.items()
        if space.is_active(option, point.discrete)
    }
    for name, hyper in space.smooth.items():
        if space.is_active(hyper, point.discrete):
            out |= zip(_keys(name, hyper), _to_numbers(hyper, point.smooth[name]), strict=True)
    return out


def _keys(name: str, hyper: Hyper) -> list[str]:
    return [f"{name}[{i}]" for i in range(numel(hyper))] if hyper.shape else [name]


def _float(hyper: Hyper) -> BaseDistribution:
    from optuna.distributions import FloatDistribution

    # Optuna has no logit scale, so such a hyper is sampled in its coordinate.
    low, high = hyper.box() if hyper.scale == "logit" else hyper.search
    return FloatDistribution(low, high, log=hyper.scale == "log")


def _ask(trial: Trial, key: str, distribution: Any) -> Any:
    from optuna.distributions import FloatDistribution, IntDistribution

    if isinstance(distribution, FloatDistribution):
        return trial.suggest_float(key, distribution.low, distribution.high, log=distribution.log)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(key, distribution.low, distribution.high, log=distribution.log)
    return trial.suggest_categorical(key, distribution.choices)


def _to_numbers(hyper: Hyper, value: Tensor) -> list[float]:
    low, high = hyper.box() if hyper.scale == "logit" else hyper.search
    numbers = hyper.free(value) if hyper.scale == "logit" else value
    return [min(max(x, low), high) for x in numbers.flatten().tolist()]


def _from_numbers(hyper: Hyper, numbers: list[float]) -> Tensor:
    tensor = torch.tensor(numbers, dtype=torch.float64).reshape(hyper.shape)
    return hyper.value(tensor) if hyper.scale == "logit" else tensor


def _conditions_first(options: dict[str, Discrete]) -> Iterable[tuple[str, Discrete]]:
    """Options ordered so that one comes after the option it depends on."""
    return sorted(options.items(), key=lambda item: item[1].when is not None)


__all__ = ["distributions", "parameters", "suggest"]
