"""Compiled steps: a traced step run by generated code, trusted once it has agreed with autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from ...inner.core.hyper import Tensors
from ..problems.problem import draws_of
from ..tracing.fx_graph import contiguous
from ..tracing.machine import Machine
from ..tracing.verify import check_against_autograd, directions, early_state
from ..training.adjoint import Cotangents
from ..training.state import Resolved, State
from ..training.training import Training
from .steps import Eager


class Compiled:
    """Steps by a machine, the same State outside, flat lists of tensors inside.

    Distrusted is raised by `prepare` if they are not what autograd does.
    """

    def __init__(
        self,
        machine: Machine,
        training: Training,
        plain: Resolved,
        seed: int,
        sums: Cotangents,
        fixed: Tensors,
    ) -> None:
        self._machine, self._training, self._plain, self._seed = machine, training, plain, seed
        self._sums, self._fixed, self._form = sums, fixed, machine.graph.form
        form, steps = self._form, training.steps
        t = torch.arange(1, steps + 1, dtype=torch.float64)
        self._numbers = [plain.over(n, steps) for n in form.single] + [t]
        device = machine.graph.takes[0].device
        self._rows = machine.graph.before.over(self._numbers, device)
        width = machine.graph.numbers_back
        self._back = torch.full((steps, width), float("nan"), dtype=torch.float64, device=device)
        self._several = [n for n in form.learned if n in form.several]
        self._pulled = steps  # The earliest step that was pulled back.
        self._seconds = machine.seconds if machine.agreed else 0.0

    def graph_bytes(self, start: State) -> float:
        return self._machine.graph_bytes

    @property
    def seconds(self) -> float:
        """Spent on making the parts that this run was the first to use; 0 if there were none."""
        return 0.0 if self._machine.interpreted else self._machine.seconds - self._seconds

    def prepare(self, parts: Sequence[str], start: State) -> None:
        machine, training = self._machine, self._training
        with machine.trial():
            left = [part for part in parts if part not in machine.agreed]
            if not left:
                return
            eager = Eager(training, self._plain, self._seed, self._sums, self._fixed)
            i, state = early_state(eager.advance, start, training.steps)
            for part in left:
                prove = self._prove_after if part in ("advance", "record") else self._prove_before
                if prove(part, i, state):
                    machine.agreed.add(part)

    def advance(self, i: int, state: State) -> State:
        with self._quiet(i):
            out = self._machine.advance(*self._inputs(i, state))
        return self._after(state, out)

    def record(self, i: int, state: State) -> tuple[Sequence[Tensor], State]:
        with self._quiet(i):
            out = self._machine.record(*self._inputs(i, state))
        kept = self._form.after
        return out[kept:], self._after(state, out[:kept])

    def rewind(self, i: int, tape: Sequence[Tensor], adjoint: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            out = self._machine.rewind(*tape, *contiguous(adjoint))
        return self._before(i, out)

    def pull(self, i: int, state: State, adjoint: list[Tensor]) -> list[Tensor]:
        with self._quiet(i):
            out = self._machine.pull(*self._inputs(i, state), *contiguous(adjoint))
        return self._before(i, out)

    def finish(self) -> tuple[Tensor, Tensors]:
        norms, numbers = self._back[:, 0], self._back[:, 1:].cpu()
        numbers[: self._pulled] = 0  # Earlier steps have no share.
        return norms, self._machine.graph.numbers_behind(self._numbers, numbers)

    def _inputs(self, i: int, state: State) -> list[Tensor]:
        form = self._form
        values = self._plain.at(i) if form.several else {}
        return contiguous(
            [
                *form.moving(state),
                *form.rest(state),
                *(values[n] for n in form.several),
                *(row[i] for row in self._rows),
                *form.leaves(self._training.problem.batch(i, self._seed)),
            ]
        )

    @contextmanager
    def _quiet(self, i: int) -> Iterator[None]:
        draws: AbstractContextManager[None] = nullcontext()
        if self._machine.graph.random:
            draws = draws_of(i, self._seed, self._back.device)
        with torch.no_grad(), draws:
            yield

    def _after(self, state: State, out: Sequence[Tensor]) -> State:
        many = len(self._form.moved)
        return self._form.state(out[:many], out[many:], state)

    def _before(self, i: int, out: Sequence[Tensor]) -> list[Tensor]:
        many = len(self._form.moved)
        self._back[i], self._pulled = out[-1], i
        self._sums.add(i, out[many:-1], self._several)
        return list(out[:many])

    def _prove_after(self, part: str, i: int, state: State) -> bool:
        form = self._form

        def replaced(state: State) -> list[Tensor]:
            return [*form.moving(state), *(state.buffers[n] for n in form.counted)]

        def step(state: State) -> list[Tensor]:
            return replaced(self._training.step(state, self._plain.at(i), i, self._seed))

        names = [*form.names, *(f"buffers {name}" for name in form.counted)]
        with self._quiet(i):
            out = getattr(self._machine, part)(*self._inputs(i, state))
        return self._agrees(names, out[: form.after], step, state)

    def _prove_before(self, part: str, i: int, state: State) -> bool:
        form, machine = self._form, self._machine
        adjoint = directions(form.moving(state))

        def pull(state: State) -> list[Tensor]:
            sums = self._sums.empty()
            eager = Eager(self._training, self._plain, self._seed, sums, self._fixed)
            return [*eager.pull(i, state, adjoint), *(sums.at(n, i) for n in hypers)]

        inputs = self._inputs(i, state)
        with self._quiet(i):
            if part == "pull":
                out = machine.pull(*inputs, *adjoint)
            else:
                out = machine.rewind(*machine.record(*inputs)[form.after :], *adjoint)
        numbers = [n[i : i + 1] for n in self._numbers]
        back = machine.graph.numbers_behind(numbers, out[-1][None, 1:].double().cpu())
        hypers = [*back, *self._several]
        # Buffers of the start are constants for autograd.
        moved = [n for n in form.names if i or not n.startswith("buffers ")]
        names = [f"the adjoint of {name}" for name in moved]
        names += [f"the cotangent of {name}" for name in hypers]
        others = out[len(form.moved) : -1]
        found = [*out[: len(moved)], *(x[0] for x in back.values()), *others]
        return self._agrees(names, found, pull, state)

    def _agrees(
        self,
        names: list[str],
        found: Sequence[Tensor],
        by_autograd: Callable[[State], list[Tensor]],
        state: State,
    ) -> bool:
        low = self._machine.graph.low
        return check_against_autograd(self._training, names, found, by_autograd, state, low)
