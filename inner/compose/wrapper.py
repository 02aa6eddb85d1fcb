"""Rules made of rules: what goes into one, or comes out of it, changed.

A wrapper is written as a rule is, with the rule inside as one more argument:

    @wrapper(over="model", max_norm=positive(1.0, search=(1e-3, 1e3), finest="shared"))
    def clip_norm(p, g, s, t, inner, max_norm):
        return inner(p, g * (max_norm / root((g * g).sum())).clamp(max=1)), s

and `clip_norm("adamw")` is a rule like any other: with the hypers, options and slots of both, and
found by its name, "clip_norm(adamw)".

The outermost wrapper is the first to change the gradient and the last to change the step. So
clip_norm(coupled_weight_decay(sgd)) clips the gradient of the loss, before decay is added to it, as
torch.nn.utils.clip_grad_norm_ does, and coupled_weight_decay(clip_norm(sgd)) clips their sum;
decoupled_weight_decay(cautious(adam)) masks Adam's step alone, and
cautious(decoupled_weight_decay(adam)) masks decay with it. Averages belong outside of all that
changes steps: ema(lookahead(sgd)).

Names that both have are the rule's; the wrapper's get its own name in front: clip_norm_max_norm.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from ..core.hyper import Discrete, Hyper
from ..core.messages import unknown
from ..core.rule import Need, Over, Rule
from ..core.slots import Slot
from ..registry import WRAPPERS, find_rule
from .wrapped import (
    COMMON,
    Body,
    InnerCheck,
    InnerRule,
    InnerSlot,
    WrappedReadout,
    WrappedUpdate,
    WrapperReadout,
    WrapperSlot,
    WrapperSpec,
)

_WIDER: tuple[Over, ...] = ("element", "tensor", "model")


@dataclass(frozen=True)
class Wrapper(WrapperSpec):
    """A function from a rule to a rule; made by `wrapper`."""

    def __call__(self, rule: str | Rule, **defaults: object) -> Rule:
        """The rule, by name or itself, in this wrapper; defaults: of the wrapper's own hypers and
        options.
        """
        found = find_rule(rule)
        # Its options in force become those of the whole.
        inner = replace(found, chosen={})
        if self.moves and inner.readout:
            raise ValueError(
                f"{self.name} would change the weights that {inner.name} made, behind those that "
                f"it keeps beside them; put {self.name} around what is inside of it, or leave one "
                "of the two out"
            )
        self._refuse_another(inner)
        own = self._declared(defaults)
        off = frozenset(n for n in inner.hypers if self._replaces(n))
        around = WrappedUpdate(
            wrapper=self,
            inner=inner,
            over=max(self.over, inner.over, key=_WIDER.index),
            hypers=self._named(self.hypers, inner, off),
            choices=self._named(self.choices, inner, off),
            slots=self._named(self.slots, inner, off),
            off=off,
        )
        given = "".join(f", {n}={v!r}" for n, v in defaults.items())
        needs: tuple[Need, ...] = ("loss", "layout")
        if "loss" not in (*self.needs, *inner.needs):
            needs = ("layout",)
        overruled = {around.choices[n] for n in defaults if n in self.choices}
        return Rule(
            name=f"{self.name}({inner.name}{given})",
            title="".join(part.capitalize() for part in self.name.split("_")) + inner.title,
            hypers={n: h for n, h in inner.hypers.items() if n not in off}
            | {full: _renamed(own[n], around.choices) for n, full in around.hypers.items()},
            choices={**inner.choices, **{full: own[n] for n, full in around.choices.items()}},
            slots={n: Slot(InnerSlot(around, n), x.shared) for n, x in inner.slots.items()}
            | {
                full: Slot(WrapperSlot(around, n), self.slots[n].shared)
                for n, full in around.slots.items()
            },
            update=around,
            over=around.over,
            check=InnerCheck(around) if inner.check else None,
            chosen={n: v for n, v in found.chosen.items() if n not in overruled},
            doc=f"{self.doc}\n\nAround:\n\n{inner.doc}",
            needs=needs,
            readout=WrappedReadout(around) if self.readout or inner.readout else None,
        )

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return _recall, (self.name,)  # pickle would find it under the name of its function.

    def _declared(self, defaults: Mapping[str, object]) -> dict[str, Any]:
        """Its hypers and options, with these defaults."""
        own: dict[str, Any] = {**self.hypers, **self.choices}
        for name, value in defaults.items():
            if name not in own:
                raise TypeError(unknown(f"{self.name} has no argument", name, own))
            number = isinstance(value, Real) and not isinstance(value, bool)
            if name in self.hypers and not number:
                raise TypeError(f"{self.name}: {name}={value!r} is not a number")
            own[name].check(name, value)
            own[name] = replace(own[name], default=value)
        return own

    def _refuse_another(self, inner: Rule) -> None:
        """Raise ValueError if a wrapper inside is there for what this one replaces."""
        update: object = inner.update
        while isinstance(update, WrappedUpdate):
            if set(update.wrapper.replaces) & set(self.replaces):
                raise ValueError(
                    f"{self.name} would switch {update.wrapper.name} off in {inner.name}; leave "
                    "one of the two out"
                )
            update = update.inner.update

    def _replaces(self, name: str) -> bool:
        """Whether a hyper is off inside, by itself or under the name that a part of a rule has."""
        return any(name == each or name.endswith(f"_{each}") for each in self.replaces)

    def _named(self, own: Mapping[str, object], inner: Rule, off: frozenset[str]) -> dict[str, str]:
        """Names in the whole of what is the wrapper's own."""
        taken = {*inner.hypers, *inner.choices, *inner.slots} - off
        if inner.choices.get(COMMON) == self.choices.get(COMMON):
            taken -= {COMMON}
        names = {n: f"{self.name}_{n}" if n in taken else n for n in own}
        for name, full in names.items():
            if full in taken:
                raise ValueError(
                    f"{inner.name} has {full!r} and {name!r} already, so {self.name} cannot name "
                    "its own; put a wrapper around a rule twice at most"
                )
        return names


def _renamed(hyper: Hyper, choices: Mapping[str, str]) -> Hyper:
    """A hyper of an option as the whole calls that."""
    if hyper.when is None:
        return hyper
    option, value = hyper.when
    return replace(hyper, when=(choices[option], value))


def _recall(name: str) -> Any:
    if name not in WRAPPERS:
        raise ValueError(unknown("there is no wrapper of rules", name, WRAPPERS))
    return WRAPPERS[name]


def wrapper(
    *,
    over: Over = "element",
    needs: tuple[Need, ...] = (),
    slots: Mapping[str, Slot] | None = None,
    readout: WrapperReadout | None = None,
    moves: bool = False,
    replaces: tuple[str, ...] = (),
    **declared: Hyper | Discrete,
) -> Callable[[Body], Wrapper]:
    """Declare a wrapper; its function's own docstring, or its module's, is its citation.

    Args:
        over: the smallest unit it acts on, "element", "tensor" or "model".
        needs: what else the function takes: "loss", "layout".
        slots: its own buffers of state by name.
        readout: (p, s, inner) -> the weights to use, where they are not those of the rule inside.
        moves: whether it changes the weights that the rule inside made.
        replaces: names of hypers that are off in the rule inside, because it has its own.
        declared: a Hyper, Choice or Integer for everything else that the function takes.
    """

    def wrap(body: Body) -> Wrapper:
        takes = [n for n in list(inspect.signature(body).parameters)[5:] if n not in needs]
        if set(takes) != set(declared):
            odd = sorted(set(takes) ^ set(declared))
            raise TypeError(f"{body.__name__}: declared and taken hyperparameters differ: {odd}")
        kinds = {n: declared[n] for n in takes}
        return Wrapper(
            name=body.__name__,
            body=body,
            over=over,
            needs=needs,
            slots=dict(slots or {}),
            hypers={n: d for n, d in kinds.items() if isinstance(d, Hyper)},
            choices={n: d for n, d in kinds.items() if not isinstance(d, Hyper)},
            readout=readout,
            moves=moves,
            replaces=replaces,
            doc=inspect.getdoc(body) or inspect.getmodule(body).__doc__ or "",
        )

    return wrap


__all__ = ["InnerRule", "Wrapper", "wrapper"]
