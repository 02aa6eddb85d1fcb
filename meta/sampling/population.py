"""Metagradients of several trainings at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...inner.core.hyper import Tensors
from ...inner.torch_internals import Refused
from ..problems.seeding import fold_in
from ..reverse.checkpointing import CheckpointPlan, Checkpoints, find_store, keep_all, revolve
from ..reverse.memory_budget import bytes_of, comfortable, state_bytes
from ..reverse.replay import Replay
from ..tracing.state_layout import UnevenBatches
from ..training.adjoint import norm_at_end, pull_back_start, seed_adjoint
from ..training.estimate import Estimate, Estimator, Note, finished
from ..training.outcome import Outcome
from ..training.state import State, finite
from ..training.training import Training
from .batched_steps import BatchedSteps, state_of


@dataclass(frozen=True)
class Population(Estimator):
    """The mean metagradient of one point over several training seeds, all trained at once.

    Trainings whose step cannot be traced are done one after the other. note.adjoint: the largest of
    theirs.

    Args:
        seeds: of training.
        memory: as for Replay.
        compile: generated code; False runs the traced step as it is.
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
        return _BatchedPass(training, points, seeds, compile).metagradients(memory)
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
    steps = BatchedSteps(training, points, seeds, compile)
    return steps.losses(steps.run(steps.start, 0, training.steps))


def _check_counts(points: Sequence[Tensors], seeds: Sequence[int]) -> None:
    if not points or len(points) != len(seeds):
        raise ValueError(
            f"{len(points)} points and {len(seeds)} seeds make no population; give one seed for "
            "each point, and at least one"
        )


class _BatchedPass:
    """One metagradient of each training."""

    def __init__(
        self, training: Training, points: Sequence[Tensors], seeds: Sequence[int], compile: bool
    ) -> None:
        self.training = training
        self.steps = BatchedSteps(training, points, seeds, compile)
        form, width = self.steps.form, self.steps.machine.graph.numbers_back
        self.several = [n for n in form.learned if n in form.several]
        self.back = torch.zeros(
            training.steps,
            len(seeds),
            width,
            dtype=torch.float64,
            device=self.steps.start.p.device,
        )

    def metagradients(self, memory: str | float | None) -> list[Estimate]:
        steps, many = self.training.steps, self.steps
        graphs, plan, said = self._plan(memory)
        kept: Checkpoints[State] = Checkpoints(plan, find_store("device"), steps - graphs)
        many.prove(["record", "rewind"] if graphs else ["advance", "pull"])
        tapes, state = [], many.start
        for i in range(steps):
            if graphs:
                state, tape = many.record(i, state)
                tapes.append(tape)
            else:
                kept.offer(i, state)
                state = many.advance(i, state)
        ends = [self._end(state, k) for k in range(many.count)]
        none = [torch.zeros_like(x) for x in many.form.moving(state_of(state, 0))]
        bars = [none if bars is None else bars for _, bars in ends]
        adjoint = [torch.stack(each) for each in zip(*bars, strict=True)]
        while tapes:
            out = many.rewind(tapes.pop(), adjoint)
            adjoint = self._put_away(len(tapes), out)
        if not graphs:
            for i, before in kept.backwards(steps, many.advance):
                adjoint = self._put_away(i, many.pull(i, before, adjoint))
        return [
            self._estimate(k, ends[k], [bar[k] for bar in adjoint], said) for k in range(many.count)
        ]

    def _plan(self, memory: str | float | None) -> tuple[bool, CheckpointPlan, str]:
        """(whether every step keeps its graph, the plan for states if not, in words)."""
        steps = self.training.steps
        room = comfortable(self.steps.start.p.device) if memory is None else bytes_of(memory)
        if self.steps.machine.graph_bytes * steps <= room:
            return True, keep_all(), f"all {steps} graphs kept"
        slots = max(1, room // max(state_bytes(self.steps.start), 1))
        if slots >= steps:
            return False, keep_all(), f"all {steps} states kept"
        return False, revolve(slots), f"{slots} of {steps} states kept by revolve"

    def _end(self, state: State, k: int) -> tuple[Tensor, list[Tensor] | None]:
        """The held-out loss of one training, NaN if it diverged, and its adjoint, if any."""
        one = state_of(state, k)
        if not finite(one):  # The model may refuse it.
            return torch.tensor(float("nan")), None
        fixed = {n: one.buffers[n] for n in self.steps.form.still}
        return seed_adjoint(self.training, self.steps.plain[k], one, fixed, self.steps.sums[k])

    def _estimate(
        self,
        k: int,
        end: tuple[Tensor, list[Tensor] | None],
        adjoint: list[Tensor],
        said: str,
    ) -> Estimate:
        training, many, sums = self.training, self.steps, self.steps.sums[k]
        loss, seeded = end
        if not bool(loss.isfinite()):
            return Estimate.diverged(
                training.steps, "the weights or the held-out loss are not finite"
            )
        if seeded is None:
            reason = f"the held-out loss of {training.problem.name} has no graph to the parameters"
            note = Note(Outcome.NOT_DIFFERENTIABLE, reason, training.steps)
            return Estimate(float(loss), {}, note)
        pull_back_start(training, many.plain[k], many.seeds[k], adjoint, sums)
        back = self.back[:, k]
        sums.add_all(many.machine.graph.numbers_behind(many.numbers[k], back[:, 1:].cpu()))
        final = norm_at_end(training.rule, seeded)
        norms = torch.cat([back[:, 0].to(final), final[None]])
        machine = many.machine
        how = f"{said}, {many.count} trainings at once, {machine.how}{machine.remark}"
        note = Note(steps=training.steps, adjoint=norms, how=how)
        return finished(loss, sums.through(many.leaves[k]), note)

    def _put_away(self, i: int, out: Sequence[Tensor]) -> list[Tensor]:
        """The adjoint before step i; the shares of the hypers are put away."""
        back = self.steps.form.split_pullback(out)
        self.back[i] = back.numbers
        for k, sums in enumerate(self.steps.sums):
            sums.add(i, [x[k] for x in back.several], self.several)
        return list(back.adjoint)


__all__ = ["Population", "losses", "metagradients"]
