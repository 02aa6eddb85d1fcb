"""A training step and its pullback as one graph of tensor operations, traced once and divided.

The trace holds the step, the gradient inside it and the pullback of both, so nothing that runs
later needs autograd. What a step computes of single numbers alone (a bias correction, a rate times
a decay) and what it does with the cotangents of those numbers is taken out: it is done for all
steps of a training at once, and what is left in the loop is vectors. In a compiled loop this is
more than tidiness: a compiler that finds beta1**t beside a vector raises to that power once per
weight, in double precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ...inner.core.hyper import Tensors
from ...inner.fx_graph import (
    CannotTrace,
    Graph,
    NormOf,
    ScalarPrelude,
    computes_low,
    extract,
    graph_io,
    is_number,
    is_random,
    over_time,
    retraced,
    split_scalars,
)
from ...inner.numerics.pullback import vjp
from ...inner.torch_internals import (
    partition,
)
from ..training.state import State
from ..training.training import Training
from .fx_graph import batchable, contiguous, traced
from .matmul_layout import narrow_transposed
from .state_layout import StateLayout, StepInputs, TensorSpec


@dataclass(frozen=True)
class StepGraph:
    """A traced step in three parts.

    before: what it computes of (*single, t). joint(*moving, *rest, *several, *rows, *batch,
    *adjoint) -> (*moving after, *counted after, *adjoint before, *cotangents of several, one
    vector: the norm of the weights' adjoint and cotangents of numbers). behind(*single, t,
    cotangents of numbers) -> cotangents of the single hypers learned. random: whether it draws.
    takes: what the inputs of joint are like.
    """

    form: StateLayout
    before: ScalarPrelude
    joint: Graph
    behind: Graph
    random: bool
    takes: tuple[TensorSpec, ...]

    @property
    def low(self) -> bool:
        """Whether it computes in less than float32 anywhere."""
        return computes_low(self.joint)

    @property
    def numbers_back(self) -> int:
        """The length of joint's last output, of each training."""
        return graph_io(self.joint)[1][-1].meta["val"].shape[-1]  # type: ignore[no-any-return]

    def numbers_behind(self, numbers: Sequence[Tensor], back: Tensor) -> Tensors:
        """Cotangents of the single hypers for every step, from those of their numbers."""
        names = [n for n in self.form.learned if n in self.form.single]
        if not names:
            return {}
        return dict(zip(names, over_time(self.behind, [*numbers, back]), strict=True))

    @property
    def _primals(self) -> int:
        return len(self.takes) - len(self.form.moved)

    def advance(self) -> Graph:
        """The step alone: (*moving, *rest, *several, *rows, *batch) -> (*moving, *counted)."""
        inputs, outputs = graph_io(self.joint)
        return extract(self.joint, inputs[: self._primals], outputs[: self.form.after])

    def pull(self) -> Graph:
        """The pullback, the step done again inside: joint without the state after."""
        inputs, outputs = graph_io(self.joint)
        return extract(self.joint, inputs, outputs[self.form.after :])

    def many(self, count: int) -> StepGraph:
        """The same for so many trainings at once, in a new first dimension of all tensors.

        Their random draws are apart from each other, and not those of each by itself.
        """
        flat = [x.zeros(count) for x in self.takes]
        joint = retraced(torch.vmap(batchable(self.joint), randomness="different"), flat)
        return replace(
            self,
            form=replace(self.form, batch=self.form.batch.many(count)),
            joint=joint,
            takes=tuple(map(TensorSpec.of, flat)),
        )

    def halves(self) -> tuple[Graph, Graph, int]:
        """(record, rewind, bytes): record is advance with what rewind needs behind its outputs;
        rewind(*that, *adjoint) is the pullback. bytes: what a step keeps for its way back.
        """
        copy = fx.Graph()
        copy.output(copy.graph_copy(self.joint.graph, {}))
        joint = fx.GraphModule(self.joint, copy)
        inputs, _ = graph_io(joint)
        # What costs no product is done again: memory is slower than that. But not draws, which
        # would come out otherwise.
        record, rewind = partition(
            joint, len(self.form.moved), self.form.after, recompute=not self.random
        )
        saved = graph_io(record)[1][self.form.after :]
        names = [n.name for n in saved]
        takes = [n.name for n in graph_io(rewind)[0]]
        if takes != [*names, *(n.name for n in inputs[self._primals :])]:
            raise CannotTrace("its graph cannot be parted into a way there and a way back")
        size = sum(n.meta["val"].nbytes for n in saved if isinstance(n.meta.get("val"), Tensor))
        return record, rewind, size


def trace(
    training: Training, state: State, values: Tensors, learned: Sequence[str], seed: int
) -> StepGraph:
    """The graph of a training's step and pullback; CannotTrace if it is more than tensors."""
    form = StateLayout.of(training, state, values, learned, 0, seed)
    form.batch.check()
    examples, others = (_examples(training, form, state, values, i, seed + i) for i in (0, 1))
    return _divide(form, _whole(training, form, state, examples, others), examples)


def _examples(
    training: Training, form: StateLayout, state: State, values: Tensors, i: int, seed: int
) -> list[Tensor]:
    numbers = [*(values[n] for n in form.single), torch.tensor(float(i + 1), dtype=torch.float64)]
    bars = [torch.ones_like(x) for x in form.moving(state)]
    batch = form.batch.leaves(training.problem.batch(i, seed))
    return contiguous(form.inputs(state, values, numbers, batch, bars).flat())


def _whole(
    training: Training,
    form: StateLayout,
    state: State,
    examples: list[Tensor],
    others: list[Tensor],
) -> Graph:
    """A step, undivided and without mutations."""

    def joint(*flat: Tensor) -> list[Tensor]:
        inputs = form.split(flat, len(form.single) + 1)
        moving = [x.detach().requires_grad_() for x in inputs.moving]
        start, inside = form.start(inputs._replace(moving=moving), state)
        inside |= {n: inside[n].detach().requires_grad_() for n in form.learned}
        batch, t = form.batch.nest(inputs.batch), inputs.numbers[-1]
        after = training.step_on(start, inside, t, batch)
        moved = form.moving(after)
        learned = [inside[n] for n in form.learned]
        grads = vjp(moved, [*moving, *learned], inputs.beside, keep=False)
        return [
            *(x.detach() for x in moved),
            *(after.buffers[n].detach() for n in form.counted),
            *grads,
        ]

    return traced(joint, examples, others)


def _divide(form: StateLayout, whole: Graph, examples: list[Tensor]) -> StepGraph:
    flat, outputs = graph_io(whole)
    inputs, made = (
        form.split(flat, len(form.single) + 1),
        form.split(examples, len(form.single) + 1),
    )
    numbers = inputs.numbers
    bars_to = form.after + len(form.moved)
    states, bars = outputs[: form.after], outputs[form.after : bars_to]
    grads = dict(zip(form.learned, outputs[bars_to:], strict=True))
    large = [grads[n] for n in form.learned if n in form.several]
    small = [grads[n] for n in form.learned if n in form.single]

    # First without the end, to know what is early; the end reads numbers, not rows of them.
    _, early = split_scalars(whole, numbers, 1)
    late = _late(whole, {*states, *bars, *large}, small, early)
    before, early = split_scalars(whole, numbers, 1, late)
    read_late = {x for n in late for x in n.all_input_nodes} | set(small)
    ending = [n for n in whole.graph.nodes if n in read_late and n not in early | late]
    behind = extract(whole, [*numbers, ending], small, draws=False)
    results: list[fx.Node | list[fx.Node | NormOf]] = [
        *states,
        *bars,
        *large,
        [NormOf(bars[0]), *ending],
    ]
    joint, takes = without_scalars(whole, before, inputs, made, results)
    draws = any(map(is_random, joint.graph.nodes))
    return StepGraph(form, before, joint, behind, draws, tuple(map(TensorSpec.of, takes)))


def without_scalars(
    whole: Graph,
    before: ScalarPrelude,
    inputs: StepInputs[fx.Node],
    made: StepInputs[Tensor],
    outputs: Sequence[fx.Node | list[fx.Node | NormOf]],
) -> tuple[Graph, list[Tensor]]:
    """(a graph that takes rows in the place of its numbers, examples of its inputs).

    before: what makes the rows. inputs, made: nodes and examples of what the whole graph takes.
    """
    held: Any = [nodes for _, nodes in before.rows]
    body = extract(whole, inputs._replace(numbers=held).flat(), outputs)
    rows = before.over([x[None] for x in made.numbers], made.moving[0].device)
    takes = made._replace(numbers=[row[0] for row in rows]).flat()
    body = retraced(body, takes)
    narrow_transposed(body)
    return body, takes


def _late(
    whole: Graph, used: set[fx.Node], small: list[fx.Node], early: set[fx.Node]
) -> set[fx.Node]:
    """Nodes on the way from cotangents of numbers to those of hypers, numbers throughout.

    What they read is handed on as float64, so it is no condition of a where.
    """

    def readable(x: fx.Node) -> bool:
        return is_number(x) and (x in early or x.meta["val"].is_floating_point())

    late: set[fx.Node] = set()
    for n in reversed(list(whole.graph.nodes)):
        if n.op != "call_function" or n in used or n in early or not is_number(n):
            continue
        wanted = n in small or bool(n.users)
        graph_io = all(user in late or user.op == "output" for user in n.users)
        if wanted and graph_io and all(map(readable, n.all_input_nodes)) and not is_random(n):
            late.add(n)
    return late
