"""One rule for some of the tensors of a model and another for the rest."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core.hyper import Hyper, Tensors
from ..core.layout import Layout
from ..core.rule import Need, Rule
from ..core.slots import Slot
from ..registry import find_rule
from .wrapped import COMMON, rate_of

_T = TypeVar("_T")
# (name of the tensor, its shape) -> whether it is one of the first rule's
Where = Callable[[str, torch.Size], bool]


def matrices(name: str, shape: torch.Size) -> bool:
    """Tensors of two dimensions or more."""
    return len(shape) > 1


def partition(
    first: str | Rule, rest: str | Rule, *, where: Where = matrices, prefix: str = "rest_"
) -> Rule:
    """One rule for some of the tensors of a model and another for the rest.

    Hypers, options and slots of the other that the first has too are called prefix + name. In the
    torch form names are those of `named_parameters`, if it was given those, and else "". A rule
    that is to be pickled needs a where that can be, a function of a module.

    Args:
        first: the rule, by name or itself, for the tensors that where picks.
        rest: the rule for the others.
        where: (name, shape) -> whether a tensor is one of the first's; matrices if not given.
        prefix: of names that both rules have.
    """
    one, other = find_rule(first), find_rule(rest)
    for part in (one, other):
        if part.over == "model":
            raise ValueError(
                f"{part.name} acts on a whole model, so it cannot have a part of one; wrappers of "
                'that kind go around the partition: "clip_norm(partition(muon, adamw))"'
            )
    if not callable(where):
        raise TypeError(f"where={where!r} is no function of the name and the shape of a tensor")
    partitioned = PartitionedUpdate(one, other, where, prefix)
    given = "" if prefix == "rest_" else f", prefix={prefix!r}"
    theirs = {partitioned.called(n): c for n, c in other.choices.items()}
    kept = {n: Slot(PartitionedSlot(partitioned, True, n)) for n in one.slots}
    kept |= {
        partitioned.called(n): Slot(PartitionedSlot(partitioned, False, n)) for n in other.slots
    }
    needs: tuple[Need, ...] = ("loss", "layout")
    if "loss" not in (*one.needs, *other.needs):
        needs = ("layout",)
    return Rule(
        name=f"partition({one.name}, {other.name}{given})",
        title=f"Partition{one.title}{other.title}",
        hypers={
            **one.hypers,
            **{partitioned.called(n): partitioned.hyper(n) for n in other.hypers},
        },
        choices={**one.choices, **{n: c for n, c in theirs.items() if n not in one.choices}},
        slots=kept,
        update=partitioned,
        over="tensor",
        check=PartitionedCheck(partitioned) if one.check or other.check else None,
        chosen={**{partitioned.called(n): v for n, v in other.chosen.items()}, **one.chosen},
        doc=f"{one.doc}\n\nFor the rest:\n\n{other.doc}",
        needs=needs,
        readout=PartitionedReadout(partitioned) if one.readout or other.readout else None,
    )


@dataclass(frozen=True)
class PartitionedUpdate:
    """The update of a partition. names: what is called something else in the whole, of the hypers,
    options and slots of the other.
    """

    one: Rule
    other: Rule
    where: Where
    prefix: str
    names: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        one = {*self.one.hypers, *self.one.choices, *self.one.slots}
        names: dict[str, str] = {}
        for name in (*self.other.hypers, *self.other.choices, *self.other.slots):
            if name == COMMON:
                continue
            full = name
            while full in one or full in names.values():
                if not self.prefix:
                    raise ValueError(f"both rules have {name!r}; give a prefix that is not empty")
                full = f"{self.prefix}{full}"
            names[name] = full
        object.__setattr__(self, "names", names)

    def __hash__(self) -> int:
        return hash((self.one.name, self.other.name, self.prefix))

    def called(self, name: str) -> str:
        """What a hyper, an option or a slot of the other is called."""
        return self.names.get(name, name)

    def hyper(self, name: str) -> Hyper:
        """A hyper of the other in the whole."""
        hyper = self.other.hypers[name]
        if self.called(name) != name:
            hyper = replace(hyper, role=hyper.role or name)
        if hyper.when is None:
            return hyper
        option, value = hyper.when
        return replace(hyper, when=(self.called(option), value))

    def picks(self, layout: Layout) -> bool:
        """Whether a tensor is one of the first rule's."""
        (name,), (shape,) = layout.names, layout.shapes
        return self.where(name, shape)

    def hypers_of(self, first: bool, values: Mapping[str, _T]) -> dict[str, _T]:
        if first:
            return {n: values[n] for n in self.one.hypers}
        return {n: values[self.called(n)] for n in self.other.hypers}

    def choices_of(self, first: bool, values: Mapping[str, _T]) -> dict[str, _T]:
        if first:
            return {n: values[n] for n in self.one.choices}
        return {n: values[self.called(n)] for n in self.other.choices}

    def chosen(self, first: bool, values: Mapping[str, Any]) -> Rule:
        """One of the rules with its options in force."""
        rule = self.one if first else self.other
        return rule.choose(**self.choices_of(first, values)) if rule.choices else rule

    def slots_of(self, first: bool) -> dict[str, str]:
        """Its slots, by what it calls them."""
        if first:
            return {n: n for n in self.one.slots}
        return {n: self.called(n) for n in self.other.slots}

    def kind(self, layout: Layout) -> Hashable:
        """Which rule a tensor has, and what that takes notice of; of several, their names."""
        if len(layout.names) > 1:
            return layout.names
        first = self.picks(layout)
        return first, (self.one if first else self.other).kind(layout)

    def rate(self, values: Tensors, layout: Layout) -> Tensor:
        """The learning rate of each tensor, that of its rule, for `rate_of`."""
        if len(layout.names) == 1:
            first = self.picks(layout)
            part = self.one if first else self.other
            return rate_of(part, self.hypers_of(first, values), layout)
        split = {n: layout.per_tensor(v) for n, v in values.items()}
        each = []
        for i, unit in enumerate(layout.units):
            each.append(self.rate({n: x[i] for n, x in split.items()}, unit))
        sizes = zip(each, layout.sizes, strict=True)
        return torch.cat([x.reshape(-1).expand(size) for x, size in sizes])

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
        first = self.picks(layout)
        rule = self.chosen(first, values)
        names = self.slots_of(first)
        before = {n: s[full] for n, full in names.items()}
        p, after = rule(p, g, before, t, self.hypers_of(first, values), loss=loss, layout=layout)
        return p, {**s, **{names[n]: x for n, x in after.items()}}


@dataclass(frozen=True)
class PartitionedReadout:
    """The weights to use of a tensor."""

    partitioned: PartitionedUpdate

    def __call__(self, p: Tensor, s: Tensors, values: Tensors, layout: Layout) -> Tensor:
        partitioned, first = self.partitioned, self.partitioned.picks(layout)
        rule = partitioned.one if first else partitioned.other
        if rule.readout is None:
            return p
        own = {n: s[full] for n, full in partitioned.slots_of(first).items()}
        return rule.readout(p, own, partitioned.hypers_of(first, values), layout)


@dataclass(frozen=True)
class PartitionedCheck:
    """The conditions of both rules on their values."""

    partitioned: PartitionedUpdate

    def __call__(self, values: Mapping[str, object]) -> str | None:
        for first, rule in ((True, self.partitioned.one), (False, self.partitioned.other)):
            own = self.partitioned.hypers_of(first, values) | self.partitioned.choices_of(
                first, values
            )
            if rule.check and (problem := rule.check(own)):
                return f"{rule.name}: {problem}"
        return None


@dataclass(frozen=True)
class PartitionedSlot:
    """How a slot of one of the rules begins: empty for the tensors of the other. Shared numbers are
    each weight's own here.
    """

    partitioned: PartitionedUpdate
    first: bool
    name: str

    def __call__(self, p: Tensor, values: Mapping[str, Any], layout: Layout) -> Tensor:
        if self.partitioned.picks(layout) != self.first:
            return p.new_zeros(0)
        rule = self.partitioned.chosen(self.first, values)
        made = rule.begin(self.name, p, self.partitioned.hypers_of(self.first, values), layout)
        return made.to(p) + torch.zeros_like(p) if rule.slots[self.name].shared else made


__all__ = ["matrices", "partition"]
