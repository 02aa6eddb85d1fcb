"""The step, slots and readout of a rule in a wrapper: what `wrap` makes rules of."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.flat import flat_readout, flat_step, initial_slot
from ..core.hyper import Discrete, Hyper, Tensors
from ..core.layout import Layout
from ..core.rule import Need, Over, Rule
from ..core.slots import Slot

# The option that rules have in common where they are made one: smooth or not is one decision.
COMMON = "smooth"
# (p, g, s, t, inner, **needs, **hypers, **choices) -> (p, s)
Body = Callable[..., tuple[Tensor, Tensors]]


class InnerRule:
    """The rule inside, as a wrapper's function calls it."""

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
        self._t, self._loss, self._flat, self._stepped = t, loss, flat, False

    def __call__(self, p: Tensor, g: Tensor) -> Tensor:
        """The weights after its step; once."""
        if self._stepped:
            raise RuntimeError(f"a wrapper called {self.rule.name} twice in one step; call it once")
        self._stepped = True
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
        if self._flat:
            return flat_readout(self.rule, self.layout, p, self.slots, self.values)
        if self.rule.readout is None:
            return p
        return self.rule.readout(p, self.slots, self.values, self.layout)

    def rate(self, like: Tensor) -> Tensor:
        """Its learning rate for weights like these; 1 where it has none."""
        rate = rate_of(self.rule, self.values, self.layout)
        return self.layout.per_element(rate, like) if self._flat else rate

    def direction(self, step: Tensor) -> Tensor:
        """A step of it per unit of its learning rate."""
        return _per(self.rate(step), step)


class TensorView:
    """A rule over the whole model as it looks in a wrapper over tensors, to one of them.

    answer: the tensor's weights after the step, if it is known by now.
    """

    def __init__(self, rule: Rule, rate: Tensor, answer: Tensor | None = None) -> None:
        self._rule, self._rate, self._answer = rule, rate, answer
        self.asked: tuple[Tensor, Tensor] | None = None

    def __call__(self, p: Tensor, g: Tensor) -> Tensor:
        self.asked = p, g
        return p if self._answer is None else self._answer

    def readout(self, p: Tensor) -> Tensor:
        raise ValueError(
            f"{self._rule.name} reads out a whole model, not a tensor of it; the wrapper that asks "
            'for one has to be over="element" or over="model"'
        )

    def rate(self, like: Tensor) -> Tensor:
        return self._rate

    def direction(self, step: Tensor) -> Tensor:
        return _per(self._rate, step)


def _per(rate: Tensor, step: Tensor) -> Tensor:
    # A step at rate 0 is 0 in any unit.
    return step / torch.where(rate == 0, 1.0, rate)


def rate_of(rule: Rule, values: Tensors, layout: Layout) -> Tensor:
    """The learning rate of a rule, as granular as it is; in a partition each tensor has its own."""
    found = getattr(rule.update, "rate", None)
    if found is not None:
        rate: Tensor = found(values, layout)
        return rate
    return values["lr"] if "lr" in rule.hypers else torch.ones((), dtype=torch.float64)


WrapperReadout = Callable[[Tensor, Tensors, InnerRule], Tensor]


@dataclass(frozen=True)
class WrapperSpec:
    """What a wrapper declares.

    over, needs, slots, hypers, choices: as of a rule. readout(p, s, inner): the weights to use,
    element by element, where they are not those of the rule inside; s: the wrapper's slots. moves:
    whether it changes the weights that the rule inside made. replaces: names of hypers that are off
    in the rule inside, because the wrapper has its own.
    """

    name: str
    body: Body
    over: Over
    needs: tuple[Need, ...]
    slots: Mapping[str, Slot]
    hypers: Mapping[str, Hyper]
    choices: Mapping[str, Discrete]
    readout: WrapperReadout | None
    moves: bool
    replaces: tuple[str, ...]
    doc: str


@dataclass(frozen=True)
class WrappedUpdate:
    """The update of a wrapped rule. hypers, choices, slots: the wrapper's own, by what it calls
    them. off: the hypers of the rule inside that are 0 here, and no hypers of the whole.
    """

    wrapper: WrapperSpec
    inner: Rule
    over: Over
    hypers: Mapping[str, str]
    choices: Mapping[str, str]
    slots: Mapping[str, str]
    off: frozenset[str]

    def __hash__(self) -> int:
        return hash((self.wrapper.name, self.inner.name))

    @property
    def flat(self) -> bool:
        """Whether the rule inside is shown a flat vector of tensors that it has to part."""
        return self.over == "model"

    def inside(self, values: Mapping[str, Any]) -> Tensors:
        """The hypers of the rule inside."""
        none = torch.zeros((), dtype=torch.float64)
        return {n: none if n in self.off else values[n] for n in self.inner.hypers}

    def chosen(self, values: Mapping[str, Any]) -> Rule:
        """The rule inside with its options in force."""
        rule = self.inner
        return rule.choose(**{n: values[n] for n in rule.choices}) if rule.choices else rule

    def own(self, values: Mapping[str, Any]) -> Tensors:
        """Those of the wrapper."""
        return {n: values[full] for n, full in self.hypers.items()}

    def rate(self, values: Tensors, layout: Layout) -> Tensor:
        return rate_of(self.inner, self.inside(values), layout)

    def kind(self, layout: Layout) -> Hashable:
        own = layout.names if "layout" in self.wrapper.needs else ()
        return own, self.inner.kind(layout)

    def shell(self, update: Callable[..., tuple[Tensor, Tensors]]) -> Rule:
        """The wrapper as a rule by itself, for its share of a flat vector."""
        name, over = self.wrapper.name, self.wrapper.over
        needs: tuple[Need, ...] = ("layout",) if over == "tensor" else ()
        return Rule(name, name, {}, {}, self.wrapper.slots, update, over, needs=needs)

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
        rule = self.chosen(values)
        before, inside = {n: s[n] for n in rule.slots}, self.inside(values)
        inner = InnerRule(rule, before, t, inside, loss, layout, self.flat)
        options = {n: values[full] for n, full in self.choices.items()}

        def stepped(calls: Iterator[InnerRule | TensorView]) -> tuple[Tensor, Tensors]:
            """The wrapper's own step, of the whole, or of tensor after tensor."""

            def update(
                p: Tensor, g: Tensor, s: Tensors, t: Tensor, *, layout: Layout = layout, **own: Any
            ) -> tuple[Tensor, Tensors]:
                given: dict[str, Any] = {"loss": loss, "layout": layout}
                given = {n: given[n] for n in self.wrapper.needs}
                return self.wrapper.body(p, g, s, t, next(calls), **given, **options, **own)

            slots, own = {n: s[full] for n, full in self.slots.items()}, self.own(values)
            if self.flat:
                return flat_step(self.shell(update), layout, p, g, slots, t, own)
            return update(p, g, slots, t, layout=layout, **own)

        if self.flat and self.wrapper.over == "tensor":
            calls = self._pieces(inner, stepped, p, layout)
        else:
            calls = iter([inner])
        p, after = stepped(calls)
        return p, {**inner.slots, **{self.slots[n]: x for n, x in after.items()}}

    def _pieces(
        self,
        inner: InnerRule,
        stepped: Callable[[Iterator[InnerRule | TensorView]], object],
        p: Tensor,
        layout: Layout,
    ) -> Iterator[InnerRule | TensorView]:
        """The step of a rule over models inside, in tensors. Its answer needs all of them, so each
        is first asked for what it would give; functions without side effects may be called twice.
        """
        rate = inner.rate(p)
        rates = [rate] * len(layout.units)
        if rate.ndim:
            shapes = (unit.shapes[0] for unit in layout.units)
            rates = [x.view(n) for x, n in zip(rate.split(layout.sizes), shapes, strict=True)]
        asking = [TensorView(inner.rule, each) for each in rates]
        stepped(iter(asking))
        asked = [piece.asked for piece in asking if piece.asked is not None]
        if len(asked) < len(asking):
            raise RuntimeError(f"{self.wrapper.name} did not call {inner.rule.name}, and has to")
        moved = inner(*(torch.cat([x.reshape(-1) for x in xs]) for xs in zip(*asked, strict=True)))
        answers = zip(rates, moved.split(layout.sizes), asked, strict=True)
        return iter([TensorView(inner.rule, each, x.view_as(to)) for each, x, (to, _) in answers])


@dataclass(frozen=True)
class WrappedReadout:
    """The weights to use of a wrapped rule."""

    around: WrappedUpdate

    def __call__(self, p: Tensor, s: Tensors, values: Tensors, layout: Layout) -> Tensor:
        around = self.around
        before, inside = {n: s[n] for n in around.inner.slots}, around.inside(values)
        # No step, so the time of one and options, which are for it, do not matter.
        never = torch.zeros(())
        inner = InnerRule(around.inner, before, never, inside, None, layout, around.flat)
        if around.wrapper.readout is None:
            return inner.readout(p)
        return around.wrapper.readout(p, {n: s[full] for n, full in around.slots.items()}, inner)


@dataclass(frozen=True)
class InnerSlot:
    """How a slot of the rule inside begins."""

    around: WrappedUpdate
    name: str

    def __call__(self, p: Tensor, values: Mapping[str, Any], layout: Layout) -> Tensor:
        around, inside = self.around, self.around.inside(values)
        rule = around.chosen(values)
        if around.flat:
            return initial_slot(rule, self.name, layout, p, inside)
        return rule.begin(self.name, p, inside, layout)


@dataclass(frozen=True)
class WrapperSlot:
    """How a slot of the wrapper begins."""

    around: WrappedUpdate
    name: str

    def __call__(self, p: Tensor, values: Mapping[str, Any], layout: Layout) -> Tensor:
        around, own = self.around, self.around.own(values)
        if around.flat:
            return initial_slot(around.shell(_no_step), self.name, layout, p, own)
        return around.wrapper.slots[self.name].init(p, own, layout)


def _no_step(p: Tensor, g: Tensor, s: Tensors, t: Tensor) -> tuple[Tensor, Tensors]:
    return p, s


@dataclass(frozen=True)
class InnerCheck:
    """The condition of the rule inside, on the values that are its own."""

    around: WrappedUpdate

    def __call__(self, values: Mapping[str, object]) -> str | None:
        rule, off = self.around.inner, self.around.off
        own = {n: 0.0 if n in off else values[n] for n in (*rule.hypers, *rule.choices)}
        return rule.check(own) if rule.check else None


__all__ = [
    "COMMON",
    "InnerCheck",
    "InnerRule",
    "InnerSlot",
    "WrappedReadout",
    "WrappedUpdate",
    "WrapperReadout",
    "WrapperSlot",
    "WrapperSpec",
    "rate_of",
]
