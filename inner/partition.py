"""One rule for some of the tensors of a model and another for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .hyper import Tensors
from .layout import Layout
from .rule import Need, Rule, Slot

_T = TypeVar("_T")
# (name of the tensor, its shape) -> whether it is one of the first rule's
Where = Callable[[str, torch.Size], bool]


def matrices(name: str, shape: torch.Size) -> bool:
    """Tensors of two dimensions or more."""
    return len(shape) > 1


def partition(
    first: str | Rule, rest: str | Rule, *, where: Where = matrices, prefix: str = "rest_"
) -> Rule:
    """The first rule for the tensors that where(name, shape) picks, the other for the rest.

    Hypers, options and slots of the other that the first has too are called prefix + name. In the
    torch form names are those of `named_parameters`, if it was given those, and else "".
    """
    from .rules import find_rule  # Here, because some registered rules are made of others.

    one, other = find_rule(first), find_rule(rest)
    for part in (one, other):
        if part.over == "model":
            raise ValueError(f"{part.name} acts on a whole model, so it cannot have a part of one")
    parted = Parted(one, other, where, prefix)
    kept = {n: Slot(PartSlot(parted, True, n)) for n in one.slots}
    kept |= {parted.slot(n): Slot(PartSlot(parted, False, n)) for n in other.slots}
    needs: tuple[Need, ...] = ("loss", "layout")
    if "loss" not in (*one.needs, *other.needs):
        needs = ("layout",)
    return Rule(
        name=f"partition({one.name}, {other.name})",
        title=f"Partition{one.title}{other.title}",
        hypers={**one.hypers, **{parted.hyper(n): h for n, h in other.hypers.items()}},
        choices={**one.choices, **{parted.choice(n): c for n, c in other.choices.items()}},
        slots=kept,
        update=parted,
        over="tensor",
        check=PartCheck(parted) if one.check or other.check else None,
        chosen={**one.chosen, **{parted.choice(n): v for n, v in other.chosen.items()}},
        doc=f"{one.doc}\n\nFor the rest:\n\n{other.doc}",
        needs=needs,
        readout=PartReadout(parted) if one.readout or other.readout else None,
    )


@dataclass(frozen=True)
class Parted:
    """The update of a partition."""

    one: Rule
    other: Rule
    where: Where
    prefix: str

    def __hash__(self) -> int:
        return hash((self.one.name, self.other.name, self.prefix))

    def hyper(self, name: str) -> str:
        """What a hyper of the other is called."""
        return self._apart(name, self.one.hypers)

    def choice(self, name: str) -> str:
        # Smooth or not is one decision for the whole.
        return name if name == "smooth" else self._apart(name, self.one.choices)

    def slot(self, name: str) -> str:
        return self._apart(name, self.one.slots)

    def _apart(self, name: str, taken: Iterable[str]) -> str:
        return f"{self.prefix}{name}" if name in taken else name

    def picks(self, layout: Layout) -> bool:
        (name,), (shape,) = layout.names, layout.shapes
        return self.where(name, shape)

    def hypers_of(self, first: bool, values: Mapping[str, _T]) -> dict[str, _T]:
        if first:
            return {n: values[n] for n in self.one.hypers}
        return {n: values[self.hyper(n)] for n in self.other.hypers}

    def choices_of(self, first: bool, values: Mapping[str, _T]) -> dict[str, _T]:
        if first:
            return {n: values[n] for n in self.one.choices}
        return {n: values[self.choice(n)] for n in self.other.choices}

    def slots_of(self, first: bool) -> dict[str, str]:
        """Its slots, by what it calls them."""
        if first:
            return {n: n for n in self.one.slots}
        return {n: self.slot(n) for n in self.other.slots}

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
        rule = self.one if first else self.other
        if rule.choices:
            rule = rule.choose(**self.choices_of(first, values))
        names = self.slots_of(first)
        before = {n: s[full] for n, full in names.items()}
        p, after = rule(p, g, before, t, self.hypers_of(first, values), loss=loss, layout=layout)
        return p, {**s, **{names[n]: x for n, x in after.items()}}


@dataclass(frozen=True)
class PartReadout:
    """The weights to use of a tensor."""

    parted: Parted

    def __call__(self, p: Tensor, s: Tensors, values: Tensors, layout: Layout) -> Tensor:
        parted, first = self.parted, self.parted.picks(layout)
        rule = parted.one if first else parted.other
        if rule.readout is None:
            return p
        own = {n: s[full] for n, full in parted.slots_of(first).items()}
        return rule.readout(p, own, parted.hypers_of(first, values), layout)


@dataclass(frozen=True)
class PartCheck:
    """The conditions of both rules on their values."""

    parted: Parted

    def __call__(self, values: Mapping[str, object]) -> str | None:
        for first, rule in ((True, self.parted.one), (False, self.parted.other)):
            own = self.parted.hypers_of(first, values) | self.parted.choices_of(first, values)
            if rule.check and (problem := rule.check(own)):
                return f"{rule.name}: {problem}"
        return None


@dataclass(frozen=True)
class PartSlot:
    """How a slot of one of the rules begins: empty for the tensors of the other. Shared numbers are
    each weight's own here.
    """

    parted: Parted
    first: bool
    name: str

    def __call__(self, p: Tensor, values: Tensors, layout: Layout) -> Tensor:
        if self.parted.picks(layout) != self.first:
            return p.new_zeros(0)
        rule = self.parted.one if self.first else self.parted.other
        own = self.parted.hypers_of(self.first, values)
        made = rule.slots[self.name].init(p, own, layout)
        return made.to(p) + torch.zeros_like(p) if rule.slots[self.name].shared else made


__all__ = ["matrices", "partition"]
