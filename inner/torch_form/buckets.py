"""The parameters of a group as a rule takes them, and vectors of several."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from ..core.flat import BLOCK
from ..core.hyper import Tensors
from ..core.layout import Layout
from ..core.rule import Rule
from ..torch_internals import below_autograd, flatten_dense, unflatten_dense

# The slots of every parameter, as torch.optim.Optimizer.state holds them.
States = MutableMapping[Tensor, Tensors]


@dataclass(frozen=True)
class StepConfig:
    """How tensors are gathered and taken apart for a step.

    bucket_numel, bucket_numel_away: elements of short tensors in one vector, on the host and on
    another device: there, launches cost more than memory. block: elements of a long vector that are
    done at a time. stack_from: tensors of a kind from which on one batch of them is faster than
    they are one by one, if each has no more than stack_below elements. compile_from: elements of a
    tensor from which on a step of its own is compiled: of fewer, code takes longer to make than it
    will ever save.
    """

    bucket_numel: int = 2**16
    bucket_numel_away: int = 2**24
    block: int = BLOCK
    stack_from: int = 8
    stack_below: int = 2**14
    compile_from: int = 32

    def bucket(self, p: Tensor) -> int:
        return self.bucket_numel if p.device.type == "cpu" else self.bucket_numel_away


@dataclass
class Bucket:
    """Parameters that a rule steps as one, their names, and where they stand in their group.

    flat: slots in one vector each, of which views, by parameter, are in the optimizer's state.
    batched: whether tensors that a rule takes apart may be one batch of them, so far as is known.
    """

    params: list[Tensor]
    names: list[str]
    at: list[int]
    flat: Tensors = field(default_factory=dict)
    _views: dict[str, list[Tensor]] = field(default_factory=dict)
    batched: bool = True

    @cached_property
    def layout(self) -> Layout:
        return Layout(tuple(self.names), tuple(p.shape for p in self.params))

    def hold(
        self, flat: Tensors, states: States, views: dict[str, list[Tensor]] | None = None
    ) -> None:
        """Make parts of these the slots of its parameters, in the place of those of the same names.
        views: the parts, by slot and parameter, if they are not one after another.
        """
        if views is None:
            views = {n: split_like(x, self.params) for n, x in flat.items()}
        self.flat, self._views = flat, views
        for i, q in enumerate(self.params):
            states[q] = {**states[q], **{n: each[i] for n, each in self._views.items()}}

    def take_apart(self) -> None:
        """Its tensors are stepped one by one from now on."""
        self.batched = False
        self.flat, self._views = {}, {}

    def owns_state(self, states: States) -> bool:
        """Whether the slots of its parameters are still its views."""
        return all(
            states[q].get(n) is x
            for n, views in self._views.items()
            for q, x in zip(self.params, views, strict=True)
        )


def buckets(
    rule: Rule,
    params: Sequence[Tensor],
    names: Sequence[str],
    moving: Sequence[bool],
    config: StepConfig,
) -> Iterator[Bucket]:
    """The parameters that move, as the rule takes them; all of them if it takes them as one. Those
    without an element are in none.
    """
    some = [i for i, p in enumerate(params) if p.numel()]
    moved = [i for i in some if moving[i]]
    if rule.over == "tensor":
        each = _stacks(rule, params, names, moved, config)
    elif rule.over == "element":
        each = _short_together(params, moved, config)
    else:
        each = iter([some] if moved else [])
    for at in each:
        yield Bucket([params[i] for i in at], [names[i] for i in at], at)


def _short_together(
    params: Sequence[Tensor], some: Sequence[int], config: StepConfig
) -> Iterator[list[int]]:
    """Long tensors alone, short ones with others of their kind."""
    kinds: dict[Hashable, list[int]] = {}
    for i in some:
        p = params[i]
        alone = i if p.numel() >= config.bucket(p) else None
        kinds.setdefault((p.device, p.dtype, alone), []).append(i)
    for at in kinds.values():
        yield from _filled(params, at, config)


def _stacks(
    rule: Rule,
    params: Sequence[Tensor],
    names: Sequence[str],
    some: Sequence[int],
    config: StepConfig,
) -> Iterator[list[int]]:
    """Short tensors that a rule over tensors cannot tell apart, if they are many; others alone."""
    kinds: dict[Hashable, list[int]] = {}
    for i in some:
        p = params[i]
        kind = rule.kind(Layout.alone(p.shape, names[i]))
        alone = i if p.numel() >= config.stack_below or not p.ndim else None
        kinds.setdefault((p.device, p.dtype, p.shape, kind, alone), []).append(i)
    for at in kinds.values():
        if len(at) < config.stack_from:
            yield from ([i] for i in at)
        else:
            yield from _filled(params, at, config)


def _filled(
    params: Sequence[Tensor], some: Sequence[int], config: StepConfig
) -> Iterator[list[int]]:
    """In their order, in lists of so many elements at most, if one alone has not more."""
    limit = config.bucket(params[some[0]])
    at: list[int] = []
    size = 0
    for i in some:
        if at and size + params[i].numel() > limit:
            yield at
            at, size = [], 0
        at.append(i)
        size += params[i].numel()
    yield at


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors as one vector."""
    with below_autograd():
        return flatten_dense(tensors)


def split_like(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A flat vector in the shapes of tensors."""
    with below_autograd():
        return unflatten_dense(flat, like)


__all__ = ["Bucket", "States", "StepConfig", "buckets", "joined", "split_like"]
