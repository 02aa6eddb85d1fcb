"""How the tensors of a training step lie in the flat lists that graphs take and return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...inner.core.hyper import Tensors
from ...inner.fx_graph import CannotTrace
from ...inner.torch_internals import TreeSpec, tree_flatten
from ..training.state import State
from ..training.training import Training
from .fx_graph import numbered


class UnevenBatches(ValueError):
    """A batch is not of the shapes that were traced."""


@dataclass(frozen=True)
class StateLayout:
    """How the tensors of a step lie in the flat lists that graphs take and return.

    moved: of the state, those that can carry an adjoint: the weights, slots and buffers that steps
    replace, as ("p", ""), ("slots", name), ("buffers", name). counted: replaced, but no numbers to
    differentiate. still: never replaced. single, several: hypers of one number and of more.
    learned: the hypers to differentiate in. odd: the type of
    something in a batch that is no tensor.
    """

    moved: tuple[tuple[str, str], ...]
    counted: tuple[str, ...]
    still: tuple[str, ...]
    single: tuple[str, ...]
    several: tuple[str, ...]
    learned: tuple[str, ...]
    batch: TreeSpec
    shapes: tuple[tuple[torch.Size, torch.dtype], ...]
    odd: str

    @staticmethod
    def of(
        training: Training, state: State, values: Tensors, learned: Sequence[str], i: int, seed: int
    ) -> StateLayout:
        with numbered(seed):
            after = training.step(state, values, i, seed)
            leaves, batch = tree_flatten(training.problem.batch(i, seed))
        changed = [n for n, b in state.buffers.items() if after.buffers[n] is not b]
        floats = [n for n in changed if state.buffers[n].is_floating_point()]
        odd = next((type(x).__name__ for x in leaves if not isinstance(x, Tensor)), "")
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
            shapes=() if odd else tuple((x.shape, x.dtype) for x in leaves),
            odd=odd,
        )

    def check(self) -> None:
        """Raise CannotTrace if there is more in a batch than tensors."""
        if self.odd:
            raise CannotTrace(f"a batch of it holds {self.odd}, not tensors alone")

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

    def rest(self, state: State) -> list[Tensor]:
        return [state.buffers[n] for n in (*self.counted, *self.still)]

    def state(self, moving: Sequence[Tensor], counted: Sequence[Tensor], before: State) -> State:
        """The state of these tensors; what never moves is that of `before`, the same objects."""
        named = dict(zip(self.moved, moving, strict=True))
        new = dict(zip(self.counted, counted, strict=True))
        new |= {name: x for (part, name), x in named.items() if part == "buffers"}
        slots = {name: named["slots", name] for name in before.slots}
        return State(named["p", ""], slots, {n: new.get(n, b) for n, b in before.buffers.items()})

    def leaves(self, batch: Any) -> list[Tensor]:
        """The tensors of a batch; Uneven if they are not of the shapes that were traced."""
        leaves, spec = tree_flatten(batch)
        return self.checked(leaves, spec)

    def checked(self, leaves: list[Tensor], spec: TreeSpec) -> list[Tensor]:
        found = tuple((x.shape, x.dtype) for x in leaves)
        if spec != self.batch or found != self.shapes:
            raise UnevenBatches(
                f"a batch has shapes {[tuple(s) for s, _ in found]} where the compiled step takes "
                f"{[tuple(s) for s, _ in self.shapes]}; make them equal or give compile=False"
            )
        return leaves


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
