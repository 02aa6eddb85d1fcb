"""Steps of a rule in the memory of a model's own tensors: what the torch forms are made of.

A rule over elements does not care where one tensor ends and the next begins: long tensors are
stepped in blocks that stay in cache, short ones are gathered first, and their slots stay gathered,
each parameter's being a view. Neither takes more memory than the slots, nor a kernel per tensor.
The same goes for a rule over tensors or the model that but for sums over them is one over elements.
Short tensors of one shape are one batch to a rule over tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core.flat import flat_readout, flat_step, initial_slot, joined_slots, split_slots
from ..core.hyper import Tensors
from ..core.layout import Layout
from ..core.rule import Rule
from ..kernels import execute as running
from ..kernels.execute import Running
from ..kernels.trace import Plan, plan_of
from .buckets import States, Unit, joined, parted

# Whether a product and the sum it enters are one kernel, which is faster and rounds once.
FUSED = True


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
        if unit.parts is not None:
            return self._model(unit, given, states)
        grads: list[Tensor] = given  # type: ignore[assignment]  # what has none is in no other unit
        if self.rule.over == "tensor":
            return self._tensors(unit, grads, states)
        if (here := self._running_of(unit.params[0])) is not None:
            self._pass(unit, grads, states, here)
            return here.shared
        return self._one_by_one(unit, grads, states)

    def _one_by_one(self, unit: Unit, grads: list[Tensor], states: States) -> Tensors:
        after = self.shared
        for p, name, g in zip(unit.params, unit.names, grads, strict=True):
            after = self._out_of_place(p, name, g, states)
        return after

    def _running_of(self, p: Tensor) -> Running | None:
        kind = p.dtype, p.device
        if kind not in self._running:
            plan = plan_of(self.rule, *kind)
            if plan is None:
                return None
            self._running[kind] = Running(
                plan, self._t, self._loss, self.values, self.shared, fused=FUSED
            )
        return self._running[kind]

    def _pass(self, unit: Unit, grads: list[Tensor], states: States, here: Running) -> None:
        if len(unit.params) == 1:
            self._long(unit, grads[0], states, here)
        else:
            self._bunch(unit, grads, states, here)

    def _long(self, unit: Unit, g: Tensor, states: States, here: Running) -> None:
        """One tensor, in its own memory."""
        (p,), (own,) = unit.params, self._own(unit, states, here.slots)
        held = (p, g, *(own[n] for n in here.slots))
        flat = [x.reshape(-1) for x in held]
        here.step(flat)
        for x, moved in zip(held, flat, strict=True):
            # A tensor that does not lie in one piece, as of channels_last, is copied there and
            # back.
            if here.writes and x is not g and moved.data_ptr() != x.data_ptr():
                x.copy_(moved.view_as(x))

    def _bunch(self, unit: Unit, grads: list[Tensor], states: States, here: Running) -> None:
        """Short tensors, gathered."""
        if (*unit.flat,) != here.slots or not unit.holds(states):
            self._gather(unit, states, here.slots)
        g = joined(grads)
        p = joined(unit.params) if here.weights else g
        here.step([p, g, *unit.flat.values()], gathered=True)
        if here.writes and here.weights:
            torch._foreach_copy_(unit.params, parted(p, unit.params))
        elif here.writes:
            torch._foreach_sub_(unit.params, parted(g, unit.params))

    def _gather(self, unit: Unit, states: States, names: Sequence[str]) -> None:
        """Bring the slots of a bunch into vectors."""
        if any(states[q] for q in unit.params):
            each = self._own(unit, states, names)
            unit.flat = {n: joined([slots[n] for slots in each]) for n in names}
        else:
            begun = self._begun(joined(unit.params), "")
            unit.flat = {n: begun.pop(n) for n in names}
            each = [begun] * len(unit.params)
        unit.views = {n: parted(x, unit.params) for n, x in unit.flat.items()}
        # What has no entry, for it is of another option, stays.
        unit.lend(states, each)

    def _own(self, unit: Unit, states: States, names: Sequence[str]) -> list[Tensors]:
        """The slots of every parameter. They begin if it has none, and one of these that was of an
        option that is in force only now begins now.
        """
        due = [n for n in self.rule.slots if n not in self.shared]
        for p, name in zip(unit.params, unit.names, strict=True):
            own = states[p]
            if not all(n in own for n in due) or not all(own[n].numel() for n in names):
                states[p] = self._begun(p, name) | {n: x for n, x in own.items() if x.numel()}
        return [states[p] for p in unit.params]

    def _begun(self, p: Tensor, name: str) -> Tensors:
        one = Layout.alone(p.shape, name)
        slots = self.rule.init(p.view(one.shapes[0]), self.values, one)
        own = {n: x for n, x in slots.items() if n not in self.shared}
        # It is going to be written into, so no entry may stand for several.
        whole = {n: x.contiguous() for n, x in own.items() if x.shape == one.shapes[0]}
        return own | {n: x.view(p.shape) for n, x in whole.items()}

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

    def _tensors(self, unit: Unit, grads: list[Tensor], states: States) -> Tensors:
        """One tensor, or several of a kind, each as a whole; the shared slots after it."""
        if len(unit.params) > 1:
            after = self._stack(unit, grads, states) if unit.batched else None
            return self._one_by_one(unit, grads, states) if after is None else after
        (p,), (name,), (g,) = unit.params, unit.names, grads
        plan = None
        # What does not lie in one piece would be copied in every pass.
        if p.numel() >= running.LONG and p.is_contiguous():
            plan = self._planned(unit, p)
        if plan is None:
            return self._out_of_place(p, name, g, states)
        (own,) = self._own(unit, states, plan.slots)
        after = self._passes(plan, [unit], {p: g}, states, {**own, **self.shared})
        states[p].update((n, x) for n, x in after.items() if n not in self.shared)
        return {n: after[n] for n in self.shared}

    def _stack(self, unit: Unit, grads: list[Tensor], states: States) -> Tensors | None:
        """Tensors of a kind as one batch; None, and nothing done, if the rule cannot be batched."""
        one = Layout.alone(unit.params[0].shape, unit.names[0])
        if not unit.flat or not unit.holds(states):
            each = self._own(unit, states, ())
            unit.flat = {n: torch.stack([own[n] for own in each]) for n in each[0]}
            unit.views = {n: list(x.unbind()) for n, x in unit.flat.items()}
            unit.lend(states, each)
        shape = (len(unit.params), *one.shapes[0])

        def step(p: Tensor, g: Tensor, own: Tensors) -> tuple[Tensor, Tensors, Tensors]:
            moved, after = self.rule(
                p, g, {**own, **self.shared}, self._t, self.values, loss=self._loss, layout=one
            )
            if any(after[n].shape != x.shape or after[n].dtype != x.dtype for n, x in own.items()):
                raise TypeError("a slot that changes its shape or dtype has no place in a batch")
            return moved, {n: after[n] for n in own}, {n: after[n] for n in self.shared}

        try:
            p, after, shared = torch.vmap(step, out_dims=(0, 0, None))(  # type: ignore[arg-type]  # None: no batch
                joined(unit.params).view(shape), joined(grads).view(shape), unit.flat
            )
        except Exception:  # A branch on a value, say; one by one it will tell what is wrong.
            unit.batched, unit.flat, unit.views = False, {}, {}
            return None
        torch._foreach_copy_(unit.params, parted(p.reshape(-1), unit.params))
        for n, x in after.items():
            unit.flat[n].copy_(x)
        return shared

    def _passes(
        self,
        plan: Plan,
        parts: Sequence[Unit],
        grads: Mapping[Tensor, Tensor],
        states: States,
        shared: Tensors,
    ) -> Tensors:
        """All of a step over parts of a tensor or a model; its shared slots after it."""
        here = Running(plan, self._t, self._loss, self.values, shared, fused=FUSED)
        going = True
        while going:
            for part in parts:
                self._pass(part, [grads[p] for p in part.params], states, here)
            going = here.on()
        return here.shared

    def _planned(self, unit: Unit, p: Tensor) -> Plan | None:
        """The plan of a tensor or a model like p."""
        key = (p.dtype, p.device, *self.rule.options().values())
        if key not in unit.plans:
            layout = unit.layout if unit.parts is not None else Layout.alone(p.shape, unit.names[0])
            unit.plans[key] = plan_of(self.rule, p.dtype, p.device, layout)
        return unit.plans[key]

    def _model(self, unit: Unit, grads: list[Tensor | None], states: States) -> Tensors:
        """A param group as one vector; the slots after it that are not one entry per element."""
        alike = len({(p.dtype, p.device) for p in unit.params}) == 1
        plan = self._planned(unit, unit.params[0]) if alike else None
        if plan is not None:
            given = {p: g for p, g in zip(unit.params, grads, strict=True) if g is not None}
            self.shared = self._begun_shared(unit, plan.shared)
            after = self._passes(plan, unit.parts or (), given, states, self.shared)
            return {**self.shared, **after}
        pairs = list(zip(unit.params, grads, strict=True))
        p = joined(unit.params)
        g = joined([torch.zeros_like(q) if grad is None else grad for q, grad in pairs])
        slots = self._joined_slots(unit, p, states)
        p, after = flat_step(
            self.rule, unit.layout, p, g, slots, self._t, self.values, loss=self._loss
        )
        parts = zip(pairs, parted(p, unit.params), strict=True)
        moved = [(q, x) for (q, grad), x in parts if grad is not None]
        torch._foreach_copy_([q for q, _ in moved], [x for _, x in moved])
        each, whole = split_slots(unit.layout, p, after)
        for q, own in zip(unit.params, each, strict=True):
            # A view would keep all others' memory.
            states[q].update((n, x.clone()) for n, x in own.items())
        return whole

    def _begun_shared(self, unit: Unit, names: Sequence[str]) -> Tensors:
        """What is kept by all of a model, also what begins only now."""
        late = [n for n in names if n not in self.shared]
        if not late:
            return self.shared
        p = joined(unit.params)
        begun = {n: initial_slot(self.rule, n, unit.layout, p, self.values) for n in late}
        return {**self.shared, **begun}

    def readout(self, unit: Unit, states: States) -> list[Tensor]:
        """The weights to use of every parameter."""
        p = joined(unit.params)
        slots = self._joined_slots(unit, p, states)
        return parted(flat_readout(self.rule, unit.layout, p, slots, self.values), unit.params)

    def _joined_slots(self, unit: Unit, p: Tensor, states: States) -> Tensors:
        each = [states[q] for q in unit.params]
        return joined_slots(self.rule, unit.layout, p, each, self.shared, self.values)


__all__ = ["InPlace"]
