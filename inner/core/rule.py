"""A differentiable update rule: one pure function with declared hyperparameters and slots."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from .hyper import Choice, Discrete, Hyper, Integer, Tensors
from .layout import Layout
from .messages import unknown
from .slots import Slot

Over = Literal["element", "tensor", "model"]
Need = Literal["loss", "layout"]


# (p, g, s, t, **needs, **hypers, **choices) -> (p, s), out of place; t counts from 1 in float64.
Update = Callable[..., tuple[Tensor, Tensors]]


Readout = Callable[[Tensor, Tensors, Tensors, Layout], Tensor]


@dataclass(frozen=True)
class Rule:
    """An optimizer's mathematics.

    Args:
        name: by which it is found, such as "adamw".
        title: of its torch.optim class, such as "AdamW".
        hypers: its continuous hyperparameters by name.
        choices: its discrete options by name.
        slots: its buffers of state by name.
        update: (p, g, s, t, **needs, **hypers, **choices) -> (p, s), out of place; t counts from 1
            in float64.
        over: the smallest unit the rule acts on: an "element" (so that all parameters may be one
            flat vector), a whole "tensor", or the whole "model" as one flat vector, a param group
            in the torch form.
        check: returns what is wrong with a set of values, or None.
        chosen: the options in force where they differ from the defaults.
        doc: what it says of itself, with its citation.
        needs: what else update takes, by name: the "loss" that g is the gradient of, or the unit's
            "layout", of one tensor or, with hypers as granular as they are, of the model.
        readout: (p, s, values, layout) -> the weights to use, where they are not those at which
            gradients are taken.
    """

    name: str
    title: str
    hypers: Mapping[str, Hyper]
    choices: Mapping[str, Discrete]
    slots: Mapping[str, Slot]
    update: Update
    over: Over = "element"
    check: Callable[[Mapping[str, object]], str | None] | None = None
    chosen: Mapping[str, object] = field(default_factory=dict)
    doc: str = ""
    needs: tuple[Need, ...] = ()
    readout: Readout | None = None

    def __hash__(self) -> int:
        return hash(self.name)

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

    def rough(self) -> dict[str, str]:
        """The hypers whose derivative says little of their effect, and why; the option `smooth`
        makes a guide of most of them.
        """
        smooth = bool(self.options().get("smooth"))
        return {
            name: hyper.rough
            for name, hyper in self.hypers.items()
            if hyper.rough and not (smooth and hyper.smoothed)
        }

    def init(self, p: Tensor, values: Tensors, layout: Layout | None = None) -> Tensors:
        """The slots of one unit before the first step, differentiable in the values that fill
        them.
        """
        layout = layout or Layout.alone(p.shape)
        return {name: self.begin(name, p, values, layout) for name in self.slots}

    def begin(self, name: str, p: Tensor, values: Tensors, layout: Layout) -> Tensor:
        """One of them."""
        return self.slots[name].init(p, {**values, **self.options()}, layout)

    def kind(self, layout: Layout) -> Hashable:
        """What it may take notice of in tensors, beside their shapes."""
        if "layout" not in self.needs:
            return ()
        found = getattr(self.update, "kind", None)
        kind: Hashable = layout.names if found is None else found(layout)
        return kind

    def slot_shape(self, name: str, unit: Layout) -> torch.Size:
        """The shape of a slot of one tensor."""
        return _slot_shape(self.slots[name], unit, tuple(self.options().items()))

    def __call__(
        self,
        p: Tensor,
        g: Tensor,
        s: Tensors,
        t: Tensor,
        values: Tensors,
        *,
        loss: Tensor | None = None,
        layout: Layout | None = None,
    ) -> tuple[Tensor, Tensors]:
        """One step on one unit; nothing is changed in place."""
        given: dict[str, object] = {}
        if "loss" in self.needs:
            if loss is None:
                raise ValueError(
                    f"{self.name} needs the loss that the gradient is of, and was given none"
                )
            given["loss"] = loss
        if "layout" in self.needs:
            given["layout"] = layout or Layout.alone(p.shape)
        p, after = self.update(p, g, s, t, **given, **values, **self.options())
        # In the order of the declaration, by which adjoints of slots find theirs.
        return p, {name: after[name] for name in self.slots}


@lru_cache(maxsize=2**14)
def _slot_shape(slot: Slot, unit: Layout, options: tuple[tuple[str, object], ...]) -> torch.Size:
    # By a weight without memory: a slot's start says its shape, and nothing else has to.
    (shape,) = unit.shapes
    return slot.init(torch.empty(shape, device="meta"), _Ones(options), unit).shape


class _Ones(dict[str, Any]):
    """Any hyperparameter is 1."""

    def __missing__(self, name: str) -> Tensor:
        return torch.ones(())


def rule(
    title: str,
    *,
    slots: Mapping[str, Slot] | None = None,
    over: Over = "element",
    needs: tuple[Need, ...] = (),
    readout: Readout | None = None,
    check: Callable[[Mapping[str, object]], str | None] | None = None,
    **declared: Hyper | Discrete,
) -> Callable[[Callable[..., tuple[Tensor, Tensors]]], Rule]:
    """Declare an update rule; the function's own docstring, or its module's, is its citation.

    Args:
        title: of its torch.optim class, such as "AdamW"; the function's name is the rule's.
        slots: its buffers of state by name, such as {"m": zeros}.
        over: the smallest unit it acts on, "element", "tensor" or "model".
        needs: what else the function takes: "loss", "layout".
        readout: (p, s, values, layout) -> the weights to use, where they are not p.
        check: (values and options) -> what is wrong with them, or None.
        declared: a Hyper, Choice or Integer for everything else that the function takes.
    """

    def wrap(update: Callable[..., tuple[Tensor, Tensors]]) -> Rule:
        takes = [n for n in list(inspect.signature(update).parameters)[4:] if n not in needs]
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
            doc=inspect.getdoc(update) or inspect.getmodule(update).__doc__ or "",
            needs=needs,
            readout=readout,
        )

    return wrap
