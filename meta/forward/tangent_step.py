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
from ...inner.fx_graph import (
    Graph,
    ScalarPrelude,
    computes_low,
    extract,
    graph_io,
    is_random,
    retraced,
    split_scalars,
)
from ...inner.torch_internals import Run, tree_unflatten
from ..tracing.codegen import generate
from ..tracing.cuda_graph import captured
from ..tracing.fx_graph import contiguous, traced
from ..tracing.matmul_layout import narrow_transposed
from ..tracing.state_layout import StateLayout
from ..tracing.verify import Verified
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


@dataclass(eq=False)
class TangentMachine(Verified):
    """A traced step of state and columns. single, several: the learned values of one number and of
    more, whose slopes it takes.
    """

    before: ScalarPrelude
    graph: Graph
    single: tuple[str, ...]
    several: tuple[str, ...]
    low: bool
    agreed: bool = False

    @cached_property
    def run(self) -> Run:
        run = generate(self.graph, self.spend)
        return run if any(map(is_random, self.graph.graph.nodes)) else captured(run)


def trace_tangent_step(
    training: Training,
    form: StateLayout,
    state: State,
    seed: int,
    values: Tensors,
    slopes: Tensors,
    tangents: list[Tensor],
) -> TangentMachine:
    form.check()
    single = tuple(n for n in form.single if n in slopes)
    several = tuple(n for n in form.several if n in slopes)

    def examples(i: int) -> list[Tensor]:
        return contiguous(
            [
                *form.moving(state),
                *tangents,
                *form.rest(state),
                *(values[n] for n in form.several),
                *(slopes[n] for n in several),
                *(values[n] for n in form.single),
                *(slopes[n] for n in single),
                torch.tensor(float(i + 1), dtype=torch.float64),
                *form.leaves(training.problem.batch(i, seed)),
            ]
        )

    def whole(*flat: Tensor) -> list[Tensor]:
        take = iter(flat)
        moving, along = ([next(take) for _ in form.moved] for _ in range(2))
        counted = [next(take) for _ in form.counted]
        still = {n: next(take) for n in form.still}
        inside = {n: next(take) for n in form.several}
        sloped = {n: next(take) for n in several}
        inside |= {n: next(take) for n in form.single}
        sloped |= {n: next(take) for n in single}
        t = next(take)
        batch = tree_unflatten(list(take), form.batch)
        around = form.state(moving, counted, state._replace(buffers=state.buffers | still))
        out, aside, tangent = step_columns(training, form, around, along, inside, sloped, t, batch)
        return [*out, *aside, *tangent]

    graph = traced(whole, examples(0), examples(1))
    inputs, outputs = graph_io(graph)
    after = len(form.moved) * 2 + len(form.counted) + len(form.still) + len(form.several)
    after += len(several)
    numbers = inputs[after : after + len(form.single) + len(single) + 1]
    before, _ = split_scalars(graph, numbers, len(tangents[0]))
    rest = inputs[after + len(numbers) :]
    body = extract(graph, [*inputs[:after], *(n for _, n in before.rows), *rest], outputs)
    made = dict(zip(inputs, examples(0), strict=True))
    rows = before.over([made[n][None] for n in numbers], state.p.device)
    flat = [*(made[n] for n in inputs[:after]), *(r[0] for r in rows), *(made[n] for n in rest)]
    body = retraced(body, flat)
    narrow_transposed(body)
    return TangentMachine(before, body, single, several, computes_low(body))
