"""Forward mode: the tangent of the whole training state in each learned number, carried along.

Memory does not depend on the number of steps and nothing is done twice, but every learned number
costs a Hessian-vector product per step: for few numbers and many steps. Franceschi et al. 2017,
arXiv:1703.01785, whose real-time variant (hypers change during one run) is `every`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...inner.core.hyper import Tensors
from ...inner.core.messages import check_at_least
from ...inner.fx_graph import first_line
from ...inner.torch_internals import Refused
from ..problems.problem import draws_of
from ..tracing.cost_model import FORWARD, remember, spend, why_not_compile
from ..tracing.machine import build_once
from ..tracing.state_layout import StateLayout
from ..tracing.verify import (
    check_against_autograd,
    directions,
    early_state,
    with_autograd_fallback,
)
from ..training.adjoint import Cotangents, seed_adjoint
from ..training.cache import cache_of
from ..training.estimate import Estimate, GoingOn, Note, finished
from ..training.loop import TrainingLoop
from ..training.outcome import Outcome
from ..training.state import State
from ..training.training import Training
from .tangent_step import (
    TangentMachine,
    slopes_of,
    step_columns,
    trace_tangent_step,
    unit_directions,
)


class ForwardState(NamedTuple):
    """Where a run stands: its state, the tangents of what moves in it, one row per learned number,
    steps done, its seed, and the buffers it began with.
    """

    state: State
    tangents: list[Tensor]
    done: int
    seed: int
    fixed: Tensors


@dataclass(frozen=True)
class Forward(GoingOn):
    """Exact in every hyperparameter, one column of tangents per learned number.

    Args:
        compile: as for Replay.
        expect: as for Replay.
        every: the real-time variant: a call goes on from where the last one ended for so many
            steps, with hypers and tangents as they are by then, until training.steps are done and a
            new run begins. Its gradient is that of a run whose hypers had been these all along.
        discount: below 1, what earlier steps did counts so much less with every step (MARTHE,
            Donini et al. 2020, arXiv:1910.08525): less stale and less noisy, but blind to what acts
            late; at 0 only the last step counts.
    """

    compile: bool | Literal["auto"] = "auto"
    expect: float | None = None
    every: int | None = None
    discount: float = 1.0

    def __post_init__(self) -> None:
        check_at_least("every", self.every, 1, whole=True)
        check_at_least("expect", self.expect, 0)
        if not 0 <= self.discount <= 1:
            raise ValueError(f"discount={self.discount:g} must be between 0 and 1")
        if self.compile not in (True, False, "auto"):
            raise ValueError(f"compile={self.compile!r} is none of True, False and 'auto'")

    def expecting(self, seconds: float) -> Forward:
        return replace(self, expect=seconds)

    def train_on(
        self,
        training: Training,
        point: Tensors,
        carry: ForwardState | None,
        *,
        steps: int,
        seed: int,
    ) -> tuple[Estimate, ForwardState | None]:
        return replace(self, every=steps)(training, point, carry, seed=seed)

    def __call__(
        self, training: Training, point: Tensors, carry: ForwardState | None = None, *, seed: int
    ) -> tuple[Estimate, ForwardState | None]:
        return self._columns(training, point, unit_directions(point), carry, seed, None)

    def along(
        self, training: Training, point: Tensors, directions: Sequence[Tensors], *, seed: int
    ) -> Estimate:
        """A column of tangents per direction of the learned values instead; the estimate's grad has
        one entry, "along", of shape (directions,).
        """
        if self.every is not None:
            raise ValueError(f"every={self.every} goes on from tangents in other directions")
        return self._columns(training, point, directions, None, seed, directions)[0]

    def _columns(
        self,
        training: Training,
        point: Tensors,
        columns: Sequence[Tensors],
        carry: ForwardState | None,
        seed: int,
        along: Sequence[Tensors] | None,
    ) -> tuple[Estimate, ForwardState | None]:
        def attempt(refused: str) -> tuple[Estimate, ForwardState | None]:
            return _ForwardPass(
                self, training, point, columns, carry, seed, refused, along
            ).estimate()

        try:
            return with_autograd_fallback(training.problem, self.compile, attempt)
        except RuntimeError as error:
            low = training.problem.autocast
            if low is None and re.search("forward (mode )?AD", str(error)):
                reason = f'{first_line(error)}; use method="replay"'
                note = Note(Outcome.NOT_DIFFERENTIABLE, reason, training.steps)
                return Estimate(float("nan"), {}, note), None
            if low is None:
                raise
            raise RuntimeError(
                f"forward mode through autocast={low} in {training.problem.name}: torch refuses "
                f'({first_line(error)}); use method="replay", or no autocast'
            ) from error


class _ForwardPass:
    """One call of Forward."""

    def __init__(
        self,
        forward: Forward,
        training: Training,
        point: Tensors,
        columns: Sequence[Tensors],
        carry: ForwardState | None,
        seed: int,
        refused: str,
        along: Sequence[Tensors] | None,
    ) -> None:
        self.along = along
        self.forward, self.training, self.refused = forward, training, refused
        self.leaves = {name: value.detach().requires_grad_() for name, value in point.items()}
        resolved = training.resolve(self.leaves)
        self.plain, self.sums = resolved.detach(), Cotangents(resolved)
        self.slopes = slopes_of(training, point, columns)
        if carry is None or carry.done >= training.steps:
            carry = self._begin(seed)
        if carry.tangents and len(carry.tangents[0]) != len(columns):
            raise ValueError(
                f"{len(columns)} learned numbers go on from tangents in {len(carry.tangents[0])}; "
                "learn the same ones until a run of every= is done, or begin a new one with "
                "carry=None"
            )
        self.begun = carry
        self.form = StateLayout.of(
            training, carry.state, self.plain.at(0), self.sums.names, 0, carry.seed
        )

    def estimate(self) -> tuple[Estimate, ForwardState | None]:
        training, begun, every = self.training, self.begun, self.forward.every
        if departs := self._departs():
            note = Note(Outcome.NOT_DIFFERENTIABLE, departs, training.steps)
            return Estimate(float("nan"), {}, note), None
        state, tangents = begun.state, begun.tangents
        tangents = tangents or self._first_tangents(state)
        last = min(training.steps, begun.done + (every or training.steps))
        advance, how = self._choose()
        began = time.monotonic()
        with TrainingLoop(state, last - begun.done) as loop:
            for i, state in loop:
                if self.forward.discount != 1:
                    tangents = [self.forward.discount * x for x in tangents]
                loop.state, tangents = advance(begun.done + i, state, tangents)
        done = begun.done + loop.done
        if not loop.ok:
            reason = f"the weights stopped being finite by step {done}"
            return Estimate.diverged(done, reason), None
        state = loop.state
        if how != "compiled":
            spend(training, time.monotonic() - began)
        loss, adjoint = seed_adjoint(training, self.plain, state, begun.fixed, self.sums)
        steps = done - begun.done
        if adjoint is None:
            reason = f"the held-out loss of {training.problem.name} has no graph to the parameters"
            note = Note(Outcome.NOT_DIFFERENTIABLE, reason, steps)
            return Estimate(float(loss), {}, note), None
        note = Note(steps=steps, how=f"forward: {len(tangents[0])} columns, {how}")
        carry = begun._replace(state=state, tangents=tangents, done=done) if every else None
        return finished(loss, self._gradient(tangents, adjoint), note), carry

    def _departs(self) -> str:
        """Why a step in forward mode is not the training's step; empty if it is."""
        training, begun, form = self.training, self.begun, self.form
        kept, i = cache_of(training.problem), begun.done
        if "forward departs" not in kept:

            def plain(state: State) -> list[Tensor]:
                return form.moving(training.step(state, self.plain.at(i), i, begun.seed))

            tangents = begun.tangents or self._first_tangents(begun.state)
            found = form.moving(self._eager(i, begun.state, tangents)[0])
            low = training.problem.autocast is not None
            kept["forward departs"] = ""
            try:
                check_against_autograd(training, form.names, found, plain, begun.state, low)
            except Refused:
                kept["forward departs"] = (
                    f"forward mode of {training.label} is of another training: its steps draw "
                    "other numbers, as dropout of a transposed tensor, and on a GPU all dropout, "
                    'does under torch.func; use method="replay"'
                )
        return str(kept["forward departs"])

    def _gradient(self, tangents: list[Tensor], adjoint: list[Tensor]) -> Tensors:
        along = torch.stack(
            [
                z.reshape(len(z), -1).double() @ bar.flatten().double()
                for z, bar in zip(tangents, adjoint, strict=True)
            ]
        ).sum(0)
        along, direct = along.cpu(), self.sums.through(self.leaves)
        if self.along is not None:
            own = [sum((direct[n] * d).sum() for n, d in each.items()) for each in self.along]
            return {"along": along + torch.tensor(own, dtype=along.dtype)}
        parts = along.split([value.numel() for value in self.leaves.values()])
        return {
            name: direct[name] + part.view(value.shape)
            for (name, value), part in zip(self.leaves.items(), parts, strict=True)
        }

    def _begin(self, seed: int) -> ForwardState:
        with torch.no_grad():
            state = self.training.begin(self.plain.at(0), seed)
        return ForwardState(state, [], 0, seed, state.buffers)

    def _first_tangents(self, state: State) -> list[Tensor]:
        """Those of the start: of slots that hypers fill, and zeros."""
        device = state.p.device
        values = {name: value.to(device) for name, value in self.plain.at(0).items()}
        slopes = {name: table[:, 0].to(device) for name, table in self.slopes.items()}

        def filled(slope: Tensors) -> Tensors:
            def slots(moved: Tensors) -> Tensors:
                return self.training.slots(state.p, values | moved)

            made: Tensors = torch.func.jvp(slots, ({n: values[n] for n in slope},), (slope,))[1]
            return made

        # jvp refuses a function that gives nothing.
        slots = torch.vmap(filled)(slopes) if self.training.rule.slots else {}
        columns = len(next(iter(slopes.values())))
        return [
            slots[name] if kind == "slots" else torch.zeros(columns, *x.shape).to(x)
            for (kind, name), x in zip(self.form.moved, self.form.moving(state), strict=True)
        ]

    def _choose(self) -> tuple[Advance, str]:
        training, want = self.training, self.forward.compile
        if self.refused or want is False:
            return self._eager, f"by autograd{f': {self.refused}' if self.refused else ''}"
        if want == "auto":
            at = self.begun.state, self.plain.at(0)
            expect = self.forward.expect
            why = why_not_compile(training, self.sums.names, *at, self.begun.seed, expect, FORWARD)
            if why:
                return self._eager, f"by autograd: {why}"
        machine = build_once(
            training, f"forward {self._widths()}", self.plain.at(0), self.sums.names, self._traced
        )
        advance = self._by_machine(machine)
        with machine.unproven(["run"]) as left:
            if left:
                if self._proven(advance, machine.low):
                    machine.agreed.add("run")
                remember(training, self.sums.names, self.begun.state, machine.seconds, FORWARD)
        return advance, machine.how

    def _by_machine(self, machine: TangentMachine) -> Advance:
        training, layout, form = self.training, machine.layout, machine.layout.form
        steps, seed = training.steps, self.begun.seed
        numbers = layout.numbers(
            {n: self.plain.over(n, steps) for n in form.single},
            {n: self.slopes[n].movedim(1, 0) for n in layout.single},
            torch.arange(1, steps + 1, dtype=torch.float64),
        )
        rows = machine.before.over(numbers, self.begun.state.p.device)

        def advance(i: int, state: State, tangents: list[Tensor]) -> tuple[State, list[Tensor]]:
            values = self.plain.at(i) if form.several else {}
            slopes = {n: self.slopes[n][:, i] for n in layout.several}
            batch, now = training.problem.batch(i, seed), [row[i] for row in rows]
            inputs = layout.inputs(state, tangents, values, slopes, now, batch)
            with torch.no_grad(), draws_of(i, seed, state.p.device):
                out = list(machine.run(*inputs))
            return form.state_after(out, state), out[form.after :]

        return advance

    def _proven(self, advance: Advance, low: bool) -> bool:
        form, training, begun = self.form, self.training, self.begun

        def step(i: int, state: State) -> State:
            return training.step(state, self.plain.at(i), i, begun.seed)

        i, state = early_state(step, begun.state, training.steps, begun.done)
        columns = len(next(iter(self.slopes.values())))
        tangents = directions(form.moving(state), columns)

        def flat(advance: Advance, state: State) -> list[Tensor]:
            after, along = advance(i, state, tangents)
            return [*form.moving(after), *along]

        def by_autograd(state: State) -> list[Tensor]:
            return flat(self._eager, state)

        names = [*form.names, *(f"the tangent of {name}" for name in form.names)]
        return check_against_autograd(
            training, names, flat(advance, state), by_autograd, state, low
        )

    def _eager(self, i: int, state: State, tangents: list[Tensor]) -> tuple[State, list[Tensor]]:
        form, seed = self.form, self.begun.seed
        slopes = {name: table[:, i] for name, table in self.slopes.items()}
        t = torch.tensor(float(i + 1), dtype=torch.float64)
        batch = self.training.problem.batch(i, seed)
        with torch.no_grad(), draws_of(i, seed, state.p.device):
            moving, counted, tangents = step_columns(
                self.training, form, state, tangents, self.plain.at(i), slopes, t, batch
            )
        return form.state(moving, counted, state), tangents

    def _widths(self) -> str:
        return " ".join(f"{name}{tuple(table.shape)[:1]}" for name, table in self.slopes.items())

    def _traced(self) -> TangentMachine:
        return trace_tangent_step(
            self.training,
            self.form,
            self.begun.state,
            self.begun.seed,
            self.plain.at(0),
            {name: table[:, 0] for name, table in self.slopes.items()},
            self._first_tangents(self.begun.state),
        )


Advance = Callable[[int, State, list[Tensor]], tuple[State, list[Tensor]]]


__all__ = ["Forward", "ForwardState"]
