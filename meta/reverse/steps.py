"""How the steps of one training are done, there and back, and what they add up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...inner.core.hyper import Tensors
from ...inner.numerics.pullback import vjp
from ..training.adjoint import Cotangents, carrying_adjoint, each_moving, leaf_values, leaves
from ..training.state import Resolved, State
from ..training.training import Training


class Steps(Protocol):
    """The steps of one training at one point and seed.

    An adjoint is d loss / d state as a list: of the weights, the slots, and the buffers that steps
    replace. A pullback also adds the share of the hypers to the sums it was made with.

    remark: after `finish`, what is to be said of how they were done, beside what was known before.
    """

    remark: str

    @property
    def seconds(self) -> float:
        """That went into generated code on this occasion."""
        ...

    def graph_bytes(self, start: State) -> float:
        """What the graph of a step keeps in memory."""
        ...

    def prepare(self, parts: Sequence[str], start: State) -> None:
        """Called before the first step with the names of the methods that will be used."""
        ...

    def advance(self, i: int, state: State) -> State:
        """Step i and nothing else."""
        ...

    def record(self, i: int, state: State) -> tuple[Any, State]:
        """(what `rewind` needs, the state after step i)."""
        ...

    def rewind(self, i: int, tape: Any, adjoint: list[Tensor]) -> list[Tensor]:
        """The adjoint before step i from that after it, by its record."""
        ...

    def pull(self, i: int, state: State, adjoint: list[Tensor]) -> list[Tensor]:
        """The same from the state before step i, which is done again."""
        ...

    def finish(self) -> tuple[Tensor, Tensors]:
        """(norm of the weights' adjoint before each step, NaN where it never came to; cotangents
        of the values in force that are not in the sums yet, the first dimension time).
        """
        ...


@dataclass(frozen=True)
class StepTape:
    """One step with its graph: inputs are leaves, the state before it and then the hypers."""

    inputs: list[Tensor]
    outputs: list[Tensor]


class Eager:
    """Steps by autograd, operation by operation.

    fixed: the buffers of the start. Until a step replaces one (frozen weights: never), it is a
    constant without an adjoint.
    """

    seconds = 0.0

    def __init__(
        self, training: Training, plain: Resolved, seed: int, sums: Cotangents, fixed: Tensors
    ) -> None:
        self._training, self._plain, self._seed = training, plain, seed
        self._sums, self._fixed = sums, fixed
        self._norms = torch.full((training.steps,), float("nan"), dtype=torch.float64)
        self.remark = ""

    def prepare(self, parts: Sequence[str], start: State) -> None:
        """Nothing has to be made."""

    def advance(self, i: int, state: State) -> State:
        return self._training.step(state, self._plain.at(i), i, self._seed)

    def graph_bytes(self, start: State) -> float:
        # By a step that is thrown away: only a graph that was made can be measured.
        with _saved_bytes() as saved:
            self.record(0, start)
        return sum(saved.values())

    def record(self, i: int, state: State) -> tuple[StepTape, State]:
        values, hypers = leaf_values(self._plain, i, self._sums.names)
        before = leaves(state, self._fixed)
        after = self._training.step(before, values, i, self._seed, graph=True)
        taped = StepTape(
            [*carrying_adjoint(before, self._fixed), *hypers], carrying_adjoint(after, self._fixed)
        )
        return taped, each_moving(after, self._fixed, Tensor.detach)

    def rewind(self, i: int, tape: StepTape, adjoint: list[Tensor]) -> list[Tensor]:
        grads = vjp(tape.outputs, tape.inputs, adjoint, keep=False)
        of_state = len(tape.inputs) - len(self._sums.names)
        self._sums.add(i, grads[of_state:], self._sums.names)
        self._norms[i] = grads[0].norm()
        return list(grads[:of_state])

    def pull(self, i: int, state: State, adjoint: list[Tensor]) -> list[Tensor]:
        return self.rewind(i, self.record(i, state)[0], adjoint)

    def finish(self) -> tuple[Tensor, Tensors]:
        return self._norms, {}


@contextmanager
def _saved_bytes() -> Iterator[dict[int, int]]:
    """The bytes of every storage that graphs made inside keep alive, by address.

    They cannot be gone back through afterwards.
    """
    saved: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(x: Tensor) -> int:
        storage = x.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        # A place in a list, not x: a graph that holds its own output is never freed.
        held.append(x)
        return len(held) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda at: held[at]):
        yield saved
    held.clear()
