"""The space that both routes share: the learned hypers of a training, smooth and discrete."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..inner.core.hyper import Choice, Discrete, Hyper, Tensors
from ..inner.core.messages import unknown
from ..meta.training.training import Training

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution

# Beyond this many numbers a sampler learns nothing from the trials anyone can pay for.
SEARCHABLE = 1000


@dataclass(frozen=True)
class Point:
    """smooth: values by full hyper name. discrete: chosen options of rule and problem."""

    smooth: Tensors
    discrete: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Space:
    """learn: names of hypers (a scheduled one stands for all its knobs) and of discrete options."""

    training: Training
    learn: tuple[str, ...]

    def __post_init__(self) -> None:
        known = {*self._options, *self.training.hypers, *self.training.declared}
        for name in self.learn:
            if name not in known:
                raise ValueError(unknown(f"{self.training.label} has no hyper", name, known))
        if not self.learn:
            raise ValueError(f"nothing to learn; name one or more of: {', '.join(sorted(known))}")
        for name in self.discrete.keys() & self.training.rule.choices.keys():
            option = self.discrete[name]
            for value in option.options if isinstance(option, Choice) else ():
                # An option that contradicts the values it is to be tried with is told now.
                point = self._settled(self.start().smooth, {name: value})
                self.at(point.discrete).complain(point.smooth)

    @cached_property
    def _options(self) -> dict[str, Discrete]:
        return {**self.training.rule.choices, **self.training.problem.choices}

    @cached_property
    def discrete(self) -> dict[str, Discrete]:
        return {name: self._options[name] for name in self.learn if name in self._options}

    @cached_property
    def smooth(self) -> dict[str, Hyper]:
        names = self.training.expand(name for name in self.learn if name not in self._options)
        start = self.training.start(names) if names else {}
        return {name: _around(self.training.hypers[name], start[name]) for name in names}

    @cached_property
    def rough(self) -> dict[str, str]:
        """The smooth hypers whose derivative is no guide, and why."""
        return {name: why for name, why in self.training.rough().items() if name in self.smooth}

    @property
    def size(self) -> int:
        """How many numbers the smooth hypers are."""
        return sum(map(_size, self.smooth.values()))

    def start(self) -> Point:
        """Where both routes begin."""
        discrete = {name: self._in_force[name] for name in self.discrete}
        return Point(dict(self._start), discrete)

    @cached_property
    def _start(self) -> Tensors:
        return self.training.start(self.smooth) if self.smooth else {}

    @cached_property
    def _in_force(self) -> dict[str, object]:
        """Every option and its value where nothing is learned."""
        of_problem = {name: c.default for name, c in self.training.problem.choices.items()}
        return {**of_problem, **self.training.rule.options(), **self.training.problem.chosen}

    def at(self, discrete: dict[str, object]) -> Training:
        """The training with these discrete options in force."""
        if not discrete:
            return self.training
        rule, problem = self.training.rule, self.training.problem
        of_rule = {n: v for n, v in discrete.items() if n in rule.choices}
        of_problem = {n: v for n, v in discrete.items() if n not in of_rule}
        return replace(
            self.training,
            rule=rule.choose(**of_rule) if of_rule else rule,
            problem=problem.choose(**of_problem) if of_problem else problem,
        )

    # How the space looks to Optuna.

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distribution of every number and option, conditional ones included."""
        from optuna import distributions as d

        if self.size > SEARCHABLE:
            raise ValueError(
                f"{self.size} numbers are too many to search without gradients (limit "
                f"{SEARCHABLE}); use a coarser granularity or fewer knots"
            )
        out: dict[str, BaseDistribution] = {}
        for name, option in self.discrete.items():
            out[name] = (
                d.CategoricalDistribution(option.options)  # type: ignore[arg-type]  # any object
                if isinstance(option, Choice)
                else d.IntDistribution(option.low, option.high, log=option.log)
            )
        for name, hyper in self.smooth.items():
            for key in _keys(name, hyper):
                out[key] = _float(hyper)
        return out

    def suggest(self, trial: Trial) -> Point:
        """A point from the sampler, asking only for what its options make meaningful."""
        distributions = self.distributions()
        start = self.start()
        discrete: dict[str, object] = dict(start.discrete)
        for name, option in _conditions_first(self.discrete):
            if self._active(option, discrete):
                discrete[name] = _ask(trial, name, distributions[name])
        smooth = {}
        for name, hyper in self.smooth.items():
            if self._active(hyper, discrete):
                numbers = [float(_ask(trial, k, distributions[k])) for k in _keys(name, hyper)]
                smooth[name] = _from_numbers(hyper, numbers)
        return self._settled(start.smooth | smooth, discrete)

    def _settled(self, smooth: Tensors, discrete: dict[str, object]) -> Point:
        """A point in which hypers that mean nothing have their default."""
        idle = {
            name: torch.full(hyper.shape, hyper.default, dtype=torch.float64)
            for name, hyper in self.smooth.items()
            if not self._active(hyper, discrete)
        }
        return Point(smooth | idle, discrete)

    def numbers(self, point: Point) -> dict[str, object]:
        """A point as Optuna's parameters, only the meaningful ones."""
        out: dict[str, object] = {
            name: point.discrete[name]
            for name, option in self.discrete.items()
            if self._active(option, point.discrete)
        }
        for name, hyper in self.smooth.items():
            if self._active(hyper, point.discrete):
                out |= zip(_keys(name, hyper), _to_numbers(hyper, point.smooth[name]), strict=True)
        return out

    def _active(self, declared: Hyper | Discrete, discrete: dict[str, object]) -> bool:
        if declared.when is None:
            return True
        option, wanted = declared.when
        return {**self._in_force, **discrete}[option] == wanted


def _around(hyper: Hyper, start: Tensor) -> Hyper:
    """The hyper with a search range that holds where it starts."""
    low, high = hyper.search
    return replace(hyper, search=(min(low, float(start.min())), max(high, float(start.max()))))


def _size(hyper: Hyper) -> int:
    return torch.Size(hyper.shape).numel()


def _keys(name: str, hyper: Hyper) -> list[str]:
    return [f"{name}[{i}]" for i in range(_size(hyper))] if hyper.shape else [name]


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
