"""Several trainings as one: steps of all of them in one call, by vmap over the traced step.

What differs between them are hypers and seeds. On a GPU a small model leaves most of it idle, and
several cost little more than one; on a CPU what is saved is the overhead of small operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ...inner.core.hyper import Tensors
from ...inner.torch_internals import Run
from ..problems.problem import draws_of
from ..tracing.fx_graph import contiguous
from ..tracing.machine import Machine, build_once, machine_of
from ..tracing.verify import check_against_autograd, directions, early_state
from ..training.adjoint import Cotangents
from ..training.state import State, finite
from ..training.training import Training


class BatchedSteps:
    """Steps of trainings side by side: a State whose tensors have one more dimension, the first.

    leaves: the points, to be differentiated in. sums: the cotangents of what is in force, of each.
    compile: generated code; False runs the traced operations as they are. Raises Refused if the
    step cannot be traced.
    """

    def __init__(
        self,
        training: Training,
        points: Sequence[Tensors],
        seeds: Sequence[int],
        compile: bool,
    ) -> None:
        self.training, self.seeds, self.count = training, list(seeds), len(seeds)
        self.leaves = [
            {name: value.detach().requires_grad_() for name, value in point.items()}
            for point in points
        ]
        resolved = [training.resolve(leaves) for leaves in self.leaves]
        self.plain = [each.detach() for each in resolved]
        self.sums = [Cotangents(each) for each in resolved]
        names = self.sums[0].names
        with torch.no_grad():
            first = training.begin(self.plain[0].at(0), self.seeds[0])
        one = machine_of(training, first, self.plain[0].at(0), names, self.seeds[0])
        self.machine = build_once(
            training,
            f"{self.count} at once, compile={compile}",
            self.plain[0].at(0),
            names,
            lambda: Machine(one.graph.many(self.count), interpreted=not compile),
        )
        self.form = self.machine.graph.form
        t = torch.arange(1, training.steps + 1, dtype=torch.float64)
        self.numbers = [
            [*(plain.over(n, training.steps) for n in self.form.single), t] for plain in self.plain
        ]
        before, device = self.machine.graph.before, first.p.device
        rows = [before.over(numbers, device) for numbers in self.numbers]
        self._rows = [torch.stack(row, 1) for row in zip(*rows, strict=True)]

    @cached_property
    def start(self) -> State:
        with torch.no_grad():
            return _stacked(
                [
                    self.training.begin(plain.at(0), seed)
                    for plain, seed in zip(self.plain, self.seeds, strict=True)
                ]
            )

    def run(self, state: State, first: int, last: int) -> State:
        """Steps first to last - 1 of all, without a graph; no check whether they are finite."""
        self.prove(["advance"])
        for i in range(first, last):
            state = self.advance(i, state)
        return state

    def losses(self, state: State) -> list[float]:
        """The held-out loss of each in a state; inf where it is not finite."""
        last = self.training.steps - 1
        with torch.no_grad():
            return [
                _loss(self.training, state_of(state, k), plain.at(last))
                for k, plain in enumerate(self.plain)
            ]

    def advance(self, i: int, state: State) -> State:
        """Step i of all."""
        return self.form.state_after(self._call(self.machine.advance, i, state), state)

    def record(self, i: int, state: State) -> tuple[State, Sequence[Tensor]]:
        """(the state after step i, what `rewind` needs)."""
        out = self._call(self.machine.record, i, state)
        return self.form.state_after(out, state), out[self.form.after :]

    def rewind(self, tape: Sequence[Tensor], adjoint: Sequence[Tensor]) -> Sequence[Tensor]:
        """The adjoint before a step from that after it, and the shares of the hypers."""
        with torch.no_grad():
            return self.machine.rewind(*tape, *contiguous(adjoint))

    def pull(self, i: int, state: State, adjoint: Sequence[Tensor]) -> Sequence[Tensor]:
        """The same from the state before step i, which is done again."""
        return self._call(self.machine.pull, i, state, adjoint)

    def prove(self, parts: Sequence[str]) -> None:
        """Raise Refused unless generated code does what the traced operations do."""
        machine, form = self.machine, self.form
        if machine.interpreted:
            return
        with machine.unproven(parts) as left:
            if not left:
                return
            advance, pull = machine.graph.advance(), machine.graph.pull()

            def step(i: int, state: State) -> State:
                return form.state_after(self._call(advance, i, state), state)

            i, state = early_state(step, self.start, self.training.steps)
            adjoint = directions(form.moving(state))
            for part in left:
                back = part in ("pull", "rewind")
                run, bars = (pull, adjoint) if back else (advance, [])

                def by_operations(
                    state: State, run: Run = run, bars: list[Tensor] = bars
                ) -> list[Tensor]:
                    return list(self._call(run, i, state, bars))

                if part == "rewind":
                    tape = self._call(machine.record, i, state)[form.after :]
                    with torch.no_grad():
                        found = machine.rewind(*tape, *adjoint)
                elif part == "pull":
                    found = self._call(machine.pull, i, state, adjoint)
                else:
                    found = self._call(getattr(machine, part), i, state)[: form.after]
                names = [f"output {k} of {part}" for k in range(len(found))]
                if check_against_autograd(
                    self.training, names, found, by_operations, state, machine.graph.low
                ):
                    machine.agreed.add(part)

    def _call(
        self, run: Run, i: int, state: State, adjoint: Sequence[Tensor] = ()
    ) -> Sequence[Tensor]:
        form = self.form
        each = [plain.at(i) for plain in self.plain] if form.several else []
        values = {n: torch.stack([one[n] for one in each]) for n in form.several}
        rows = [row[i] for row in self._rows]
        batches = [self.training.problem.batch(i, seed) for seed in self.seeds]
        inputs = form.inputs(state, values, rows, form.batch.stacked(batches), adjoint)
        with torch.no_grad(), draws_of(i, self.seeds[0], state.p.device):
            return run(*contiguous(inputs.flat()))


def state_of(state: State, k: int) -> State:
    """That of one training."""
    return State(
        state.p[k],
        {n: x[k] for n, x in state.slots.items()},
        {n: x[k] for n, x in state.buffers.items()},
    )


def _stacked(states: Sequence[State]) -> State:
    def stack(tensors: Sequence[Tensors]) -> Tensors:
        return {n: torch.stack([each[n] for each in tensors]) for n in tensors[0]}

    return State(
        torch.stack([s.p for s in states]),
        stack([s.slots for s in states]),
        stack([s.buffers for s in states]),
    )


def _loss(training: Training, state: State, values: Tensors) -> float:
    if not finite(state):  # The model may refuse it.
        return float("inf")
    loss = training.outer_loss(state, values)
    return float(loss) if bool(loss.isfinite()) else float("inf")


__all__ = ["BatchedSteps", "state_of"]
