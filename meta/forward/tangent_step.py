"""A step of the state and of its tangents in the learned numbers: as it is, traced and compiled."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, cast

import torch
from torch import Tensor

from ...inner.core.hyper import Tensors
from ...inner.fx_graph import Graph, ScalarPrelude, computes_low, graph_io, is_random, split_scalars
from ...inner.torch_internals import Run
from ..tracing.fx_graph import contiguous, traced
from ..tracing.machine import TracedCode
from ..tracing.state_layout import StateLayout, StepInputs, X
from ..tracing.step_graph import without_scalars
from ..training.state import State
from ..training.training import Loss, Training


@cache
def _load_forward_mode() -> None:
    """The first use of it makes torch warn of how it is written inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


def slopes_of(training: Training, point: Tensors, directions: Sequence[Tensors]) -> Tensors:
    """The derivative of the value in force at each step along each direction of the learned values:
    (directions, steps, *value's shape).
    """
    _load_forward_mode()
    resolved = training.resolve({n: v.detach().requires_grad_() for n, v in point.items()})
    everything = resolved.varying | resolved.constant
    names = [n for n, value in everything.items() if value.requires_grad]
    rows: dict[str, list[Tensor]] = {name: [] for name in names}

    def tables(at: Tensors) -> Tensors:
        resolved = training.resolve(at)
        return {n: resolved.over(n, training.steps) for n in names}

    for along in directions:
        slope: Tensors = torch.func.jvp(tables, (dict(point),), (along,))[1]
        for n in names:
            rows[n].append(slope[n].detach())
    stacked = {name: torch.stack(made) for name, made in rows.items()}
    return {name: table for name, table in stacked.items() if bool(table.any())}


def unit_directions(point: Tensors) -> list[Tensors]:
    """One direction per learned number."""
    return [
        {n: torch.zeros_like(v) for n, v in point.items()} | {name: entry.view(value.shape)}
        for name, value in point.items()
        for entry in torch.eye(value.numel(), dtype=value.dtype)
    ]


def step_columns(
    training: Training,
    form: StateLayout,
    state: State,
    tangents: list[Tensor],
    values: Tensors,
    slopes: Tensors,
    t: Tensor,
    batch: Any,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """A step of the state and of every column: (moved, counted, tangents after it)."""

    def gradient(loss: Loss, p: Tensor) -> tuple[Tensor, tuple[Tensor, Tensors]]:
        made: tuple[Tensor, tuple[Tensor, Tensors]] = torch.func.grad(loss, has_aux=True)(p)
        return made

    counted = [state.buffers[n] for n in form.counted]
    # A number of the host may meet a GPU's vector, but a column of its tangents may not.
    device = state.p.device
    values = {n: value.to(device) for n, value in values.items()}
    slopes = {n: slope.to(device) for n, slope in slopes.items()}
    t = t.to(device)

    def step(moving: list[Tensor], moved: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        start = form.state(moving, counted, state)
        after = training.step_on(start, values | moved, t, batch, gradient=gradient)
        form.check_still(state, after)
        return form.moving(after), [after.buffers[n] for n in form.counted]

    def column(
        tangent: list[Tensor], slope: Tensors
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        at = form.moving(state), {name: values[name] for name in slope}
        out, along, aside = cast(Any, torch.func.jvp(step, at, (tangent, slope), has_aux=True))
        return out, aside, along

    # The state is the same for all columns, so it comes out once.
    out_dims: Any = (None, None, 0)
    made: tuple[list[Tensor], list[Tensor], list[Tensor]] = torch.vmap(
        column, out_dims=out_dims, randomness="same"
    )(tangents, slopes)
    return made


@dataclass(frozen=True)
class TangentLayout:
    """How a step of state and columns lies in flat lists: tangents and slopes beside the step.

    single, several: the learned values of one number and of more, whose slopes it takes.
    """

    form: StateLayout
    single: tuple[str, ...]
    several: tuple[str, ...]

    @staticmethod
    def of(form: StateLayout, slopes: Tensors) -> TangentLayout:
        single, several = (
            (n for n in names if n in slopes) for names in (form.single, form.several)
        )
        return TangentLayout(form, tuple(single), tuple(several))

    def numbers(self, values: Tensors, slopes: Tensors, t: Tensor) -> list[Tensor]:
        """What a step computes with of numbers alone; of one step, or of all with time first."""
        return [*(values[n] for n in self.form.single), *(slopes[n] for n in self.single), t]

    def inputs(
        self,
        state: State,
        tangents: Sequence[Tensor],
        values: Tensors,
        slopes: Tensors,
        numbers: Sequence[Tensor],
        batch: Any,
    ) -> list[Tensor]:
        """numbers: those of the step, or rows."""
        beside = [*tangents, *(slopes[n] for n in self.several)]
        leaves = self.form.batch.leaves(batch)
        return contiguous(self.form.inputs(state, values, numbers, leaves, beside).flat())

    def split(self, flat: Sequence[X]) -> StepInputs[X]:
        return self.form.split(flat, len(self.form.single) + len(self.single) + 1)

    def start(
        self, inputs: StepInputs[Tensor], around: State
    ) -> tuple[State, Sequence[Tensor], Tensors, Tensors]:
        """(state, tangents, values, slopes) that inputs hold."""
        state, values = self.form.start(inputs, around)
        many, first = len(self.form.moved), len(self.form.single)
        slopes = dict(zip(self.several, inputs.beside[many:], strict=True))
        slopes |= dict(zip(self.single, inputs.numbers[first:-1], strict=True))
        return state, inputs.beside[:many], values, slopes


@dataclass(eq=False)
class TangentMachine(TracedCode):
    """A traced step of state and columns. before, graph: as StepGraph has them."""

    layout: TangentLayout
    before: ScalarPrelude
    graph: Graph

    @property
    def captures(self) -> bool:
        return not any(map(is_random, self.graph.graph.nodes))

    @property
    def low(self) -> bool:
        return computes_low(self.graph)

    @cached_property
    def run(self) -> Run:
        return self._compiled(self.graph)


def trace_tangent_step(
    training: Training,
    form: StateLayout,
    state: State,
    seed: int,
    values: Tensors,
    slopes: Tensors,
    tangents: list[Tensor],
) -> TangentMachine:
    form.batch.check()
    layout = TangentLayout.of(form, slopes)

    def examples(i: int) -> list[Tensor]:
        t = torch.tensor(float(i + 1), dtype=torch.float64)
        numbers, batch = layout.numbers(values, slopes, t), training.problem.batch(i, seed)
        return layout.inputs(state, tangents, values, slopes, numbers, batch)

    def whole(*flat: Tensor) -> list[Tensor]:
        inputs = layout.split(flat)
        around, along, inside, sloped = layout.start(inputs, state)
        batch, t = form.batch.nest(inputs.batch), inputs.numbers[-1]
        out, aside, tangent = step_columns(
            training, form, around, list(along), inside, sloped, t, batch
        )
        return [*out, *aside, *tangent]

    made = examples(0)
    graph = traced(whole, made, examples(1))
    flat, outputs = graph_io(graph)
    inputs = layout.split(flat)
    before, _ = split_scalars(graph, inputs.numbers, len(tangents[0]))
    body, _ = without_scalars(graph, before, inputs, layout.split(made), outputs)
    return TangentMachine(layout, before, body)
