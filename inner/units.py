"""The parameters of a group as a rule takes them, and vectors of several."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .hyper import Tensors
from .layout import Layout
from .plan import Plan
from .rule import Rule

# Elements of tensors gathered into one vector, on the host and on another device: there, launches
# cost more than memory.
BUNCH, BUNCH_AWAY = 2**16, 2**24


@dataclass
class Unit:
    """Parameters that a rule steps as one, their names, and where they stand in their group.

    parts: of a model, whose slots may belong to all of it, the parameters that move.
    flat: slots in one vector each, of which the parameters have views.
    plans: of the tensor or the model, by dtype, device and options.
    """

    params: list[Tensor]
    names: list[str]
    at: list[int]
    parts: list[Unit] | None = None
    flat: Tensors = field(default_factory=dict)
    views: dict[str, list[Tensor]] = field(default_factory=dict)
    plans: dict[Hashable, Plan | None] = field(default_factory=dict)

    @cached_property
    def layout(self) -> Layout:
        return Layout(tuple(self.names), tuple(p.shape for p in self.params))


def units(
    rule: Rule, params: Sequence[Tensor], names: Sequence[str], moving: Sequence[bool]
) -> Iterator[Unit]:
    """The parameters that move, as the rule takes them; all of them if it takes them as one. Those
    without an element are in none.
    """
    some = [i for i, p in enumerate(params) if p.numel()]
    moved = [i for i in some if moving[i]]
    if rule.over == "model" and moved:
        whole = _unit(params, names, some)
        whole.parts = [_unit(params, names, at) for at in _bunches(params, moved)]
        yield whole
    else:
        bunches = [[i] for i in moved] if rule.over == "tensor" else _bunches(params, moved)
        yield from (_unit(params, names, at) for at in bunches)


def _bunches(params: Sequence[Tensor], some: Sequence[int]) -> Iterator[list[int]]:
    """Long tensors alone, short ones with others of their kind."""
    bunches: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    sizes: dict[tuple[torch.device, torch.dtype], int] = {}
    for i in some:
        p = params[i]
        kind, size = (p.device, p.dtype), p.numel()
        limit = BUNCH if p.device.type == "cpu" else BUNCH_AWAY
        if size >= limit:
            yield [i]
            continue
        if sizes.get(kind, 0) + size > limit:
            yield bunches.pop(kind)
            sizes[kind] = 0
        bunches.setdefault(kind, []).append(i)
        sizes[kind] = sizes.get(kind, 0) + size
    yield from bunches.values()


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


__all__ = ["Unit", "joined", "parted", "units"]
