"""Replayed reverse mode: the exact gradient of the held-out loss through every training step.

Training is done once; going backwards, one step at a time is pulled back. Where there is memory
for it every step leaves its graph behind; where not, states are kept, all or the ones from which
the others are reached soonest, and each step is done again.
Maclaurin, Duvenaud & Adams 2015, arXiv:1502.03492; Engstrom et al. 2025, arXiv:2503.13751.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ...inner.core.hyper import Tensors
from ...inner.core.messages import check_at_least
from ..tracing.cost_model import remember, spend, why_not_compile, worth_tracing
from ..tracing.machine import machine_of
from ..tracing.verify import with_autograd_fallback
from ..training.adjoint import (
    Cotangents,
    missing_derivative,
    norm_at_end,
    pull_back_start,
    seed_adjoint,
)
from ..training.estimate import Estimate, Estimator, Note, finished
from ..training.loop import TrainingLoop
from ..training.outcome import Outcome
from ..training.state import Resolved, State
from ..training.training import Training
from .checkpointing import (
    CheckpointPlan,
    Checkpoints,
    find_checkpoint_plan,
    find_store,
    keep_all,
    revolve,
)
from .compiled_steps import Compiled
from .memory_budget import bytes_of, comfortable, state_bytes
from .state_store import room_in
from .steps import Eager, Steps


@dataclass(frozen=True)
class Replay(Estimator):
    """Exact in every hyperparameter of rule, schedule and loss, for any number of them.

    What is kept changes no bit of the gradient; compiled, kept and recomputed graphs differ by
    rounding.

    Args:
        memory: for graphs and states, such as "2GiB" or bytes; by default a quarter of what is
            free, on a CPU at most 2 GiB, and for states a quarter of what is free where the store
            is.
        graphs: "keep" that of every step, "recompute" all on the way back, "auto" keeps what fits.
        checkpoints: the states to recompute from: "all", "every:K", "revolve:S", "online:S" or the
            number S; "auto" as many as fit, all or by revolve.
        store: where they are kept, "device", "cpu", "disk" or a folder.
        compile: True and "auto" run generated code, "auto" where that pays for the time to make it;
            "trace" runs the traced operations as they are, on small models in half of autograd's
            time, for a few seconds to make; "auto" does so where compiling would not pay and 1000
            steps are ahead. A step that cannot be compiled, or whose first results differ from
            autograd's, is done by autograd, and note.how says so.
        expect: seconds of metagradients still to come, if known.
        window: differentiate the last so many steps only, the earlier ones as constants; biased.
        clip: the largest norm that the weights' adjoint may have; biased.
    """

    memory: str | float | None = None
    graphs: Literal["auto", "keep", "recompute"] = "auto"
    checkpoints: str | int = "auto"
    store: str | Path = "device"
    compile: bool | Literal["auto", "trace"] = "auto"
    expect: float | None = None
    window: int | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.memory is not None:
            bytes_of(self.memory)
        if self.graphs not in ("auto", "keep", "recompute"):
            raise ValueError(f"graphs={self.graphs!r} is none of 'auto', 'keep' and 'recompute'")
        if self.compile not in (True, False, "auto", "trace"):
            raise ValueError(f"compile={self.compile!r} is none of True, False, 'auto', 'trace'")
        if self.checkpoints != "auto":
            find_checkpoint_plan(self.checkpoints)
        find_store(self.store)
        if self.graphs == "keep" and (self.memory is not None or self.checkpoints != "auto"):
            raise ValueError(
                f"graphs='keep' keeps every graph, whatever memory={self.memory!r} and checkpoints="
                f"{self.checkpoints!r} say; leave them out, or give graphs='auto'"
            )
        check_at_least("window", self.window, 1, whole=True)
        check_at_least("clip", self.clip, 0)
        if self.clip == 0:
            raise ValueError("clip=0 would leave no gradient; give a number above 0, or None")
        check_at_least("expect", self.expect, 0)

    def expecting(self, seconds: float) -> Replay:
        return replace(self, expect=seconds)

    def __call__(
        self, training: Training, point: Tensors, carry: None = None, *, seed: int
    ) -> tuple[Estimate, None]:
        leaves = {name: value.detach().requires_grad_() for name, value in point.items()}
        resolved = training.resolve(leaves)

        def attempt(refused: str) -> Estimate:
            return _ReplayPass(self, training, resolved, seed, refused).estimate(leaves)

        return with_autograd_fallback(training.problem, self.compile, attempt), None


class _ReplayPass:
    """One metagradient."""

    def __init__(
        self, replay: Replay, training: Training, resolved: Resolved, seed: int, refused: str
    ) -> None:
        self.replay, self.training, self.seed = replay, training, seed
        self.plain = resolved.detach()
        self.sums = Cotangents(resolved)
        with torch.no_grad():
            self.start = training.begin(self.plain.at(0), seed)
        self.steps, self.how = self._choose(refused)
        self.from_step = max(0, training.steps - (replay.window or training.steps))

    def estimate(self, leaves: Tensors) -> Estimate:
        training = self.training
        graphs, plan, said = self._plan()
        tapes: list[object] = []
        count = training.steps - self.from_step - graphs
        kept: Checkpoints[State] = Checkpoints(plan, find_store(self.replay.store), count)

        self.steps.prepare(self._parts(graphs, count), self.start)
        with self._timed():
            with TrainingLoop(self.start, training.steps) as loop:
                for i, state in loop:
                    if i >= training.steps - graphs:
                        tape, loop.state = self.steps.record(i, state)
                        tapes.append(tape)
                        continue
                    if i >= self.from_step:
                        kept.offer(i - self.from_step, state)
                    loop.state = self.steps.advance(i, state)
            if not loop.ok:
                return Estimate.diverged(loop.done, loop.reason)
            loss, adjoint = seed_adjoint(
                training, self.plain, loop.state, self.start.buffers, self.sums
            )
            if adjoint is None:
                reason = (
                    f"the held-out loss of {training.problem.name} has no graph to the parameters"
                )
                note = Note(Outcome.NOT_DIFFERENTIABLE, reason, training.steps)
                return Estimate(float(loss), {}, note)
            final = norm_at_end(training.rule, adjoint)
            try:
                adjoint = self._back(adjoint, tapes, kept, graphs)
            except RuntimeError as error:
                note = Note(Outcome.NOT_DIFFERENTIABLE, missing_derivative(error), training.steps)
                return Estimate(float(loss), {}, note)
        if self.from_step == 0:
            pull_back_start(training, self.plain, self.seed, adjoint, self.sums)
        norms, tables = self.steps.finish()
        self.sums.add_all(tables)
        note = Note(
            steps=training.steps,
            adjoint=torch.cat([norms.to(final), final[None]]),
            graphs=graphs,
            states=kept.peak,
            recomputed=kept.recomputed,
            how=f"{said}{self.how}{self.steps.remark}",
        )
        if self.steps.seconds:
            remember(training, self.sums.names, self.start, self.steps.seconds)
        return finished(loss, self.sums.through(leaves), note)

    def _back(
        self, adjoint: list[Tensor], tapes: list[object], kept: Checkpoints[State], graphs: int
    ) -> list[Tensor]:
        for i in reversed(range(self.training.steps - graphs, self.training.steps)):
            adjoint = self.steps.rewind(i, tapes.pop(), self._clipped(adjoint))
        first = self.from_step
        states = kept.backwards(
            self.training.steps - graphs - first, lambda i, s: self.steps.advance(i + first, s)
        )
        for i, state in states:
            adjoint = self.steps.pull(i + first, state, self._clipped(adjoint))
        return adjoint

    def _clipped(self, adjoint: list[Tensor]) -> list[Tensor]:
        if self.replay.clip is None:
            return adjoint
        # One factor for all, so that the direction stays; no branch, which a GPU would wait for.
        factor = (self.replay.clip / adjoint[0].norm()).clamp(max=1)
        return [x * factor.to(x) for x in adjoint]

    def _choose(self, refused: str) -> tuple[Steps, str]:
        """How steps are done, and what to say of it."""
        eager = Eager(self.training, self.plain, self.seed, self.sums, self.start.buffers)
        want = self.replay.compile
        if refused or want is False:
            return eager, f"by autograd{f': {refused}' if refused else ''}"
        at, expect = (self.start, self.plain.at(0)), self.replay.expect
        why = ""
        if want == "auto" and (parts := self.training.problem.accumulate) > 1:
            return eager, f"by autograd: accumulate={parts} is kept to, one graph would be of all"
        if want == "auto":
            why = why_not_compile(self.training, self.sums.names, *at, self.seed, expect)
            if why and not worth_tracing(self.training, *at, self.seed, expect):
                return eager, f"by autograd: {why}"
        machine = machine_of(
            self.training,
            *at,
            self.sums.names,
            self.seed,
            interpreted=want == "trace" or bool(why),
        )
        steps = Compiled(
            machine, self.training, self.plain, self.seed, self.sums, self.start.buffers
        )
        return steps, f"{machine.how}{f': {why}' if why else ''}"

    def _plan(self) -> tuple[int, CheckpointPlan, str]:
        """(how many of the last steps keep their graph, the plan for the states of the others)."""
        replay, count = self.replay, self.training.steps - self.from_step
        if replay.graphs == "keep":
            return count, keep_all(), f"all {count} graphs kept, "
        if replay.checkpoints != "auto":
            return (
                0,
                find_checkpoint_plan(replay.checkpoints),
                f"checkpoints {replay.checkpoints}, ",
            )
        state = max(state_bytes(self.start), 1)
        device, together = self.start.p.device, True
        room = for_states = bytes_of(replay.memory or 0)
        if replay.memory is None:
            room, for_states = comfortable(device), room_in(replay.store, device)
            together = replay.store in ("device", device.type)
        slots = max(1, for_states // state)
        if slots < count:
            return 0, revolve(slots), f"{slots} of {count} states kept by revolve, "
        graphs = 0
        if replay.graphs == "auto":
            # A step that keeps its graph keeps no state.
            beside = state if together else 0
            more = max(self.steps.graph_bytes(self.start) - beside, 1.0)
            graphs = int(min(count, max(0, room - count * beside) // more))
        if graphs == count:
            return count, keep_all(), f"all {count} graphs kept, "
        return graphs, keep_all(), f"{graphs} graphs and {count - graphs} states kept, "

    def _parts(self, graphs: int, pulled: int) -> list[str]:
        """The parts of a step that the run will use."""
        parts = ["advance"] if self.training.steps > graphs else []
        return [*parts, *(["pull"] if pulled else []), *(["record", "rewind"] if graphs else [])]

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Seconds that were spent without a compiler decide when it pays."""
        began = time.monotonic()
        yield
        if self.how != "compiled":
            spend(self.training, time.monotonic() - began)


__all__ = ["Replay"]
