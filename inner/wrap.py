"""Rules made of rules: what goes into one, or comes out of it, changed.

A wrapper is written as a rule is, with the rule inside as one more argument:

    @wrapper(over="model", max_norm=positive(1.0, search=(1e-3, 1e3)))
    def clip_norm(p, g, s, t, inner, max_norm):
        return inner(p, g * (max_norm / root((g * g).sum())).clamp(max=1)), s

and `clip_norm("adamw")` is a rule like any other: with the hypers, options and slots of both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .flat import flat_readout, flat_step, initial_slot
from .hyper import Discrete, Hyper, Tensors
from .layout import Layout
from .rule import Need, Over, Readout, Rule, Slot, unknown

_WIDER: tuple[Over, ...] = ("element", "tensor", "model")
# (p, g, s, t, inner, **needs, **hypers, **choices) -> (p, s)
Body = Callable[..., tuple[Tensor, Tensors]]


class Inner:
    """The rule inside, as a wrapper's function calls it: at most once."""

    def __init__(
        self,
        rule: Rule,
        s: Tensors,
        t: Tensor,
        values: Tensors,
        loss: Tensor | None,
        layout: Layout,
        flat: bool,
    ) -> None:
        self.rule, self.slots, self.values, self.layout = rule, s, values, layout
        self._t, self._loss, self._flat = t, loss, flat

    def __call__(self, p: Tensor, g: Tensor) -> Tensor:
        """The weights after its step."""
        if self._flat:
            p, self.slots = flat_step(
                self.rule, self.layout, p, g, self.slots, self._t, self.values, loss=self._loss
            )
        else:
            p, self.slots = self.rule(
                p, g, self.slots, self._t, self.values, loss=self._loss, layout=self.layout
            )
        return p

    def readout(self, p: Tensor) -> Tensor:
        """The weights to use, of those it trains."""
        return _read(self.rule, p, self.slots, self.values, self.layout, self._flat)


def _read(rule: Rule, p: Tensor, s: Tensors, values: Tensors, layout: Layout, flat: bool) -> Tensor:
    if flat:
        return flat_readout(rule, layout, p, s, values)
    return rule.readout(p, s, values, layout) if rule.readout else p


@dataclass(frozen=True)
class Wrapper:
    """A function from a rule to a rule; made by `wrapper`.

    over, needs, slots, hypers, choices: as of a rule. readout: where the weights to use are not
    those of the rule inside.
    """

    name: str
    body: Body
    over: Over
    needs: tuple[Need, ...]
    slots: Mapping[str, Slot]
    hypers: Mapping[str, Hyper]
    choices: Mapping[str, Discrete]
    readout: Readout | None
    doc: str

    def __call__(self, rule: str | Rule, **defaults: float) -> Rule:
        """The rule, by name or itself, in this wrapper; defaults: of the wrapper's own hypers."""
        from .rules import find_rule  # Here, because some registered rules are made of others.

        inner = find_rule(rule)
        for name, value in defaults.items():
            if name not in self.hypers:
                raise TypeError(unknown(f"{self.name} has no hyper", name, self.hypers))
            self.hypers[name].check(name, value)
        own = {n: replace(h, default=defaults.get(n, h.default)) for n, h in self.hypers.items()}
        names = self._apart(own, inner.hypers)
        buffers = self._apart(self.slots, inner.slots)
        for option, choice in self.choices.items():
            if inner.choices.get(option, choice) != choice:
                raise ValueError(
                    f"{self.name} and {inner.name} have another option {option!r} each"
                )
        over = max(self.over, inner.over, key=_WIDER.index)
        around = Around(self, inner, over, names, buffers)
        given = "".join(f", {n}={v!r}" for n, v in defaults.items())
        needs: tuple[Need, ...] = ("loss", "layout")
        if "loss" not in (*self.needs, *inner.needs):
            needs = ("layout",)
        return Rule(
            name=f"{self.name}({inner.name}{given})",
            title="".join(part.capitalize() for part in self.name.split("_")) + inner.title,
            hypers={**inner.hypers, **{names[n]: h for n, h in own.items()}},
            choices={**inner.choices, **self.choices},
            slots={
                **{n: Slot(InnerSlot(around, n), x.shared) for n, x in inner.slots.items()},
                **{buffers[n]: Slot(OwnSlot(around, n), x.shared) for n, x in self.slots.items()},
            },
            update=around,
            over=over,
            check=inner.check and Checked(inner),
            chosen=inner.chosen,
            doc=f"{self.doc}\n\nAround:\n\n{inner.doc}",
            needs=needs,
            readout=AroundReadout(around) if self.readout or inner.readout else None,
        )

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return _recall, (self.name,)  # pickle would find it under the name of its function.

    def _apart(self, own: Mapping[str, object], taken: Mapping[str, object]) -> dict[str, str]:
        """Names in the whole of what is the wrapper's own."""
        names = {n: f"{self.name}_{n}" if n in taken else n for n in own}
        for name in names.values():
            if name in taken:
                raise ValueError(
                    f"{name!r} is there already: {self.name} can be put around it twice"
                )
        return names


@dataclass(frozen=True)
class Around:
    """The update of a wrapped rule. names, slots: the wrapper's own, by what it calls them."""

    wrapper: Wrapper
    inner: Rule
    over: Over
    names: Mapping[str, str]
    slots: Mapping[str, str]

    def __hash__(self) -> int:
        return hash((self.wrapper.name, self.inner.name))

    @property
    def flat(self) -> bool:
        """Whether the rule inside is shown a flat vector of tensors that it has to part."""
        return self.over == "model"

    def own(self, values: Mapping[str, Any], p: Tensor, layout: Layout) -> Tensors:
        values = {n: values[full] for n, full in self.names.items()}
        return layout.spread_all(values, p) if self.flat else values

    def inside(self, values: Mapping[str, Any]) -> Tensors:
        return {n: values[n] for n in self.inner.hypers}

    def __call__(
        self,
        p: Tensor,
        g: Tensor,
        s: Tensors,
        t: Tensor,
        *,
        layout: Layout,
        loss: Tensor | None = None,
        **values: Any,
    ) -> tuple[Tensor, Tensors]:
        rule = self.inner
        if rule.choices:
            rule = rule.choose(**{n: values[n] for n in rule.choices})
        before = {n: s[n] for n in rule.slots}
        inner = Inner(rule, before, t, self.inside(values), loss, layout, self.flat)
        given: dict[str, Any] = {"loss": loss, "layout": layout}
        given = {n: given[n] for n in self.wrapper.needs}
        given |= {n: values[n] for n in self.wrapper.choices}
        own = {n: s[full] for n, full in self.slots.items()}
        p, after = self.wrapper.body(p, g, own, t, inner, **given, **self.own(values, p, layout))
        return p, {**inner.slots, **{self.slots[n]: x for n, x in after.items()}}


@dataclass(frozen=True)
class AroundReadout:
    """The weights to use of a wrapped rule."""

    around: Around

    def __call__(self, p: Tensor, s: Tensors, values: Tensors, layout: Layout) -> Tensor:
        around = self.around
        if around.wrapper.readout:
            own = {n: s[full] for n, full in around.slots.items()}
            return around.wrapper.readout(p, own, around.own(values, p, layout), layout)
        before = {n: s[n] for n in around.inner.slots}
        inside = around.inside(values)
        return _read(around.inner, p, before, inside, layout, around.flat)


@dataclass(frozen=True)
class InnerSlot:
    """How a slot of the rule inside begins."""

    around: Around
    name: str

    def __call__(self, p: Tensor, values: Tensors, layout: Layout) -> Tensor:
        around, inside = self.around, self.around.inside(values)
        if around.flat:
            return initial_slot(around.inner, self.name, layout, p, inside)
        return around.inner.slots[self.name].init(p, inside, layout)


@dataclass(frozen=True)
class OwnSlot:
    """How a slot of the wrapper begins."""

    around: Around
    name: str

    def __call__(self, p: Tensor, values: Tensors, layout: Layout) -> Tensor:
        own = self.around.own(values, p, layout)
        return self.around.wrapper.slots[self.name].init(p, own, layout)


@dataclass(frozen=True)
class Checked:
    """The condition of the rule inside, on the values that are its own."""

    inner: Rule

    def __call__(self, values: Mapping[str, object]) -> str | None:
        assert self.inner.check
        return self.inner.check({n: values[n] for n in (*self.inner.hypers, *self.inner.choices)})


def _recall(name: str) -> Any:
    from .wrappers import WRAPPERS

    return WRAPPERS[name]


def wrapper(
    *,
    over: Over = "element",
    needs: tuple[Need, ...] = (),
    slots: Mapping[str, Slot] | None = None,
    readout: Readout | None = None,
    **declared: Hyper | Discrete,
) -> Callable[[Body], Wrapper]:
    """Declare a wrapper; its function's module docstring is its citation."""

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
            doc=inspect.getdoc(body) or inspect.getmodule(body).__doc__ or "",
        )

    return wrap


__all__ = ["Inner", "Wrapper", "wrapper"]
