"""A differentiable update rule: one pure function with declared hyperparameters and slots."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from .hyper import Choice, Discrete, Hyper, Integer, Tensors


class Update(Protocol):
    """(p, g, s, t, **hypers, **choices) -> (p, s), out of place; t counts from 1 in float64."""

    def __call__(
        self, p: Tensor, g: Tensor, s: Tensors, t: Tensor, /, **values: object
    ) -> tuple[Tensor, Tensors]: ...


@dataclass(frozen=True)
class Slot:
    """One buffer of optimizer state. shared: one number for all elements, a function of t only."""

    init: Callable[[Tensor, Tensors], Tensor]
    shared: bool = False


def _zeros(p: Tensor, values: Tensors) -> Tensor:
    return torch.zeros_like(p)


zeros = Slot(_zeros)


def filled(name: str) -> Slot:
    """A buffer that starts at the value of the hyperparameter called name."""
    return Slot(partial(_filled, name))


def _filled(name: str, p: Tensor, values: Tensors) -> Tensor:
    return torch.zeros_like(p) + values[name]


def shared(number: float) -> Slot:
    """One float64 number that starts the same everywhere; one per element where hypers are that."""
    return Slot(partial(_shared, number), shared=True)


def _shared(number: float, p: Tensor, values: Tensors) -> Tensor:
    shape = torch.broadcast_shapes(*(v.shape for v in values.values()))
    if shape:  # A float64 vector would make float64 weights of others.
        return torch.full(shape, number, dtype=p.dtype, device=p.device)
    return torch.tensor(number, dtype=torch.float64)


@dataclass(frozen=True)
class Rule:
    """An optimizer's mathematics.

    over: the smallest unit the rule acts on, an "element" (so that all parameters may be one flat
    vector) or a whole "tensor". chosen: the options in force where they differ from the defaults.
    check: returns what is wrong with a set of values, or None.
    """

    name: str
    title: str
    hypers: Mapping[str, Hyper]
    choices: Mapping[str, Discrete]
    slots: Mapping[str, Slot]
    update: Update
    over: Literal["element", "tensor"] = "element"
    check: Callable[[Mapping[str, object]], str | None] | None = None
    chosen: Mapping[str, object] = field(default_factory=dict)
    doc: str = ""

    def options(self) -> dict[str, object]:
        """Every option and its value in force."""
        return {name: self.chosen.get(name, c.default) for name, c in self.choices.items()}

    def choose(self, **chosen: object) -> Rule:
        """The same rule with other options, such as `sgd.choose(nesterov=True)`."""
        for name, value in chosen.items():
            if name not in self.choices:
                raise TypeError(unknown(f"{self.name} has no option", name, self.choices))
            self.choices[name].check(name, value)
        return replace(self, chosen={**self.chosen, **chosen})

    def values(self, given: Mapping[str, float | Tensor] | None = None) -> Tensors:
        """All hyperparameters as float64 tensors, the given ones checked, the others default."""
        given = given or {}
        for name, value in given.items():
            if name not in self.hypers:
                raise TypeError(unknown(f"{self.name} has no hyperparameter", name, self.hypers))
            self.hypers[name].check(name, value)
        return {
            name: torch.as_tensor(given.get(name, hyper.default), dtype=torch.float64)
            for name, hyper in self.hypers.items()
        }

    def complain(self, values: Mapping[str, object]) -> None:
        """Raise ValueError if these values and options contradict each other."""
        problem = self.check({**values, **self.options()}) if self.check else None
        if problem:
            raise ValueError(f"{self.name}: {problem}")

    def init(self, p: Tensor, values: Tensors) -> Tensors:
        """The slots before the first step, differentiable in the values that fill them."""
        return {name: slot.init(p, values) for name, slot in self.slots.items()}

    def __call__(
        self, p: Tensor, g: Tensor, s: Tensors, t: Tensor, values: Tensors
    ) -> tuple[Tensor, Tensors]:
        """One step on one unit; nothing is changed in place."""
        return self.update(p, g, s, t, **values, **self.options())

    def __reduce__(self) -> tuple[Callable[..., Rule], tuple[object, ...]]:
        # By name: under the name of its function, pickle would find the rule instead.
        if _registered(self.name) == replace(self, chosen={}):
            return _recall, (self.name, dict(self.chosen))
        return Rule, tuple(getattr(self, each.name) for each in fields(self))


def _registered(name: str) -> Rule | None:
    from .rules import RULES  # Here, because the registered rules are made with this module.

    return RULES.get(name)


def _recall(name: str, chosen: Mapping[str, object]) -> Rule:
    found = _registered(name)
    if found is None:
        raise ValueError(f"there is no rule {name!r} here; it was pickled by another version")
    return found.choose(**chosen) if chosen else found


def rule(
    title: str,
    *,
    slots: Mapping[str, Slot] | None = None,
    over: Literal["element", "tensor"] = "element",
    check: Callable[[Mapping[str, object]], str | None] | None = None,
    **declared: Hyper | Discrete,
) -> Callable[[Callable[..., tuple[Tensor, Tensors]]], Rule]:
    """Declare an update rule; the function's module docstring is its citation."""

    def wrap(update: Callable[..., tuple[Tensor, Tensors]]) -> Rule:
        takes = list(inspect.signature(update).parameters)[4:]
        if set(takes) != set(declared):
            odd = sorted(set(takes) ^ set(declared))
            raise TypeError(f"{update.__name__}: declared and taken hyperparameters differ: {odd}")
        return Rule(
            name=update.__name__,
            title=title,
            hypers={n: d for n in takes if isinstance(d := declared[n], Hyper)},
            choices={n: d for n in takes if isinstance(d := declared[n], Choice | Integer)},
            slots=dict(slots or {}),
            update=update,
            over=over,
            check=check,
            doc=inspect.getmodule(update).__doc__ or "",
        )

    return wrap


def root(x: Tensor) -> Tensor:
    """The square root with slope 0 at 0, where the true slope is infinite.

    A weight that never saw a gradient has second moment 0; the true slope times its zero cotangent
    is NaN. Values are bit-identical to sqrt, negative and NaN inputs included.
    """
    zero = x == 0
    return torch.where(zero, x, torch.where(zero, 1.0, x).sqrt())


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that does not exist: the nearest one first, then all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return f"{what} {name!r};{hint} known: {', '.join(known) or 'none'}"
