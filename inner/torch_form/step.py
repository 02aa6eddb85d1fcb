"""Steps of a rule in the memory of a model's own tensors: what the torch forms are made of.

A rule over elements does not care where one tensor ends and the next begins: long tensors are
stepped in blocks that stay in cache, short ones are gathered first, and their slots stay gathered,
each parameter's being a view. Neither takes more memory than the slots, nor a kernel per tensor.
Short tensors of one shape are one batch to a rule over tensors; to one over the model, all are one
vector. Compiled, each of these is one generated kernel or a few (compiled.py).
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..core.flat import flat_readout, flat_step, joined_slots, overwrite, step_blocks
from ..core.hyper import Tensors
from ..core.layout import Layout
from ..core.rule import Rule
from ..fx_graph import first_line
from ..torch_internals import foreach_copy
from .buckets import Bucket, States, StepConfig, joined, split_like
from .compiled import CompiledStep, Numbers, StepKey, compiled_step


class GroupStep(ABC):
    """A rule at one step of a param group.

    shared: the slots that are one number for a param group, or, of a rule over models, belong to
    all of it. compiled: whether to generate code where that can be. told: why it could not be, as
    far as users were told.
    """

    def __init__(
        self,
        rule: Rule,
        values: Tensors,
        shared: Tensors,
        config: StepConfig,
        t: Tensor | None = None,
        loss: Tensor | None = None,
        *,
        compiled: bool = False,
        told: set[str] | None = None,
    ) -> None:
        self.rule, self.values, self.shared, self.config = rule, values, shared, config
        self.t = torch.ones((), dtype=torch.float64) if t is None else t
        self.loss, self.compiled = loss, compiled
        self._told = set[str]() if told is None else told
        self._numbers: dict[CompiledStep, Numbers] = {}
        # Slots that belong to other options than those in force.
        self._idle = set[str]()

    @abstractmethod
    def __call__(self, bucket: Bucket, grads: Sequence[Tensor | None], states: States) -> Tensors:
        """Step the parameters of a bucket and their slots; the shared ones after it are returned.
        Those of a model without a gradient are left where they are.
        """

    def readout(self, bucket: Bucket, states: States) -> list[Tensor]:
        """The weights to use of every parameter."""
        p = joined(bucket.params)
        each = [states[q] for q in bucket.params]
        slots = joined_slots(self.rule, bucket.layout, p, each, self.shared, self.values)
        read = flat_readout(self.rule, bucket.layout, p, slots, self.values)
        return split_like(read, bucket.params)

    def own(self, p: Tensor, name: str, states: States) -> Tensors:
        """A parameter's slots, those of a number in the shape of a vector of one. They begin if it
        has none, and one of an option that is in force only now begins now.
        """
        unit, own = Layout.alone(p.shape, name), states[p]
        due = [n for n in self.rule.slots if n not in self.shared]
        late = [n for n in due if n not in own or not (own[n].numel() or n in self._idle)]
        if late:
            like = p.view(unit.shapes[0])
            begun = {n: self.rule.begin(n, like, self.values, unit) for n in late}
            self._idle |= {n for n, x in begun.items() if not x.numel()}
            # It is going to be written into, so no entry may stand for several.
            whole = {n: x.contiguous() for n, x in begun.items() if x.shape == like.shape}
            states[p] = own | begun | whole
        return {n: states[p][n] for n in due}

    def run_compiled(
        self, p: Tensor, g: Tensor, slots: Tensors, layout: Layout, *, stacked: bool = False
    ) -> Tensors | None:
        """One step by generated code, in the memory of p and slots; the shared slots after it.
        None, and nothing done, where there is no such code; why is told once.
        """
        if not self.compiled or p.numel() < self.config.compile_from:
            return None
        step = compiled_step(StepKey.of(self.rule, p, slots, self.shared, layout, stacked=stacked))
        if isinstance(step, CompiledStep):
            if step not in self._numbers:
                self._numbers[step] = step.numbers(self.t, self.values, self.shared, self.loss)
            after = step(p, g, slots, self._numbers[step])
            if after is not None:
                return after
        reason = step if isinstance(step, str) else step.refused
        self._warn(f"a step of {self.rule.title} with compile=True is not compiled: {reason}")
        return None

    def _warn(self, slow: str) -> None:
        """Say once that a slower way was taken, and why."""
        if slow not in self._told:
            self._told.add(slow)
            warnings.warn(slow, UserWarning, stacklevel=2)


class ElementStep(GroupStep):
    """Of a rule over elements."""

    def __call__(self, bucket: Bucket, grads: Sequence[Tensor | None], states: States) -> Tensors:
        given = [g for g in grads if g is not None]
        if len(given) > 1 and self._lasting is not None:
            return self._gathered(bucket, given, states, self._lasting)
        after = self.shared
        for p, name, g in zip(bucket.params, bucket.names, given, strict=True):
            after = self._alone(p, name, g, states)
        return after

    def _alone(self, p: Tensor, name: str, g: Tensor, states: States) -> Tensors:
        """One tensor, in its own memory."""
        own = self.own(p, name, states)
        long = {n: own[n] for n, shape in self._shapes.items() if shape == _SOME.shapes[0]}
        # A tensor that does not lie in one piece, as of channels_last, is copied there and back.
        flat, slots = p.reshape(-1), {n: x.reshape(-1) for n, x in long.items()}
        after, shared = self._move(flat, g.reshape(-1), {**own, **slots})
        if flat.data_ptr() != p.data_ptr():
            p.copy_(flat.view_as(p))
        for n, x in own.items():
            if n not in long:
                states[p][n] = after[n]
            elif after[n] is not slots[n]:
                states[p][n] = after[n].view(p.shape)
            elif slots[n].data_ptr() != x.data_ptr():
                x.copy_(after[n].view_as(x))
        return shared

    def _gathered(
        self, bucket: Bucket, grads: list[Tensor], states: States, lasting: list[str]
    ) -> Tensors:
        """Short tensors in one vector, as their slots already are."""
        if [*bucket.flat] != lasting or not bucket.owns_state(states):
            self._gather(bucket, states, lasting)
        p = joined(bucket.params)
        # What has no entry, for it is of another option, is the same of all.
        first = states.get(bucket.params[0], {})
        idle = {n: x for n, x in first.items() if n not in bucket.flat}
        after, shared = self._move(p, joined(grads), {**idle, **bucket.flat})
        foreach_copy(bucket.params, split_like(p, bucket.params))
        if any(after[n] is not x for n, x in bucket.flat.items()):
            bucket.hold({n: after[n] for n in bucket.flat}, states)
        return shared

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        """Those of the slots of a short vector, but for shared ones, under the options in force."""
        own = (n for n in self.rule.slots if n not in self.shared)
        p = torch.zeros(_SOME.shapes[0])
        return {n: self.rule.begin(n, p, self.values, _SOME).shape for n in own}

    @cached_property
    def _lasting(self) -> list[str] | None:
        """The slots with an entry per element, under the options in force; None if a tensor has one
        of another kind to itself, and cannot be a part of a vector.
        """
        if any(shape.numel() and shape != _SOME.shapes[0] for shape in self._shapes.values()):
            return None
        return [n for n, shape in self._shapes.items() if shape.numel()]

    def _move(self, p: Tensor, g: Tensor, slots: Tensors) -> tuple[Tensors, Tensors]:
        """(the slots after a step, the shared ones); p is written into."""
        shared = self.run_compiled(p, g, slots, Layout.alone(p.shape))
        if shared is not None:
            return slots, shared
        held = {**slots, **self.shared}
        _, after = step_blocks(
            self.rule, p, g, held, self.t, self.values, loss=self.loss, block=self.config.block
        )
        return {n: after[n] for n in slots}, {n: after[n] for n in self.shared}

    def _gather(self, bucket: Bucket, states: States, lasting: list[str]) -> None:
        """Bring the slots of a bucket into vectors."""
        if any(states.get(q) for q in bucket.params):
            pairs = zip(bucket.params, bucket.names, strict=True)
            each = [self.own(q, name, states) for q, name in pairs]
            flat = {n: joined([own[n] for own in each]) for n in lasting}
        else:
            # One start for all is a kernel per slot, and not per tensor.
            whole = joined(bucket.params)
            made = self.rule.init(whole, self.values)
            begun = {n: x for n, x in made.items() if n not in self.shared}
            flat = {n: begun[n].contiguous() for n in lasting}
            for q in bucket.params:
                states[q] = {n: x for n, x in begun.items() if n not in flat}
        bucket.hold(flat, states)


class TensorStep(GroupStep):
    """Of a rule over tensors."""

    def __call__(self, bucket: Bucket, grads: Sequence[Tensor | None], states: States) -> Tensors:
        given = [g for g in grads if g is not None]
        if len(given) > 1 and bucket.batched:
            after = self._stack(bucket, given, states)
            if after is not None:
                return after
        after = self.shared
        for p, name, g in zip(bucket.params, bucket.names, given, strict=True):
            after = self._one(p, name, g, states)
        return after

    def _one(self, p: Tensor, name: str, g: Tensor, states: States) -> Tensors:
        """One tensor; the shared slots after it."""
        layout = Layout.alone(p.shape, name)
        shape = layout.shapes[0]
        own = self.own(p, name, states)
        if p.is_contiguous() and all(x.is_contiguous() for x in own.values()):
            shared = self.run_compiled(p.view(shape), g.reshape(shape), own, layout)
            if shared is not None:
                return shared
        moved, after = self.rule(
            p.view(shape),
            g.view(shape),
            {**own, **self.shared},
            self.t,
            self.values,
            loss=self.loss,
            layout=layout,
        )
        # A slot may hold the weights of the step before, or the gradient, into which the next one
        # may be added.
        given = {x.untyped_storage().data_ptr() for x in (p, g)}
        kept = {
            n: x.clone() if x.untyped_storage().data_ptr() in given else x
            for n, x in after.items()
            if n not in self.shared
        }
        p.copy_(moved.view_as(p))
        states[p] = kept
        return {n: after[n] for n in self.shared}

    def _stack(self, bucket: Bucket, grads: list[Tensor], states: States) -> Tensors | None:
        """Tensors of a kind as one batch; None, and nothing done, if the rule cannot be batched."""
        one = Layout.alone(bucket.params[0].shape, bucket.names[0])
        if not bucket.flat or not bucket.owns_state(states):
            pairs = zip(bucket.params, bucket.names, strict=True)
            each = [self.own(q, name, states) for q, name in pairs]
            stacks = {n: torch.stack([own[n] for own in each]) for n in each[0]}
            bucket.hold(stacks, states, {n: list(x.unbind()) for n, x in stacks.items()})
        shape = (len(bucket.params), *one.shapes[0])
        p, g = joined(bucket.params).view(shape), joined(grads).view(shape)
        shared = self.run_compiled(p, g, bucket.flat, one, stacked=True)
        if shared is None:
            made = self._batched(bucket, p, g, one)
            if made is None:
                return None
            p, shared = made
        foreach_copy(bucket.params, split_like(p.reshape(-1), bucket.params))
        return shared

    def _batched(
        self, bucket: Bucket, p: Tensor, g: Tensor, one: Layout
    ) -> tuple[Tensor, Tensors] | None:
        """(the weights of a batch after a step, the shared slots), the others in their memory."""

        def step(p: Tensor, g: Tensor, own: Tensors) -> tuple[Tensor, Tensors, Tensors]:
            moved, after = self.rule(
                p, g, {**own, **self.shared}, self.t, self.values, loss=self.loss, layout=one
            )
            if any(after[n].shape != x.shape or after[n].dtype != x.dtype for n, x in own.items()):
                raise TypeError("a slot that changes its shape or type has no place in a batch")
            return moved, {n: after[n] for n in own}, {n: after[n] for n in self.shared}

        try:
            p, after, shared = torch.vmap(step, out_dims=(0, 0, None))(  # type: ignore[arg-type]  # None: no batch
                p, g, bucket.flat
            )
        except Exception as error:  # Whatever a rule does that a batch of tensors cannot.
            self._warn(
                f"{self.rule.title} steps tensors of one shape one by one, which is slower than as "
                f"a batch: {first_line(error)}"
            )
            bucket.take_apart()
            return None
        overwrite(bucket.flat, after)
        return p, shared


class ModelStep(GroupStep):
    """Of a rule over the model, which is all of a param group."""

    def __call__(self, bucket: Bucket, grads: Sequence[Tensor | None], states: States) -> Tensors:
        pairs = list(zip(bucket.params, grads, strict=True))
        p = joined(bucket.params)
        g = joined([torch.zeros_like(q) if grad is None else grad for q, grad in pairs])
        layout = bucket.layout
        if not bucket.flat or not bucket.owns_state(states):
            each = [states[q] for q in bucket.params]
            slots = joined_slots(self.rule, layout, p, each, self.shared, self.values)
            # In memory of their own, for a slot may begin as the weights.
            flat = {n: x.clone() for n, x in slots.items() if x.shape == p.shape}
            bucket.hold(flat, states)
            self.shared = {n: x for n, x in slots.items() if n not in flat}
        shared = self.run_compiled(p, g, bucket.flat, layout)
        if shared is None:
            slots = {**bucket.flat, **self.shared}
            moved, after = flat_step(
                self.rule, layout, p, g, slots, self.t, self.values, loss=self.loss
            )
            kept = overwrite(bucket.flat, after, (p, g))
            if any(x is not bucket.flat[n] for n, x in kept.items()):
                bucket.hold(kept, states)
            p, shared = moved, {n: x for n, x in after.items() if n not in kept}
        parts = zip(pairs, split_like(p, bucket.params), strict=True)
        new = [(q, x) for (q, grad), x in parts if grad is not None]
        foreach_copy([q for q, _ in new], [x for _, x in new])
        return shared


_SOME = Layout.alone(torch.Size([3]))
STEPS: dict[str, type[GroupStep]] = {
    "element": ElementStep,
    "tensor": TensorStep,
    "model": ModelStep,
}

__all__ = ["STEPS", "ElementStep", "GroupStep", "ModelStep", "TensorStep"]
