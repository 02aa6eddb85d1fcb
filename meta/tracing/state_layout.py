"""How the tensors of a training step lie in the flat lists that graphs take and return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...inner.core.hyper import Tensors
from ...inner.fx_graph import CannotTrace
from ...inner.torch_internals import Refused, TreeSpec, tree_flatten, tree_unflatten
from ..training.state import State
from ..training.training import Training
from .fx_graph import numbered

X = TypeVar("X")


class UnevenBatches(ValueError):
    """A batch is not of the shapes that were traced."""


class StepInputs(NamedTuple, Generic[X]):
    """What a graph of a step takes, in this order: tensors, or the nodes that stand for them.

    moving, counted, still: the state. several: values of hypers of more than one number. numbers:
    the single hypers and then what else is a number; in a graph without scalars the rows that hold
    what it reads of them. batch: its tensors. beside: an adjoint, tangents, a vector.
    """

    moving: Sequence[X]
    counted: Sequence[X]
    still: Sequence[X]
    several: Sequence[X]
    numbers: Sequence[X]
    batch: Sequence[X]
    beside: Sequence[X]

    def flat(self) -> list[X]:
        return [x for part in self for x in part]


class StepPullback(NamedTuple, Generic[X]):
    """What the pullback of a step gives: the adjoint before it; cotangents of the learned hypers of
    more than one number; in one vector, the norm of the weights' adjoint and cotangents of numbers.
    """

    adjoint: Sequence[X]
    several: Sequence[X]
    numbers: X


@dataclass(frozen=True)
class BatchLayout:
    """How a batch is nested, and the shapes and types of its tensors.

    odd: why it cannot be inputs of a graph; empty if it can.
    """

    nested: TreeSpec | None
    shapes: tuple[tuple[torch.Size, torch.dtype], ...]
    odd: str = ""

    @staticmethod
    def of(batch: Any) -> tuple[BatchLayout, list[Tensor]]:
        """(the layout of a batch, its tensors)."""
        try:
            leaves, nested = tree_flatten(batch)
        except Refused as why:
            return BatchLayout(None, (), str(why)), []
        odd = next((type(x).__name__ for x in leaves if not isinstance(x, Tensor)), "")
        if odd:
            return BatchLayout(nested, (), f"a batch of it holds {odd}, not tensors alone"), []
        return BatchLayout(nested, tuple((x.shape, x.dtype) for x in leaves)), leaves

    def check(self) -> None:
        """Raise CannotTrace if there is more in a batch than tensors."""
        if self.odd:
            raise CannotTrace(self.odd)

    def leaves(self, batch: Any) -> list[Tensor]:
        """The tensors of a batch; UnevenBatches if they are not as those that were traced."""
        leaves, nested = tree_flatten(batch)
        same = nested == self.nested and len(leaves) == len(self.shapes)
        for x, spec in zip(leaves, self.shapes, strict=False):
            same = same and isinstance(x, Tensor) and (x.shape, x.dtype) == spec
        if not same:
            self._check_like(BatchLayout.of(batch)[0])
        return leaves

    def stacked(self, batches: Sequence[Any]) -> list[Tensor]:
        """The tensors of several batches, stacked, if these are the shapes of such stacks."""
        found, each = zip(*map(BatchLayout.of, batches), strict=True)
        leaves = [torch.stack(tensors) for tensors in zip(*each, strict=True)]
        self._check_like(replace(found[0], shapes=tuple((x.shape, x.dtype) for x in leaves)))
        return leaves

    def many(self, count: int) -> BatchLayout:
        """That of so many batches, stacked."""
        shapes = tuple((torch.Size([count, *shape]), dtype) for shape, dtype in self.shapes)
        return replace(self, shapes=shapes)

    def nest(self, leaves: Sequence[Tensor]) -> Any:
        """The batch of such tensors."""
        if self.nested is None:
            raise CannotTrace(self.odd)
        return tree_unflatten(leaves, self.nested)

    def _check_like(self, found: BatchLayout) -> None:
        if found.odd:
            raise UnevenBatches(f"{found.odd}; give compile=False")
        if found != self:
            raise UnevenBatches(
                f"a batch has shapes {[tuple(s) for s, _ in found.shapes]} where the compiled step "
                f"takes {[tuple(s) for s, _ in self.shapes]}; make them equal or give compile=False"
            )


@dataclass(frozen=True)
class StateLayout:
    """How the tensors of a step lie in the flat lists that graphs take and return.

    moved: of the state, those that can carry an adjoint: the weights, slots and buffers that steps
    replace, as ("p", ""), ("slots", name), ("buffers", name). counted: replaced, but no numbers to
    differentiate. still: never replaced. single, several: hypers of one number and of more.
    learned: the hypers to differentiate in.
    """

    moved: tuple[tuple[str, str], ...]
    counted: tuple[str, ...]
    still: tuple[str, ...]
    single: tuple[str, ...]
    several: tuple[str, ...]
    learned: tuple[str, ...]
    batch: BatchLayout

    @staticmethod
    def of(
        training: Training, state: State, values: Tensors, learned: Sequence[str], i: int, seed: int
    ) -> StateLayout:
        with numbered(seed):
            after = training.step(state, values, i, seed)
            batch, _ = BatchLayout.of(training.problem.batch(i, seed))
        changed = [n for n, b in state.buffers.items() if after.buffers[n] is not b]
        floats = [n for n in changed if state.buffers[n].is_floating_point()]
        return StateLayout(
            moved=(
                ("p", ""),
                *(("slots", n) for n, x in state.slots.items()),
                *(("buffers", n) for n in floats),
            ),
            counted=tuple(n for n in changed if n not in floats),
            still=tuple(n for n in state.buffers if n not in changed),
            single=tuple(n for n, v in values.items() if v.ndim == 0),
            several=tuple(n for n, v in values.items() if v.ndim),
            learned=tuple(learned),
            batch=batch,
        )

    @staticmethod
    def of_loss(
        training: Training, state: State, values: Tensors, learned: Sequence[str], i: int, seed: int
    ) -> StateLayout:
        """Of the training loss alone, in which nothing moves but the weights."""
        batch, _ = BatchLayout.of(training.problem.batch(i, seed))
        return StateLayout(
            moved=(("p", ""),),
            counted=(),
            still=tuple(state.buffers),
            single=tuple(n for n, v in values.items() if v.ndim == 0),
            several=tuple(n for n, v in values.items() if v.ndim),
            learned=tuple(learned),
            batch=batch,
        )

    @property
    def names(self) -> list[str]:
        """What moves, in words: "p", "slots m", "buffers mean"."""
        return [f"{part} {name}".strip() for part, name in self.moved]

    @property
    def after(self) -> int:
        """How many tensors a step replaces, those that move and those that are counted."""
        return len(self.moved) + len(self.counted)

    def check_still(self, before: State, after: State) -> None:
        """Raise ValueError if a step replaces a buffer that the first one did not."""
        for name in self.still:
            if after.buffers[name] is not before.buffers[name]:
                raise ValueError(
                    f"buffer {name!r} is first replaced after step 1, where forward mode looked "
                    'for what moves; replace it at every step, or use method="replay"'
                )

    def moving(self, state: State) -> list[Tensor]:
        return [state.p if part == "p" else getattr(state, part)[n] for part, n in self.moved]

    def inputs(
        self,
        state: State,
        values: Tensors,
        numbers: Sequence[Tensor],
        batch: Sequence[Tensor],
        beside: Sequence[Tensor] = (),
    ) -> StepInputs[Tensor]:
        """What a graph takes at a state.

        values: of the hypers in `several`. numbers: those, or rows. batch: from `batch.leaves`.
        """
        return StepInputs(
            self.moving(state),
            [state.buffers[n] for n in self.counted],
            [state.buffers[n] for n in self.still],
            [values[n] for n in self.several],
            numbers,
            batch,
            beside,
        )

    def split(self, flat: Sequence[X], numbers: int) -> StepInputs[X]:
        """A flat list of inputs by what they are; so many of them are numbers."""
        take = iter(flat)

        def some(count: int) -> list[X]:
            return [next(take) for _ in range(count)]

        return StepInputs(
            some(len(self.moved)),
            some(len(self.counted)),
            some(len(self.still)),
            some(len(self.several)),
            some(numbers),
            some(len(self.batch.shapes)),
            list(take),
        )

    def split_pullback(self, flat: Sequence[X]) -> StepPullback[X]:
        many = len(self.moved)
        return StepPullback(flat[:many], flat[many:-1], flat[-1])

    def start(self, inputs: StepInputs[Tensor], around: State) -> tuple[State, Tensors]:
        """(the state that inputs hold, the values of the hypers); the rest is that of `around`."""
        buffers = around.buffers | dict(zip(self.still, inputs.still, strict=True))
        state = self.state(inputs.moving, inputs.counted, around._replace(buffers=buffers))
        single = inputs.numbers[: len(self.single)]
        values = dict(zip(self.several, inputs.several, strict=True))
        return state, values | dict(zip(self.single, single, strict=True))

    def state(self, moving: Sequence[Tensor], counted: Sequence[Tensor], before: State) -> State:
        """The state of these tensors; what never moves is that of `before`, the same objects."""
        named = dict(zip(self.moved, moving, strict=True))
        new = dict(zip(self.counted, counted, strict=True))
        new |= {name: x for (part, name), x in named.items() if part == "buffers"}
        slots = {name: named["slots", name] for name in before.slots}
        return State(named["p", ""], slots, {n: new.get(n, b) for n, b in before.buffers.items()})

    def state_after(self, out: Sequence[Tensor], before: State) -> State:
        """The state in the first outputs of a graph."""
        return self.state(out[: len(self.moved)], out[len(self.moved) : self.after], before)


class TensorSpec(NamedTuple):
    """What is to be known of a tensor to trace or to compile for it."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(x: Tensor) -> TensorSpec:
        return TensorSpec(x.shape, x.dtype, x.device)

    def zeros(self, *more: int) -> Tensor:
        """One like it, with more dimensions before its own."""
        return torch.zeros((*more, *self.shape), dtype=self.dtype, device=self.device)
