"""Compiled steps: a traced step run by generated code, trusted once it has agreed with autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from ...inner.core.hyper import Tensors
from ...inner.torch_internals import Run
from ..problems.problem import draws_of
from ..tracing.fx_graph import contiguous
from ..tracing.machine import Machine
from ..tracing.verify import check_against_autograd, directions, early_state
from ..training.adjoint import Cotangents
from ..training.state import Resolved, State
from ..training.training import Training
from .steps import Eager

# (step, state before it, adjoint after it) -> (adjoint before it, the shares of the hypers).
Pull = Callable[[int, State, list[Tensor]], tuple[list[Tensor], Cotangents]]


class StepCode:
    """A machine's parts at one training's values and seed, by name."""

    def __init__(self, machine: Machine, training: Training, plain: Resolved, seed: int) -> None:
        self.machine, self.training, self.plain, self.seed = machine, training, plain, seed
        form, steps = machine.graph.form, training.steps
        t = torch.arange(1, steps + 1, dtype=torch.float64)
        self.numbers = [plain.over(n, steps) for n in form.single] + [t]
        self.device = machine.graph.takes[0].device
        self._rows = machine.graph.before.over(self.numbers, self.device)

    def __call__(
        self, part: str, i: int, state: State, adjoint: Sequence[Tensor] = ()
    ) -> Sequence[Tensor]:
        """What a part gives at the state before step i."""
        run: Run = getattr(self.machine, part)
        with self._quiet(i):
            return run(*self._inputs(i, state, adjoint))

    def _inputs(self, i: int, state: State, adjoint: Sequence[Tensor]) -> list[Tensor]:
        form = self.machine.graph.form
        values = self.plain.at(i) if form.several else {}
        rows = [row[i] for row in self._rows]
        batch = form.batch.leaves(self.training.problem.batch(i, self.seed))
        return contiguous(form.inputs(state, values, rows, batch, adjoint).flat())

    @contextmanager
    def _quiet(self, i: int) -> Iterator[None]:
        draws: AbstractContextManager[None] = nullcontext()
        if self.machine.graph.random:
            draws = draws_of(i, self.seed, self.device)
        with torch.no_grad(), draws:
            yield

    def rewind(self, tape: Sequence[Tensor], adjoint: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return self.machine.rewind(*tape, *contiguous(adjoint))


class Compiled:
    """Steps by a machine, the same State outside, flat lists of tensors inside.

    Refused is raised by `prepare` if they are not what autograd does. remark: what is to be said of
    them at the end.
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
        self._code, self._machine = StepCode(machine, training, plain, seed), machine
        self._sums, self._fixed, self._form = sums, fixed, machine.graph.form
        size = training.steps, machine.graph.numbers_back
        nowhere = torch.full(size, float("nan"), dtype=torch.float64, device=self._code.device)
        self._back, self._pulled = nowhere, training.steps  # The earliest step pulled back.
        self._several = [n for n in self._form.learned if n in self._form.several]
        self._seconds = machine.seconds if machine.agreed else 0.0
        self.remark = ""

    def graph_bytes(self, start: State) -> float:
        return self._machine.graph_bytes

    @property
    def seconds(self) -> float:
        """Spent on making the parts that this run was the first to use; 0 if there were none."""
        return 0.0 if self._machine.interpreted else self._machine.seconds - self._seconds

    def prepare(self, parts: Sequence[str], start: State) -> None:
        code = self._code
        with self._machine.unproven(parts) as left:
            if not left:
                return
            i, state = early_state(self._eager(self._sums).advance, start, code.training.steps)
            for part in left:
                if part in ("advance", "record"):
                    agrees = _forth_agrees(code, part, i, state)
                else:
                    agrees = _back_agrees(code, part, i, state, self._pull_eagerly)
                if agrees:
                    self._machine.agreed.add(part)

    def advance(self, i: int, state: State) -> State:
        return self._form.state_after(self._code("advance", i, state), state)

    def record(self, i: int, state: State) -> tuple[Sequence[Tensor], State]:
        out = self._code("record", i, state)
        return out[self._form.after :], self._form.state_after(out, state)

    def rewind(self, i: int, tape: Sequence[Tensor], adjoint: list[Tensor]) -> list[Tensor]:
        return self._before(i, self._code.rewind(tape, adjoint))

    def pull(self, i: int, state: State, adjoint: list[Tensor]) -> list[Tensor]:
        return self._before(i, self._code("pull", i, state, adjoint))

    def finish(self) -> tuple[Tensor, Tensors]:
        self.remark = self._machine.remark
        norms, numbers = self._back[:, 0], self._back[:, 1:].cpu()
        numbers[: self._pulled] = 0  # Earlier steps have no share.
        return norms, self._machine.graph.numbers_behind(self._code.numbers, numbers)

    def _eager(self, sums: Cotangents) -> Eager:
        code = self._code
        return Eager(code.training, code.plain, code.seed, sums, self._fixed)

    def _pull_eagerly(
        self, i: int, state: State, adjoint: list[Tensor]
    ) -> tuple[list[Tensor], Cotangents]:
        sums = self._sums.empty()
        return self._eager(sums).pull(i, state, adjoint), sums

    def _before(self, i: int, out: Sequence[Tensor]) -> list[Tensor]:
        back = self._form.split_pullback(out)
        self._back[i], self._pulled = back.numbers, i
        self._sums.add(i, back.several, self._several)
        return list(back.adjoint)


def _forth_agrees(code: StepCode, part: str, i: int, state: State) -> bool:
    """Whether a part takes a step as autograd does, as check_against_autograd says."""
    graph, training = code.machine.graph, code.training
    form = graph.form

    def step(state: State) -> list[Tensor]:
        after = training.step(state, code.plain.at(i), i, code.seed)
        return [*form.moving(after), *(after.buffers[n] for n in form.counted)]

    names = [*form.names, *(f"buffers {name}" for name in form.counted)]
    found = code(part, i, state)[: form.after]
    return check_against_autograd(training, names, found, step, state, graph.low)


def _back_agrees(code: StepCode, part: str, i: int, state: State, by_autograd: Pull) -> bool:
    """The same of the way back."""
    graph, form = code.machine.graph, code.machine.graph.form
    adjoint = directions(form.moving(state))
    if part == "pull":
        out = code(part, i, state, adjoint)
    else:
        out = code.rewind(code("record", i, state)[form.after :], adjoint)
    back = form.split_pullback(out)
    numbers = [n[i : i + 1] for n in code.numbers]
    single = graph.numbers_behind(numbers, back.numbers[None, 1:].double().cpu())
    several = [n for n in form.learned if n in form.several]
    hypers = [*single, *several]

    def pull(state: State) -> list[Tensor]:
        before, sums = by_autograd(i, state, adjoint)
        return [*before, *(sums.at(n, i) for n in hypers)]

    # Buffers of the start are constants for autograd.
    moved = [n for n in form.names if i or not n.startswith("buffers ")]
    names = [f"the adjoint of {name}" for name in moved]
    names += [f"the cotangent of {name}" for name in hypers]
    found = [*back.adjoint[: len(moved)], *(x[0] for x in single.values()), *back.several]
    return check_against_autograd(code.training, names, found, pull, state, graph.low)
