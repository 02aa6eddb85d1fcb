"""The space that both routes share: the learned hypers of a training, smooth and discrete."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..inner.core.hyper import Choice, Discrete, Hyper, Tensors
from ..inner.core.messages import unknown
from ..meta.training.training import Training

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
                point = self.settled(self.start().smooth, {name: value})
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
        return sum(map(numel, self.smooth.values()))

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

    def settled(self, smooth: Tensors, discrete: dict[str, object]) -> Point:
        """A point in which hypers that mean nothing have their default."""
        idle = {
            name: torch.full(hyper.shape, hyper.default, dtype=torch.float64)
            for name, hyper in self.smooth.items()
            if not self.is_active(hyper, discrete)
        }
        return Point(smooth | idle, discrete)

    def is_active(self, declared: Hyper | Discrete, discrete: dict[str, object]) -> bool:
        """Whether a hyper or option has any effect among these options."""
        if declared.when is None:
            return True
        option, wanted = declared.when
        return {**self._in_force, **discrete}[option] == wanted


def _around(hyper: Hyper, start: Tensor) -> Hyper:
    """The hyper with a search range that holds where it starts."""
    low, high = hyper.search
    return replace(hyper, search=(min(low, float(start.min())), max(high, float(start.max()))))


def numel(hyper: Hyper) -> int:
    """The numbers that a hyper is."""
    return torch.Size(hyper.shape).numel()


__all__ = ["SEARCHABLE", "Point", "Space", "numel"]
