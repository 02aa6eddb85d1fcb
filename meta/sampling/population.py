"""Several trainings as one: steps of all of them in one call, by vmap over the traced step.

What differs between them are hypers and seeds. On a GPU a small model leaves most of it idle, and
several cost little more than one; on a CPU what is saved is the overhead of small operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ...inner.core.hyper import Tensors
from ...inner.torch_internals import Refused, Run
from ..problems.problem import draws_of
from ..problems.seeding import fold_in
from ..reverse.checkpointing import CheckpointPlan, Checkpoints, find_store, keep_all, revolve
from ..reverse.memory_budget import bytes_of, comfortable, state_bytes
from ..reverse.replay import Replay
from ..tracing.fx_graph import contiguous
from ..tracing.machine import Machine, build_once, machine_of
from ..tracing.state_layout import UnevenBatches
from ..tracing.verify import check_against_autograd, directions, early_state
from ..training.adjoint import Cotangents, norm_at_end, pull_back_start, seed_adjoint
from ..training.estimate import Estimate, Note, finished
from ..training.outcome import Outcome
from ..training.training import State, Training, finite


@dataclass(frozen=True)
class Population:
    """The mean metagradient of one point over several training seeds, all trained at once.

    memory, compile: as for Replay, but compile=False runs the traced step as it is. Trainings whose
    step cannot be traced are done one after the other. note.adjoint: the largest of theirs.
    """

    seeds: int = 4
    memory: str | float | None = None
    compile: bool = True

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds} trains nothing; give at least 1")

    def __call__(
        self, training: Training, point: Tensors, carry: None = None, *, seed: int
    ) -> tuple[Estimate, None]:
        seeds = [fold_in(seed, k, 7) for k in range(self.seeds)]
        made = metagradients(
            training, [point] * self.seeds, seeds, memory=self.memory, compile=self.compile
        )
        trusted = [each for each in made if each.ok]
        if not trusted:
            return made[0], None
        loss = sum(each.loss for each in trusted) / len(trusted)
        grad = {name: torch.stack([each.grad[name] for each in trusted]).mean(0) for name in point}
        note = trusted[0].note
        how = f"mean of {len(trusted)} of {self.seeds} seeds: {note.how}"
        norms = [each.note.adjoint for each in trusted if each.note.adjoint is not None]
        worst = torch.stack(norms).amax(0)
        return Estimate(loss, grad, replace(note, how=how, adjoint=worst)), None


def metagradients(
    training: Training,
    points: Sequence[Tensors],
    seeds: Sequence[int],
    *,
    memory: str | float | None = None,
    compile: bool = True,
) -> list[Estimate]:
    """One exact metagradient per (point, seed), as Replay's, with one step for all of them.

    A training that diverges does not touch the others. Dropout masks and other random draws of
    the loss are not those that each training would have by itself.
    """
    _check_counts(points, seeds)
    try:
        return BatchedTraining(training, points, seeds, compile).metagradients(memory)
    except (Refused, UnevenBatches) as why:
        refused = str(why)
    # Behind the exception, which held all states.
    replay, made = Replay(memory=memory, compile=False), []
    for point, seed in zip(points, seeds, strict=True):
        alone, _ = replay(training, point, seed=seed)
        how = f"{alone.note.how}, one after the other: {refused}"
        made.append(replace(alone, note=replace(alone.note, how=how)))
    return made


def losses(
    training: Training,
    points: Sequence[Tensors],
    seeds: Sequence[int],
    *,
    compile: bool = True,
) -> list[float]:
    """The held-out loss after each training, as `held_out_loss`; inf where it diverged.

    Raises Refused if the steps cannot be traced.
    """
    _check_counts(points, seeds)
    many = BatchedTraining(training, points, seeds, compile)
    return many.losses(many.run(many.start, 0, training.steps))


def _check_counts(points: Sequence[Tensors], seeds: Sequence[int]) -> None:
    if not points or len(points) != len(seeds):
        raise ValueError(
            f"{len(points)} points and {len(seeds)} seeds make no population; give one seed for "
            "each point, and at least one"
        )


class BatchedTraining:
    """Trainings side by side: a State whose tensors have one more dimension, the first.

    Raises Refused if their step cannot be traced.
    """

    def __init__(
        self, training: Training, points: Sequence[Tensors], seeds: Sequence[int], compile: bool
    ) -> None:
        self.training, self.seeds, self.count = training, list(seeds), len(seeds)
        self.leaves = [
            {name: value.detach().requires_grad_() for name, value in point.items()}
            for point in points
        ]
        resolved = [training.resolve(leaves) for leaves in self.leaves]
        self.plain = [each.detach() for each in resolved]
        self.sums = [Cotangents(each) for each in resolved]
        with torch.no_grad():
            first = training.begin(self.plain[0].at(0), self.seeds[0])
        names = self.sums[0].names
        one = machine_of(training, first, self.plain[0].at(0), names, self.seeds[0])
        self.machine = build_once(
            training,
            f"{self.count} at once, compile={compile}",
            self.plain[0].at(0),
            names,
            lambda: Machine(one.graph.many(self.count), interpreted=not compile),
        )
        self.form = self.machine.graph.form
        graph, steps, device = self.machine.graph, training.steps, first.p.device
        t = torch.arange(1, steps + 1, dtype=torch.float64)
        self.numbers = [
            [*(plain.over(n, steps) for n in self.form.single), t] for plain in self.plain
        ]
        rows = [graph.before.over(numbers, device) for numbers in self.numbers]
        self.rows = [torch.stack(row, 1) for row in zip(*rows, strict=True)]
        self.several = [n for n in self.form.learned if n in self.form.several]
        width = graph.numbers_back
        self.back = torch.zeros(steps, self.count, width, dtype=torch.float64, device=device)

    @cached_property
    def start(self) -> State:
        with torch.no_grad():
            return self._stacked(
                [
                    self.training.begin(plain.at(0), seed)
                    for plain, seed in zip(self.plain, self.seeds, strict=True)
                ]
            )

    def run(self, state: State, first: int, last: int) -> State:
        """Steps first to last - 1 of all, without a graph; no check whether they are finite."""
        self._prove(["advance"])
        for i in range(first, last):
            state = self._advance(i, state)
        return state

    def losses(self, state: State) -> list[float]:
        """The held-out loss of each in a state; inf where it is not finite."""
        with torch.no_grad():
            return [self._loss(self._one(state, k), k) for k in range(self.count)]

    def _loss(self, state: State, k: int) -> float:
        if not finite(state):  # The model may refuse it.
            return float("inf")
        loss = self.training.outer_loss(state, self.plain[k].at(self.training.steps - 1))
        return float(loss) if bool(loss.isfinite()) else float("inf")

    def metagradients(self, memory: str | float | None) -> list[Estimate]:
        steps = self.training.steps
        graphs, plan, said = self._plan(memory)
        kept: Checkpoints[State] = Checkpoints(plan, find_store("device"), steps - graphs)
        self._prove(["record", "rewind"] if graphs else ["advance", "pull"])
        tapes, state = [], self.start
        for i in range(steps):
            if graphs:
                state, tape = self._record(i, state)
                tapes.append(tape)
            else:
                kept.offer(i, state)
                state = self._advance(i, state)
        ends = [self._end(state, k) for k in range(self.count)]
        none = [torch.zeros_like(x) for x in self.form.moving(self._one(state, 0))]
        bars = [none if bars is None else bars for _, bars in ends]
        adjoint = [torch.stack(each) for each in zip(*bars, strict=True)]
        while tapes:
            with torch.no_grad():
                out = self.machine.rewind(*tapes.pop(), *contiguous(adjoint))
            adjoint = self._back(len(tapes), out)
        if not graphs:
            for i, before in kept.backwards(steps, self._advance):
                adjoint = self._pull(i, before, adjoint)
        return [
            self._estimate(k, ends[k], [bar[k] for bar in adjoint], said) for k in range(self.count)
        ]

    def _plan(self, memory: str | float | None) -> tuple[bool, CheckpointPlan, str]:
        """(whether every step keeps its graph, the plan for states if not, in words)."""
        steps = self.training.steps
        room = comfortable(self.start.p.device) if memory is None else bytes_of(memory)
        if self.machine.graph_bytes * steps <= room:
            return True, keep_all(), f"all {steps} graphs kept"
        slots = max(1, room // max(state_bytes(self.start), 1))
        if slots >= steps:
            return False, keep_all(), f"all {steps} states kept"
        return False, revolve(slots), f"{slots} of {steps} states kept by revolve"

    def _end(self, state: State, k: int) -> tuple[Tensor, list[Tensor] | None]:
        """The held-out loss of one training, NaN if it diverged, and its adjoint, if any."""
        one = self._one(state, k)
        if not finite(one):  # The model may refuse it.
            return torch.tensor(float("nan")), None
        fixed = {n: one.buffers[n] for n in self.form.still}
        return seed_adjoint(self.training, self.plain[k], one, fixed, self.sums[k])

    def _estimate(
        self,
        k: int,
        end: tuple[Tensor, list[Tensor] | None],
        adjoint: list[Tensor],
        said: str,
    ) -> Estimate:
        training, sums, graph = self.training, self.sums[k], self.machine.graph
        loss, seeded = end
        if not bool(loss.isfinite()):
            return Estimate.diverged(
                training.steps, "the weights or the held-out loss are not finite"
            )
        if seeded is None:
            reason = f"the held-out loss of {training.problem.name} has no graph to the parameters"
            note = Note(Outcome.NOT_DIFFERENTIABLE, reason, training.steps)
            return Estimate(float(loss), {}, note)
        pull_back_start(training, self.plain[k], self.seeds[k], adjoint, sums)
        back = self.back[:, k]
        sums.add_all(graph.numbers_behind(self.numbers[k], back[:, 1:].cpu()))
        final = norm_at_end(training.rule, seeded)
        norms = torch.cat([back[:, 0].to(final), final[None]])
        how = f"{said}, {self.count} trainings at once, {self.machine.how}{self.machine.remark}"
        note = Note(steps=training.steps, adjoint=norms, how=how)
        return finished(loss, sums.through(self.leaves[k]), note)

    def _back(self, i: int, out: Sequence[Tensor]) -> list[Tensor]:
        """The adjoint before step i; the shares of the hypers are put away."""
        back = self.form.split_pullback(out)
        self.back[i] = back.numbers
        for k, sums in enumerate(self.sums):
            sums.add(i, [x[k] for x in back.several], self.several)
        return list(back.adjoint)

    def _advance(self, i: int, state: State) -> State:
        return self.form.state_after(self._call(self.machine.advance, i, state), state)

    def _record(self, i: int, state: State) -> tuple[State, Sequence[Tensor]]:
        out = self._call(self.machine.record, i, state)
        return self.form.state_after(out, state), out[self.form.after :]

    def _pull(self, i: int, state: State, adjoint: list[Tensor]) -> list[Tensor]:
        return self._back(i, self._call(self.machine.pull, i, state, adjoint))

    def _prove(self, parts: Sequence[str]) -> None:
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
        rows = [row[i] for row in self.rows]
        batches = [self.training.problem.batch(i, seed) for seed in self.seeds]
        inputs = form.inputs(state, values, rows, form.batch.stacked(batches), adjoint)
        with torch.no_grad(), draws_of(i, self.seeds[0], state.p.device):
            return run(*contiguous(inputs.flat()))

    def _stacked(self, states: Sequence[State]) -> State:
        def stack(tensors: Sequence[Tensors]) -> Tensors:
            return {n: torch.stack([each[n] for each in tensors]) for n in tensors[0]}

        return State(
            torch.stack([s.p for s in states]),
            stack([s.slots for s in states]),
            stack([s.buffers for s in states]),
        )

    def _one(self, state: State, k: int) -> State:
        return State(
            state.p[k],
            {n: x[k] for n, x in state.slots.items()},
            {n: x[k] for n, x in state.buffers.items()},
        )


__all__ = ["BatchedTraining", "Population", "losses", "metagradients"]
