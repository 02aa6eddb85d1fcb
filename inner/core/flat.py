"""All parameters of a model as one vector, and a rule applied to it.

One vector instead of a list of tensors decides the speed of the inner loop: an elementwise rule is
a handful of kernels however many tensors the model has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .hyper import Tensors
from .layout import Layout
from .rule import Rule

# Elements of a long vector that are done at a time.
BLOCK = 2**17


def initial_slots(rule: Rule, layout: Layout, p: Tensor, values: Tensors) -> Tensors:
    """The slots of a flat parameter vector before the first step. Those of a rule over tensors are
    the tensors' own, one after another in a flat vector.
    """
    return {name: initial_slot(rule, name, layout, p, values) for name in rule.slots}


def initial_slot(rule: Rule, name: str, layout: Layout, p: Tensor, values: Tensors) -> Tensor:
    """One of them."""
    if rule.over == "tensor" and not rule.slots[name].shared:
        units = zip(_parts(p, layout), _values(layout, values, p), layout.units, strict=True)
        return torch.cat([rule.begin(name, *unit).reshape(-1) for unit in units])
    return rule.begin(name, p, values if _raw(rule) else layout.all_per_element(values, p), layout)


def joined_slots(
    rule: Rule, layout: Layout, p: Tensor, each: Sequence[Tensors], whole: Tensors, values: Tensors
) -> Tensors:
    """The slots of a flat parameter vector from those of every tensor and of the whole model; they
    begin where there are none.
    """
    slots: Tensors = {}
    for name in rule.slots:
        held = [own.get(name) for own in each]
        if name in whole:
            slots[name] = whole[name]
        elif all(x is not None for x in held):
            slots[name] = torch.cat([x.reshape(-1) for x in held if x is not None])
        else:
            begun = slots[name] = initial_slot(rule, name, layout, p, values)
            if begun.shape == p.shape:
                pairs = zip(held, layout.split(begun), strict=True)
                slots[name] = torch.cat([(x if y is None else y).reshape(-1) for y, x in pairs])
    return slots


def split_slots(layout: Layout, p: Tensor, s: Tensors) -> tuple[list[Tensors], Tensors]:
    """(the slots of every tensor, those of the whole model, without an entry per element)"""
    whole = {n: x for n, x in s.items() if x.shape != p.shape}
    parts = {n: layout.split(x) for n, x in s.items() if n not in whole}
    return [{n: x[i] for n, x in parts.items()} for i in range(len(layout.names))], whole


def flat_step(
    rule: Rule,
    layout: Layout,
    p: Tensor,
    g: Tensor,
    s: Tensors,
    t: Tensor,
    values: Tensors,
    *,
    loss: Tensor | None = None,
) -> tuple[Tensor, Tensors]:
    """One step of rule on a flat parameter vector: p, g and slots as `initial_slots` makes them.
    loss: that g is the gradient of, for rules that need it.
    """
    if rule.over != "tensor":
        values = values if _raw(rule) else layout.all_per_element(values, p)
        return rule(p, g, s, t, values, loss=loss, layout=layout)
    stepped = [
        rule(part, grad, slots, t, own, loss=loss, layout=unit)
        for grad, (part, slots, own, unit) in zip(
            _parts(g, layout), _tensors(rule, layout, p, s, values), strict=True
        )
    ]
    after = {name: [slots[name] for _, slots in stepped] for name in s}
    new_slots = {
        name: pieces[-1] if s[name].ndim == 0 else torch.cat([x.reshape(-1) for x in pieces])
        for name, pieces in after.items()
    }
    return torch.cat([part.reshape(-1) for part, _ in stepped]), new_slots


def flat_readout(rule: Rule, layout: Layout, p: Tensor, s: Tensors, values: Tensors) -> Tensor:
    """The weights to use after training, where they are not p."""
    if rule.readout is None:
        return p
    if rule.over != "tensor":
        values = values if _raw(rule) else layout.all_per_element(values, p)
        return rule.readout(p, s, values, layout)
    return torch.cat(
        [
            rule.readout(part, slots, own, unit).reshape(-1)
            for part, slots, own, unit in _tensors(rule, layout, p, s, values)
        ]
    )


def _tensors(
    rule: Rule, layout: Layout, p: Tensor, s: Tensors, values: Tensors
) -> Iterator[tuple[Tensor, Tensors, Tensors, Layout]]:
    """The weights, slots, hypers and layout of each tensor."""
    slots, own = _slots(rule, layout, s), _values(layout, values, p)
    return zip(_parts(p, layout), slots, own, layout.units, strict=True)


def _raw(rule: Rule) -> bool:
    """Whether a rule takes hypers in their own granularity, to hand them on."""
    return rule.over == "model" and "layout" in rule.needs


def _parts(flat: Tensor, layout: Layout) -> list[Tensor]:
    shapes = (unit.shapes[0] for unit in layout.units)
    return [x.view(shape) for x, shape in zip(flat.split(layout.sizes), shapes, strict=True)]


def _slots(rule: Rule, layout: Layout, s: Tensors) -> list[Tensors]:
    """The slots of each tensor."""
    each: list[Tensors] = [{} for _ in layout.names]
    for name, x in s.items():
        if x.ndim == 0:
            pieces = [x] * len(each)
        elif rule.slots[name].shared:
            pieces = _parts(x, layout)
        else:
            shapes = [rule.slot_shape(name, unit) for unit in layout.units]
            flat = x.split([shape.numel() for shape in shapes])
            pieces = [part.view(shape) for part, shape in zip(flat, shapes, strict=True)]
        for own, piece in zip(each, pieces, strict=True):
            own[name] = piece
    return each


def _values(layout: Layout, values: Tensors, like: Tensor) -> list[Tensors]:
    """The hypers of each tensor."""
    split = {
        name: layout.per_tensor(v.to(like) if v.numel() == like.numel() and v.ndim else v)
        for name, v in values.items()
    }
    return [{name: each[i] for name, each in split.items()} for i in range(len(layout.names))]


def flat_step_(
    rule: Rule,
    layout: Layout,
    p: Tensor,
    g: Tensor,
    s: Tensors,
    t: Tensor,
    values: Tensors,
    *,
    loss: Tensor | None = None,
    block: int = BLOCK,
) -> tuple[Tensor, Tensors]:
    """flat_step without a graph, the same bits, that may overwrite p and s, which share no memory:
    of a long vector on the host, of a rule over elements with one number per hyper, it makes no
    others of that length. block: the elements that it does at a time.
    """
    numbers = all(value.ndim == 0 for value in values.values())
    if rule.over == "element" and numbers and p.numel() > block and p.device.type == "cpu":
        return step_blocks(rule, p, g, s, t, values, loss=loss, block=block)
    return flat_step(rule, layout, p, g, s, t, values, loss=loss)


def step_blocks(
    rule: Rule,
    p: Tensor,
    g: Tensor,
    s: Tensors,
    t: Tensor,
    values: Tensors,
    *,
    loss: Tensor | None = None,
    block: int = BLOCK,
) -> tuple[Tensor, Tensors]:
    """One step of a rule over elements in the memory of p and s, block by block, so that what is
    made on the way stays in cache. A slot that changes its type or shape is a new tensor.
    """
    long = [n for n, x in s.items() if x.shape == p.shape]
    whole = {n: x for n, x in s.items() if n not in long}
    after: Tensors = {}
    made: dict[str, list[Tensor]] = {}
    parts = zip(p.split(block), g.split(block), *(s[n].split(block) for n in long), strict=True)
    for here, grad, *slots in parts:
        own = dict(zip(long, slots, strict=True))
        moved, after = rule(here, grad, own | whole, t, values, loss=loss)
        kept = overwrite(own, after, (here, grad))
        here.copy_(moved)
        for n, x in kept.items():
            if x is not own[n]:
                made.setdefault(n, []).append(x)
    return p, {n: torch.cat(made[n]) if n in made else s[n] if n in long else after[n] for n in s}


def overwrite(held: Tensors, after: Tensors, others: Sequence[Tensor] = ()) -> Tensors:
    """The slots after a step, written into those before it where type and shape are the same.
    others: tensors that a new one must not share its memory with either.
    """
    memory = {x.untyped_storage().data_ptr() for x in (*held.values(), *others)}
    # Read before anything is written: a slot may become another one.
    new = {
        n: after[n].clone()
        if after[n] is not x and after[n].untyped_storage().data_ptr() in memory
        else after[n]
        for n, x in held.items()
    }
    for n, x in held.items():
        if new[n] is not x and (new[n].shape, new[n].dtype) == (x.shape, x.dtype):
            new[n] = x.copy_(new[n])
    return new


__all__ = [
    "flat_readout",
    "flat_step",
    "flat_step_",
    "initial_slot",
    "initial_slots",
    "joined_slots",
    "overwrite",
    "split_slots",
    "step_blocks",
]
