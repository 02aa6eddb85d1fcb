"""What a training is: a problem, a rule, how long, and which hyperparameters that makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral

import torch
from torch import Tensor

from ...inner.core.hyper import Granularity, Hyper, Tensors
from ...inner.core.layout import Layout
from ...inner.core.messages import unknown
from ...inner.core.rule import Rule
from ...inner.schedules.schedule import Schedule, constant
from ..problems.problem import Problem
from .state import Resolved


@dataclass(frozen=True)
class Specification:
    """`steps` updates of a problem's parameters by a rule, and the values of its hypers.

    schedules: by hyperparameter of the rule or of the loss; its knobs replace it, as "lr.knots".
    granularity: "tensor" or "element" for one value per parameter tensor or weight. values: those
    other than the defaults, by hyperparameter or knob; one for a scheduled hyper stands for its
    peak or for all its knobs.
    """

    problem: Problem
    rule: Rule
    steps: int
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    granularity: Mapping[str, Granularity] = field(default_factory=dict)
    values: Mapping[str, float | Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.steps, Integral):
            raise ValueError(f"steps={self.steps!r} is not a whole number; give an int")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} trains nothing; give at least 1")
        clash = sorted(set(self.rule.hypers) & set(self.problem.hypers))
        if clash:
            raise ValueError(
                f"{', '.join(clash)} is a hyperparameter of {self.rule.name} and of the loss of "
                f"{self.problem.name}; rename the loss's"
            )
        for where in (self.schedules, self.granularity):
            for name in where:
                if name not in self.declared:
                    raise ValueError(unknown(f"{self.label} has no hyper", name, self.declared))
        for name, value in self.values.items():
            if name not in self.hypers and name not in self.declared:
                raise ValueError(unknown(f"{self.label} has no hyper", name, self.hypers))
            hyper = self.hypers.get(name) or self.declared[name]
            hyper.check(name, value)
            shape = torch.as_tensor(value).shape
            if shape and shape != hyper.shape:
                raise ValueError(
                    f"{name} is given {tuple(shape)} values and has {hyper.shape or 'one'}; give "
                    "one number or as many as its schedule and granularity make"
                )

    @property
    def label(self) -> str:
        return f"{self.rule.name} on {self.problem.name}"

    @cached_property
    def layout(self) -> Layout:
        """The model's parameter tensors, the same for every seed."""
        return Layout.of(self.problem.start(0)[0])

    @cached_property
    def declared(self) -> dict[str, Hyper]:
        """The hypers of rule and loss in their granularity, before schedules."""
        shapes: dict[str, Callable[[], tuple[int, ...]]] = {
            "shared": lambda: (),
            "tensor": lambda: (len(self.layout.names),),
            "element": lambda: (sum(self.layout.sizes),),
        }
        declared = {**self.rule.hypers, **self.problem.hypers}
        for name, granularity in self.granularity.items():
            if name in declared:
                if granularity not in shapes:
                    raise ValueError(unknown(f"{name} has no granularity", granularity, shapes))
                order = list(shapes)
                if order.index(granularity) > order.index(declared[name].finest):
                    raise ValueError(
                        f"{name}={granularity} is too fine: {self.rule.name} has at most one "
                        f"{name} per {declared[name].finest}"
                        if declared[name].finest != "shared"
                        else f"{name} is one number for the whole model in {self.rule.name}"
                    )
                declared[name] = declared[name].shaped(*shapes[granularity]())
        return declared

    @cached_property
    def knobs(self) -> dict[str, dict[str, Hyper]]:
        """For each hyper of rule and loss, its schedule's knobs by suffix."""
        return {
            name: schedule_of(self, name).knobs(hyper, self.steps)
            for name, hyper in self.declared.items()
        }

    @cached_property
    def hypers(self) -> dict[str, Hyper]:
        """Every hyperparameter of this training by its full name, such as "beta1", "lr.knots"."""
        return {
            full_name(name, suffix): knob
            for name, knobs in self.knobs.items()
            for suffix, knob in knobs.items()
        }

    def rough(self) -> dict[str, str]:
        """The hypers whose derivative says little of their effect, by full name, and why."""
        of_rule = self.rule.rough()
        found = {}
        for name, hyper in self.hypers.items():
            base = name.partition(".")[0]
            declared = self.rule.hypers.get(base)
            lifted = declared and declared.rough == hyper.rough and base not in of_rule
            if hyper.rough and not lifted:
                found[name] = hyper.rough
        return found

    def expand(self, names: Iterable[str]) -> list[str]:
        """Full names from names of hypers: "lr" stands for all knobs of its schedule."""
        full: list[str] = []
        for name in names:
            if name in self.knobs:
                full += [full_name(name, suffix) for suffix in self.knobs[name]]
            elif name in self.hypers:
                full.append(name)
            else:
                known = sorted({*self.knobs, *self.hypers})
                raise ValueError(unknown(f"{self.label} has no hyper", name, known))
        return list(dict.fromkeys(full))

    def defaults(self) -> Tensors:
        """The values in force where nothing is learned: given ones, then declared defaults."""
        return {name: _value(self, name, learned=False) for name in self.hypers}

    def start(self, learn: Iterable[str]) -> Tensors:
        """Where tuning of the hypers in learn begins, by full name, each in its dtype."""
        start = {name: _value(self, name, learned=True) for name in self.expand(learn)}
        for name, value in start.items():
            self.hypers[name].check_start(name, value)
        self.complain(start)
        return start

    def complain(self, point: Tensors) -> None:
        """Raise ValueError if the rule's values at a point contradict its options."""
        values = self.resolve(point).at(0)
        self.rule.complain({name: values[name] for name in self.rule.hypers})

    def resolve(self, point: Tensors) -> Resolved:
        """What is in force at every step at a point (learned values by full name)."""
        given = {n: _value(self, n, learned=False) for n in self.hypers if n not in point}
        full = given | point
        varying, fixed = {}, {}
        for name, knobs in self.knobs.items():
            if name in self.schedules:
                values = {suffix: full[full_name(name, suffix)] for suffix in knobs}
                varying[name] = self.schedules[name].table(self.steps, values, self.declared[name])
            else:
                fixed[name] = full[name]
        return Resolved(varying, fixed)


def schedule_of(training: Specification, name: str) -> Schedule:
    """A hyper's schedule, a constant one where it has none."""
    return training.schedules.get(name) or constant()


def levels(training: Specification, name: str) -> list[str]:
    """Full names of what holds values of a hyper itself: of its schedule's knobs, or it."""
    return [full_name(name, suffix) for suffix in schedule_of(training, name).levels]


def full_name(name: str, suffix: str) -> str:
    """That of a knob of a hyper's schedule, or of the hyper itself."""
    return f"{name}.{suffix}" if suffix else name


def _value(training: Specification, name: str, *, learned: bool) -> Tensor:
    """What a hyper or knob is where no point says it: as given, or by default."""
    hyper, (base, _, suffix) = training.hypers[name], name.partition(".")
    level = suffix in schedule_of(training, base).levels
    value = training.values.get(name, training.values.get(base) if level else None)
    if value is not None:
        return torch.as_tensor(value, dtype=hyper.dtype).expand(hyper.shape).clone()
    if learned:
        return hyper.starting_value(_sizes(training, base) if level else torch.tensor(1.0))
    return torch.full(hyper.shape, hyper.default, dtype=hyper.dtype)


def _sizes(training: Specification, base: str) -> Tensor:
    """The numel of the tensors each value of a hyper acts on, in the hyper's granularity."""
    sizes = torch.tensor(training.layout.sizes, dtype=torch.float64)
    granularity = training.granularity.get(base, "shared")
    if granularity == "shared":
        return sizes.log().mean().exp()
    return sizes if granularity == "tensor" else sizes.repeat_interleave(sizes.long())


__all__ = ["Specification", "full_name", "levels", "schedule_of"]
