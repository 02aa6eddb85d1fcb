"""Steps of a rule in the memory of a model's own tensors: what the torch forms are made of.

A rule over elements does not care where one tensor ends and the next begins: long tensors are
stepped in blocks that stay in cache, short ones are gathered first, and their slots stay gathered,
each parameter's being a view. Neither takes more memory than the slots, nor a kernel per tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .flat import flat_readout, flat_step, joined_slots, parted_slots
from .hyper import Tensors
from .layout import Layout
from .plan import Running, plan_of
from .rule import Rule

# Elements of tensors gathered into one vector, on the host and on another device: there, launches
# cost more than memory.
_BUNCH, _BUNCH_AWAY = 2**16, 2**24
# Whether a product and the sum it enters are one kernel, which is faster and rounds once.
FUSED = True

# The slots of every parameter, as torch.optim.Optimizer.state holds them.
States = MutableMapping[Tensor, Tensors]


@dataclass
class Unit:
    """Parameters that a rule steps as one, their names, and where they stand in their group. whole:
    those of a model, whose slots may belong to all of them. flat: slots in one vector each, of
    which the parameters have views.
    """

    params: list[Tensor]
    names: list[str]
    at: list[int]
    whole: bool = False
    layout: Layout = field(init=False)
    flat: Tensors = field(default_factory=dict)
    views: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layout = Layout(tuple(self.names), tuple(p.shape for p in self.params))


def units(
    rule: Rule, params: Sequence[Tensor], names: Sequence[str], moving: Sequence[bool]
) -> Iterator[Unit]:
    """The parameters that move, as the rule takes them; all of them if it takes them as one. Those
    without an element are in none.
    """
    if rule.over == "model":
        some = [i for i, p in enumerate(params) if p.numel()]
        yield _unit(params, names, some, whole=True)
        return
    bunches: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    sizes: dict[tuple[torch.device, torch.dtype], int] = {}
    for i, p in enumerate(params):
        kind, size = (p.device, p.dtype), p.numel()
        limit = _BUNCH if p.device.type == "cpu" else _BUNCH_AWAY
        if not moving[i]:
            continue
        if rule.over == "tensor" or size >= limit:
            yield _unit(params, names, [i])
            continue
        if sizes.get(kind, 0) + size > limit:
            yield _unit(params, names, bunches.pop(kind))
            sizes[kind] = 0
        bunches.setdefault(kind, []).append(i)
        sizes[kind] = sizes.get(kind, 0) + size
    for at in bunches.values():
        yield _unit(params, names, at)


def _unit(
    params: Sequence[Tensor], names: Sequence[str], at: Sequence[int], *, whole: bool = False
) -> Unit:
    return Unit([params[i] for i in at], [names[i] for i in at], list(at), whole)


class InPlace:
    """A rule at one step. shared: the slots that are one number for a param group, or, of a rule
    over models, belong to all of it.
    """

    def __init__(
        self,
        rule: Rule,
        values: Tensors,
        shared: Tensors,
        t: Tensor | None = None,
        loss: Tensor | None = None,
    ) -> None:
        self.rule, self.values, self.shared = rule, values, shared
        self._t = torch.ones((), dtype=torch.float64) if t is None else t
        self._loss = loss
        self._running: dict[tuple[torch.dtype, torch.device], Running] = {}

    def step(self, unit: Unit, given: list[Tensor | None], states: States) -> Tensors:
        """Step the parameters of a unit and their slots; the shared ones after it are returned.
        Those of a model without a gradient are left where they are.
        """
        if unit.whole:
            return self._model(unit, given, states)
        grads: list[Tensor] = given  # type: ignore[assignment]  # what has none is in no other unit
        if self.rule.over == "tensor" or (running := self._plan(unit.params[0])) is None:
            after = self.shared
            for p, name, g in zip(unit.params, unit.names, grads, strict=True):
                after = self._out_of_place(p, name, g, states)
            return after
        if len(unit.params) == 1:
            self._long(unit.params[0], grads[0], states, running)
        else:
            self._bunch(unit, grads, states, running)
        return running.shared

    def _plan(self, p: Tensor) -> Running | None:
        kind = p.dtype, p.device
        if kind not in self._running:
            plan = plan_of(self.rule, *kind)
            if plan is None:
                return None
            self._running[kind] = Running(
                plan, self._t, self._loss, self.values, self.shared, fused=FUSED
            )
        return self._running[kind]

    def _long(self, p: Tensor, g: Tensor, states: States, running: Running) -> None:
        """One tensor, in its own memory."""
        own = self._own(p, states, running)
        held = (p, g, *(own[n] for n in running.slots))
        flat = [x.reshape(-1) for x in held]
        running.step(flat)
        for x, moved in zip(held, flat, strict=True):
            # A tensor that does not lie in one piece, as of channels_last, is copied there and
            # back.
            if x is not g and moved.data_ptr() != x.data_ptr():
                x.copy_(moved.view_as(x))

    def _bunch(self, unit: Unit, grads: list[Tensor], states: States, running: Running) -> None:
        """Short tensors, gathered."""
        if [*unit.flat] != running.slots or not all(
            states[q].get(n) is x
            for n, views in unit.views.items()
            for q, x in zip(unit.params, views, strict=True)
        ):
            self._gather(unit, states, running)
        p = _joined(unit.params)
        running.step([p, _joined(grads), *unit.flat.values()])
        torch._foreach_copy_(unit.params, _parted(p, unit.params))

    def _gather(self, unit: Unit, states: States, running: Running) -> None:
        each = [self._own(q, states, running) for q in unit.params]
        unit.flat = {n: _joined([slots[n] for slots in each]) for n in running.slots}
        unit.views = {n: _parted(x, unit.params) for n, x in unit.flat.items()}
        for i, (q, slots) in enumerate(zip(unit.params, each, strict=True)):
            # What has no entry, for it is of another option, stays.
            states[q] = {**slots, **{n: views[i] for n, views in unit.views.items()}}

    def _own(self, p: Tensor, states: States, running: Running) -> Tensors:
        """The slots of a parameter. They begin if it has none, and one that was of an option that
        is in force only now begins now.
        """
        own = states[p]
        if running.slots and not all(n in own and own[n].numel() for n in running.slots):
            begun = {n: x for n, x in self._begun(p, "").items() if n not in self.shared}
            states[p] = begun | {n: x for n, x in own.items() if x.numel()}
        return states[p]

    def _begun(self, p: Tensor, name: str) -> Tensors:
        one = Layout.alone(p.shape, name)
        slots = self.rule.init(p.view(one.shapes[0]), self.values, one)
        return {n: x.view(p.shape) if x.shape == one.shapes[0] else x for n, x in slots.items()}

    def _out_of_place(self, p: Tensor, name: str, g: Tensor, states: States) -> Tensors:
        """One tensor by the rule as it is written; the shared slots after it."""
        one = Layout.alone(p.shape, name)
        unit = p.view(one.shapes[0])
        own = states[p] or self.rule.init(unit, self.values, one)
        before = {**own, **self.shared}
        moved, after = self.rule(
            unit, g.view_as(unit), before, self._t, self.values, loss=self._loss, layout=one
        )
        # A slot may hold the weights of the step before, or the gradient, into which the next one
        # may be added.
        given = {x.untyped_storage().data_ptr() for x in (p, g)}
        after = {
            n: x.clone() if x.untyped_storage().data_ptr() in given else x for n, x in after.items()
        }
        p.copy_(moved.view_as(p))
        states[p] = {n: x for n, x in after.items() if n not in self.shared}
        return {n: after[n] for n in self.shared}

    def _model(self, unit: Unit, grads: list[Tensor | None], states: States) -> Tensors:
        """A param group as one vector; the slots after it that are not one entry per element."""
        pairs = list(zip(unit.params, grads, strict=True))
        p = _joined(unit.params)
        g = _joined([torch.zeros_like(q) if grad is None else grad for q, grad in pairs])
        slots = self._joined_slots(unit, p, states)
        p, after = flat_step(
            self.rule, unit.layout, p, g, slots, self._t, self.values, loss=self._loss
        )
        parts = zip(pairs, _parted(p, unit.params), strict=True)
        moved = [(q, x) for (q, grad), x in parts if grad is not None]
        torch._foreach_copy_([q for q, _ in moved], [x for _, x in moved])
        each, whole = parted_slots(unit.layout, p, after)
        for q, own in zip(unit.params, each, strict=True):
            # A view would keep all others' memory.
            states[q].update((n, x.clone()) for n, x in own.items())
        return whole

    def readout(self, unit: Unit, states: States) -> list[Tensor]:
        """The weights to use of every parameter."""
        p = _joined(unit.params)
        slots = self._joined_slots(unit, p, states)
        return _parted(flat_readout(self.rule, unit.layout, p, slots, self.values), unit.params)

    def _joined_slots(self, unit: Unit, p: Tensor, states: States) -> Tensors:
        each = [states[q] for q in unit.params]
        return joined_slots(self.rule, unit.layout, p, each, self.shared, self.values)


# torch's own for gradients in buckets: no call from Python per tensor.


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    joined: Tensor = _flatten_dense_tensors(tensors)
    return joined


def _parted(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A flat vector in the shapes of tensors."""
    return list(_unflatten_dense_tensors(flat, like))


__all__ = ["InPlace", "Unit", "units"]
