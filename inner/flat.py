"""All parameters of a model as one vector, and a rule applied to it.

One vector instead of a list of tensors decides the speed of the inner loop: an elementwise rule is
a handful of kernels however many tensors the model has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .hyper import Tensors
from .rule import Rule


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors in a flat vector, in order."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @staticmethod
    def of(params: Mapping[str, Tensor]) -> Layout:
        return Layout(tuple(params), tuple(p.shape for p in params.values()))

    @property
    def sizes(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([params[name].reshape(-1) for name in self.names])

    def unflatten(self, flat: Tensor) -> Tensors:
        # One split, not a slice per tensor: the backward of a slice fills a whole vector of zeros.
        parts = flat.split(self.sizes)
        return {
            n: x.view(shape) for n, shape, x in zip(self.names, self.shapes, parts, strict=True)
        }

    def spread(self, value: Tensor, like: Tensor) -> Tensor:
        """A hyperparameter of any grain (shared, per tensor, per element) against a flat vector."""
        if value.ndim == 0:
            return value
        if value.numel() != like.numel():
            value = value.repeat_interleave(
                torch.tensor(self.sizes, device=value.device), output_size=like.numel()
            )
        return value.to(like)


def initial_slots(rule: Rule, layout: Layout, p: Tensor, values: Tensors) -> Tensors:
    """The slots of a flat parameter vector before the first step."""
    return rule.init(p, {name: layout.spread(v, p) for name, v in values.items()})


def flat_step(
    rule: Rule, layout: Layout, p: Tensor, g: Tensor, s: Tensors, t: Tensor, values: Tensors
) -> tuple[Tensor, Tensors]:
    """One step of rule on a flat parameter vector: p, g and unshared slots of shape (numel,)."""
    if rule.over == "element":
        return rule(p, g, s, t, {name: layout.spread(v, p) for name, v in values.items()})
    stepped = []
    parts = [_parts(layout, x) for x in (p, g)]
    slots = {n: [x] * len(layout.names) if x.ndim == 0 else _parts(layout, x) for n, x in s.items()}
    grains = {n: _grains(layout, v, p) for n, v in values.items()}
    for i, (part, grad) in enumerate(zip(*parts, strict=True)):
        unit_slots = {name: pieces[i] for name, pieces in slots.items()}
        unit_values = {name: pieces[i] for name, pieces in grains.items()}
        stepped.append(rule(part, grad, unit_slots, t, unit_values))
    new_slots = {
        name: stepped[-1][1][name]
        if s[name].ndim == 0
        else torch.cat([unit[name].reshape(-1) for _, unit in stepped])
        for name in s
    }
    return torch.cat([part.reshape(-1) for part, _ in stepped]), new_slots


# Elements at a time of a step in place: what a rule makes on its way stays in cache.
_BLOCK = 2**14


def flat_step_(
    rule: Rule, layout: Layout, p: Tensor, g: Tensor, s: Tensors, t: Tensor, values: Tensors
) -> tuple[Tensor, Tensors]:
    """flat_step without a graph, the same bits, that may overwrite p and s, which share no memory:
    where they are long, the rule makes no other vectors of their length.
    """
    if rule.over != "element" or p.numel() <= _BLOCK or p.device.type != "cpu":
        return flat_step(rule, layout, p, g, s, t, values)
    spread = {name: layout.spread(v, p) for name, v in values.items()}
    slots = dict(s)
    for at in range(0, p.numel(), _BLOCK):

        def block(x: Tensor, at: int = at) -> Tensor:
            return x[at : at + _BLOCK] if x.ndim else x

        before = {name: block(x) for name, x in s.items()}
        here, values_here = block(p), {name: block(v) for name, v in spread.items()}
        moved, after = rule(here, block(g), before, t, values_here)
        # All are made before any is written: a slot may hold the weights of the step before.
        held = {x.data_ptr() for x in (here, *before.values())}
        writes = [(here, moved)]
        for name, x in after.items():
            if x.ndim:
                writes.append((before[name], x))
            else:
                slots[name] = x
        writes = [(to, x.clone() if x.data_ptr() in held else x) for to, x in writes if to is not x]
        for to, x in writes:
            to.copy_(x)
    return p, slots


def _parts(layout: Layout, flat: Tensor) -> list[Tensor]:
    # A number is shown to rules as a vector of one: 0-dim weights would take the float64 of hypers.
    return [x.view(s or (1,)) for x, s in zip(flat.split(layout.sizes), layout.shapes, strict=True)]


def _grains(layout: Layout, value: Tensor, like: Tensor) -> list[Tensor]:
    if value.ndim == 0:
        return [value] * len(layout.names)
    if value.numel() == like.numel():
        return _parts(layout, value.to(like))
    return list(value.unbind())
