"""The parameters of a group as a rule takes them, and vectors of several."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ..core.hyper import Tensors
from ..core.layout import Layout
from ..core.rule import Rule
from ..kernels import execute as running
from ..kernels.trace import Plan

# The slots of every parameter, as torch.optim.Optimizer.state holds them.
States = MutableMapping[Tensor, Tensors]
# Elements of tensors gathered into one vector, on the host and on another device: there, launches
# cost more than memory.
BUNCH, BUNCH_AWAY = 2**16, 2**24
# Tensors of a kind from which on one batch of them is faster than they are one by one.
MANY = 8


@dataclass
class Unit:
    """Parameters that a rule steps as one, their names, and where they stand in their group.

    parts: of a model, whose slots may belong to all of it, the parameters that move.
    flat: slots in one vector each, of which the parameters have views.
    plans: of the tensor or the model, by dtype, device and options.
    batched: whether tensors that a rule takes apart may be one batch of them, so far as is known.
    """

    params: list[Tensor]
    names: list[str]
    at: list[int]
    parts: list[Unit] | None = None
    flat: Tensors = field(default_factory=dict)
    views: dict[str, list[Tensor]] = field(default_factory=dict)
    plans: dict[Hashable, Plan | None] = field(default_factory=dict)
    batched: bool = True

    @cached_property
    def layout(self) -> Layout:
        return Layout(tuple(self.names), tuple(p.shape for p in self.params))

    def lend(self, states: States, each: Sequence[Tensors]) -> None:
        """Make its views slots of its parameters, in the place of those of the same names."""
        for i, (q, slots) in enumerate(zip(self.params, each, strict=True)):
            states[q] = {**slots, **{n: views[i] for n, views in self.views.items()}}

    def holds(self, states: States) -> bool:
        """Whether the slots of its parameters are still its views."""
        return all(
            states[q].get(n) is x
            for n, views in self.views.items()
            for q, x in zip(self.params, views, strict=True)
        )


def units(
    rule: Rule, params: Sequence[Tensor], names: Sequence[str], moving: Sequence[bool]
) -> Iterator[Unit]:
    """The parameters that move, as the rule takes them; all of them if it takes them as one. Those
    without an element are in none.
    """
    some = [i for i, p in enumerate(params) if p.numel()]
    moved = [i for i in some if moving[i]]
    if rule.over == "tensor":
        yield from (_unit(params, names, at) for at in _stacks(rule, params, names, moved))
        return
    bunches = (_unit(params, names, at) for at in _bunches(params, moved))
    if rule.over == "element":
        yield from bunches
    elif moved:
        whole = _unit(params, names, some)
        whole.parts = [*bunches]
        yield whole


def _bunches(params: Sequence[Tensor], some: Sequence[int]) -> Iterator[list[int]]:
    """Long tensors alone, short ones with others of their kind."""
    kinds: dict[tuple[torch.device, torch.dtype, int | None], list[int]] = {}
    for i in some:
        p = params[i]
        alone = i if p.numel() >= _bunch(p.device) else None
        kinds.setdefault((p.device, p.dtype, alone), []).append(i)
    for (device, _, _), at in kinds.items():
        yield from _filled(params, at, _bunch(device))


def _bunch(device: torch.device) -> int:
    return BUNCH if device.type == "cpu" else BUNCH_AWAY


def _stacks(
    rule: Rule, params: Sequence[Tensor], names: Sequence[str], some: Sequence[int]
) -> Iterator[list[int]]:
    """Short tensors that a rule over tensors cannot tell apart, if they are many; others alone."""
    kinds: dict[Hashable, list[int]] = {}
    for i in some:
        p = params[i]
        kind = rule.kind(Layout.alone(p.shape, names[i]))
        alone = i if p.numel() >= running.LONG or not p.ndim else None
        kinds.setdefault((p.device, p.dtype, p.shape, kind, alone), []).append(i)
    for at in kinds.values():
        if len(at) < MANY:
            yield from ([i] for i in at)
        else:
            yield from _filled(params, at, _bunch(params[at[0]].device))


def _filled(params: Sequence[Tensor], some: Sequence[int], limit: int) -> Iterator[list[int]]:
    """In their order, in lists of so many elements at most, if one alone has not more."""
    at: list[int] = []
    size = 0
    for i in some:
        if at and size + params[i].numel() > limit:
            yield at
            at, size = [], 0
        at.append(i)
        size += params[i].numel()
    yield at


def _unit(params: Sequence[Tensor], names: Sequence[str], at: list[int]) -> Unit:
    return Unit([params[i] for i in at], [names[i] for i in at], at)


@contextmanager
def _bare() -> Iterator[None]:
    """Without what autograd notes of views, which takes longer than the views, and half of their
    memory. For tensors that no graph is of; what writes into weights has to be outside, where it
    counts their versions.
    """
    views = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(views):
        yield


# torch's own for gradients in buckets: no call from Python per tensor.


def joined(tensors: Sequence[Tensor]) -> Tensor:
    with _bare():
        joined: Tensor = _flatten_dense_tensors(tensors)
    return joined


def parted(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A flat vector in the shapes of tensors."""
    with _bare():
        return list(_unflatten_dense_tensors(flat, like))


__all__ = ["States", "Unit", "joined", "parted", "units"]
