"""Steps of a rule in the memory of a model's own tensors: what the torch forms are made of.

A rule over elements does not care where one tensor ends and the next begins. Long tensors are
stepped in blocks that stay in cache, short ones gathered until there is a block of them: neither
takes more memory than the slots, nor one kernel per tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .flat import flat_readout, flat_step_, initial_slots
from .hyper import Tensors
from .layout import Layout
from .rule import Rule

# Elements of tensors gathered into one vector, on the host and on another device: there, launches
# cost more than memory.
_BUNCH, _BUNCH_AWAY = 2**15, 2**24

# The slots of every parameter, as torch.optim.Optimizer.state holds them.
States = MutableMapping[Tensor, Tensors]


@dataclass(frozen=True)
class Unit:
    """Parameters that a rule steps as one, and their names. whole: those of a model, whose slots
    may belong to all of them.
    """

    params: list[Tensor]
    names: list[str]
    whole: bool = False
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        shapes = tuple(p.shape for p in self.params)
        object.__setattr__(self, "layout", Layout(tuple(self.names), shapes))


def units(rule: Rule, params: Sequence[Tensor], names: Sequence[str]) -> Iterator[Unit]:
    """The parameters as the rule takes them."""
    pairs = list(zip(params, names, strict=True))
    if rule.over == "model":
        if pairs:
            yield Unit(list(params), list(names), whole=True)
        return
    if rule.over == "tensor":
        yield from (Unit([p], [name]) for p, name in pairs)
        return
    bunches: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, str]]] = {}
    for p, name in pairs:
        limit = _BUNCH if p.device.type == "cpu" else _BUNCH_AWAY
        if p.numel() >= limit:
            yield Unit([p], [name])
            continue
        bunch = bunches.setdefault((p.device, p.dtype), [])
        if bunch and sum(q.numel() for q, _ in bunch) + p.numel() > limit:
            yield Unit([q for q, _ in bunch], [n for _, n in bunch])
            bunch.clear()
        bunch.append((p, name))
    for bunch in bunches.values():
        yield Unit([q for q, _ in bunch], [n for _, n in bunch])


@dataclass(frozen=True)
class InPlace:
    """A rule with its values at one step. shared: the slots that are one number for a param group,
    or, of a rule over models, belong to all of it.
    """

    rule: Rule
    values: Tensors
    shared: Tensors

    def step(
        self, unit: Unit, grads: list[Tensor], states: States, t: Tensor, loss: Tensor | None
    ) -> Tensors:
        """Step the parameters of a unit and their slots; the shared ones after it are returned."""
        if len(unit.params) == 1 and not unit.whole:
            return self._alone(unit, grads[0], states, t, loss)
        p, g = _joined(unit.params), _joined(grads)
        slots = self._slots(unit, p, states)
        p, slots = flat_step_(self.rule, unit.layout, p, g, slots, t, self.values, loss=loss)
        _part(unit, p, unit.params)
        return self._keep(unit, slots, states)

    def _alone(
        self, unit: Unit, g: Tensor, states: States, t: Tensor, loss: Tensor | None
    ) -> Tensors:
        (p,) = unit.params
        one = unit.layout.units[0]
        whole = p.view(one.shapes[0])
        slots = states[p] or self.rule.init(whole, self.values, one)
        held = {**slots, **self.shared}
        long = self.rule.over == "element" and all(
            x.is_contiguous() and x.shape == p.shape for x in (p, g, *slots.values())
        )
        if long:
            flat = {n: x.view(-1) if n in slots else x for n, x in held.items()}
            moved, after = flat_step_(
                self.rule, one, p.view(-1), g.view(-1), flat, t, self.values, loss=loss
            )
            after = {n: x.view(p.shape) if n in slots else x for n, x in after.items()}
        else:
            moved, after = self.rule(
                whole, g.view_as(whole), held, t, self.values, loss=loss, layout=one
            )
        # A slot may hold the weights of the step before.
        after = {n: x.clone() if x.data_ptr() == p.data_ptr() else x for n, x in after.items()}
        if moved.data_ptr() != p.data_ptr():
            p.copy_(moved.view_as(p))
        states[p] = {n: x for n, x in after.items() if n not in self.shared}
        return {n: after[n] for n in self.shared}

    def readout(self, unit: Unit, states: States) -> list[Tensor]:
        """The weights to use of every parameter."""
        p = _joined(unit.params)
        if self.rule.over == "tensor":
            slots = {n: x.reshape(-1) for n, x in states[unit.params[0]].items()} | self.shared
        else:
            slots = self._slots(unit, p, states)
        read = flat_readout(self.rule, unit.layout, p, slots, self.values)
        pieces = read.split(unit.layout.sizes)
        return [x.view_as(p) for x, p in zip(pieces, unit.params, strict=True)]

    def _slots(self, unit: Unit, p: Tensor, states: States) -> Tensors:
        """The slots of a unit in flat vectors; those of parameters without any begin."""
        # Of a model's slots those of one number, or of another length, are all with the group.
        new = [q for q in unit.params if not {*states[q], *self.shared} >= {*self.rule.slots}]
        if new and unit.whole:
            return initial_slots(self.rule, unit.layout, p, self.values)
        for q in new:
            states[q] = self.rule.init(q.view(q.shape or (1,)), self.values)
        each = [states[q] for q in unit.params]
        names = (n for n in each[0] if n not in self.shared)
        return {n: _joined([slots[n] for slots in each]) for n in names} | self.shared

    def _keep(self, unit: Unit, slots: Tensors, states: States) -> Tensors:
        """Give every parameter its part of those slots that have an entry per element."""
        rest: Tensors = {}
        for name, x in slots.items():
            if name in self.shared or x.shape != (sum(unit.layout.sizes),):
                rest[name] = x
                continue
            if all(name in states[q] for q in unit.params):
                _part(unit, x, [states[q][name] for q in unit.params])
                continue
            for q, piece in zip(unit.params, x.split(unit.layout.sizes), strict=True):
                # A copy with q's strides: a view would keep all others' memory.
                states[q] = {**states[q], name: torch.empty_like(q, dtype=x.dtype)}
                states[q][name].copy_(piece.view_as(q))
        return rest


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def _part(unit: Unit, flat: Tensor, into: list[Tensor]) -> None:
    pieces = flat.split(unit.layout.sizes)
    shaped = [x.view(shape) for x, shape in zip(pieces, unit.layout.shapes, strict=True)]
    torch._foreach_copy_(into, shaped)


__all__ = ["InPlace", "Unit", "units"]
