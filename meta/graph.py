"""A training step and its pullback as one graph of tensor operations, traced once and divided.

The trace holds the step, the gradient inside it and the pullback of both, so nothing that runs
later needs autograd. What a step computes of single numbers alone (a bias correction, a rate times
a decay) and what it does with the cotangents of those numbers is taken out: it is done for all
steps of a training at once, and what is left in the loop is vectors. In a compiled loop this is
more than tidiness: a compiler that finds beta1**t beside a vector raises to that power once per
weight, in double precision.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..inner.hyper import Tensors
from .data import seeded
from .training import State, Training

aten = torch.ops.aten
Graph = fx.GraphModule
_LOW = (torch.bfloat16, torch.float16)


class CannotTrace(Exception):
    """Why a step is not a function of tensors alone."""


@dataclass(frozen=True)
class Form:
    """How the tensors of a step lie in the flat lists that graphs take and return.

    moved: of the state, those that can carry an adjoint: the weights, slots and buffers that steps
    replace, as ("p", ""), ("slots", name), ("buffers", name). counted: replaced, but no numbers to
    differentiate. still: never replaced. single, several: hypers of one number and of more.
    learned: the hypers to differentiate in.
    """

    moved: tuple[tuple[str, str], ...]
    counted: tuple[str, ...]
    still: tuple[str, ...]
    single: tuple[str, ...]
    several: tuple[str, ...]
    learned: tuple[str, ...]
    batch: TreeSpec
    shapes: tuple[tuple[torch.Size, torch.dtype], ...]

    @staticmethod
    def of(
        training: Training, state: State, values: Tensors, learned: Sequence[str], i: int, seed: int
    ) -> Form:
        after = training.step(state, values, i, seed)
        changed = [n for n, b in state.buffers.items() if after.buffers[n] is not b]
        floats = [n for n in changed if state.buffers[n].is_floating_point()]
        leaves, batch = tree_flatten(training.problem.batch(i, seed))
        odd = [x for x in leaves if not isinstance(x, Tensor)]
        if odd:
            raise CannotTrace(f"a batch of it holds {type(odd[0]).__name__}, not tensors alone")
        return Form(
            moved=(
                ("p", ""),
                *(("slots", n) for n, x in state.slots.items()),
                *(("buffers", n) for n in floats),
            ),
            counted=tuple(n for n in changed if n not in floats),
            still=tuple(n for n in state.buffers if n not in changed),
            single=tuple(n for n, v in values.items() if v.ndim == 0),
            several=tuple(n for n, v in values.items() if v.ndim),
            learned=tuple(learned),
            batch=batch,
            shapes=tuple((x.shape, x.dtype) for x in leaves),
        )

    def moving(self, state: State) -> list[Tensor]:
        return [state.p if part == "p" else getattr(state, part)[n] for part, n in self.moved]

    def rest(self, state: State) -> list[Tensor]:
        return [state.buffers[n] for n in (*self.counted, *self.still)]

    def state(self, moving: Sequence[Tensor], counted: Sequence[Tensor], before: State) -> State:
        """The state of these tensors; what never moves is that of `before`, the same objects."""
        named = dict(zip(self.moved, moving, strict=True))
        new = dict(zip(self.counted, counted, strict=True))
        new |= {name: x for (part, name), x in named.items() if part == "buffers"}
        slots = {name: named["slots", name] for name in before.slots}
        return State(named["p", ""], slots, {n: new.get(n, b) for n, b in before.buffers.items()})

    def leaves(self, batch: Any) -> list[Tensor]:
        """The tensors of a batch; ValueError if they are not of the shapes that were traced."""
        leaves, spec = tree_flatten(batch)
        found = tuple((x.shape, x.dtype) for x in leaves)
        if spec != self.batch or found != self.shapes:
            raise ValueError(
                f"a batch has shapes {[tuple(s) for s, _ in found]} where the compiled step takes "
                f"{[tuple(s) for s, _ in self.shapes]}; make them equal or give compile=False"
            )
        return leaves


@dataclass(frozen=True)
class StepGraph:
    """A traced step in three parts.

    before(*single, t) -> numbers that steps need, each of one step. joint(*moving, *rest,
    *several, rows of numbers, *batch, *adjoint) -> (*moving after, *counted after, *adjoint
    before, *cotangents of several, one vector: the norm of the weights' adjoint and cotangents of
    numbers). rows: type and length of each row. behind(*single, t, cotangents of numbers) ->
    cotangents of the single hypers learned. random: whether it draws.
    """

    form: Form
    before: Graph
    joint: Graph
    behind: Graph
    rows: tuple[tuple[torch.dtype, int], ...]
    random: bool
    examples: tuple[Tensor, ...]

    @property
    def low(self) -> bool:
        """Whether it computes in less than float32 anywhere."""
        values = (n.meta.get("val") for n in self.joint.graph.nodes)
        return any(isinstance(x, Tensor) and x.dtype in _LOW for x in values)

    @property
    def numbers_back(self) -> int:
        """The length of joint's last output."""
        return _ends(self.joint)[1][-1].meta["val"].numel()  # type: ignore[no-any-return]

    def rows_over(self, numbers: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """The rows of numbers for every step, from the numbers given at every step."""
        with torch.no_grad():
            made = _over_time(self.before, numbers)
        rows, at = [], 0
        for dtype, count in self.rows:
            rows.append(torch.stack([x.to(dtype) for x in made[at : at + count]], 1).to(device))
            at += count
        return rows

    def numbers_behind(self, numbers: Sequence[Tensor], back: Tensor) -> Tensors:
        """Cotangents of the single hypers for every step, from those of their numbers."""
        names = [n for n in self.form.learned if n in self.form.single]
        if not names:
            return {}
        with torch.no_grad():
            return dict(zip(names, _over_time(self.behind, [*numbers, back]), strict=True))

    @property
    def _after(self) -> int:
        return len(self.form.moved) + len(self.form.counted)

    @property
    def _primals(self) -> int:
        return len(self.examples) - len(self.form.moved)

    def advance(self) -> Graph:
        """The step alone: (*moving, *rest, *several, *rows, *batch) -> (*moving, *counted)."""
        inputs, outputs = _ends(self.joint)
        return _extract(self.joint, inputs[: self._primals], outputs[: self._after])

    def pull(self) -> Graph:
        """The pullback, the step done again inside: joint without the state after."""
        inputs, outputs = _ends(self.joint)
        return _extract(self.joint, inputs, outputs[self._after :])

    def halves(self) -> tuple[Graph, Graph, int]:
        """(record, rewind, bytes): record is advance with what rewind needs behind its outputs;
        rewind(*that, *adjoint) is the pullback. bytes: what a step keeps for its way back.
        """
        copy = fx.Graph()
        copy.output(copy.graph_copy(self.joint.graph, {}))
        joint = fx.GraphModule(self.joint, copy)
        inputs, _ = _ends(joint)
        for k, n in enumerate(inputs):
            named = f"primals_{k + 1}" if k < self._primals else f"tangents_{k - self._primals + 1}"
            n.target = named
            n._rename(named)
        joint.recompile()
        record, rewind = min_cut_rematerialization_partition(
            joint, None, num_fwd_outputs=self._after, static_lifetime_input_indices=[]
        )
        saved = _ends(record)[1][self._after :]
        names = [n.name for n in saved]
        takes = [n.name for n in _ends(rewind)[0]]
        if takes != [*names, *(n.name for n in inputs[self._primals :])]:
            raise CannotTrace("its graph cannot be parted into a way there and a way back")
        size = sum(n.meta["val"].nbytes for n in saved if isinstance(n.meta.get("val"), Tensor))
        return record, rewind, size


def trace(
    training: Training, state: State, values: Tensors, learned: Sequence[str], seed: int
) -> StepGraph:
    """The graph of a training's step and pullback; CannotTrace if it is more than tensors."""
    form = Form.of(training, state, values, learned, 0, seed)
    whole = _whole(training, form, state, values, 0, seed)
    again = _whole(training, form, state, values, 1, seed + 1)
    if _listing(whole) != _listing(again):
        raise CannotTrace(
            "two steps of it do different things: its loss depends on the step, on values of "
            "tensors or on draws that are not torch's"
        )
    return _divide(form, whole, _examples(training, form, state, values, 0, seed))


def _examples(
    training: Training, form: Form, state: State, values: Tensors, i: int, seed: int
) -> list[Tensor]:
    moving = form.moving(state)
    return [
        *moving,
        *form.rest(state),
        *(values[n] for n in form.several),
        *(values[n] for n in form.single),
        torch.tensor(float(i + 1), dtype=torch.float64),
        *form.leaves(training.problem.batch(i, seed)),
        *(torch.ones_like(x) for x in moving),
    ]


def _over_time(graph: Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
    """A graph of numbers at all steps, the first dimension of every input."""
    made = torch.vmap(lambda *each: tuple(graph(*each)))(*inputs)
    return list(made)


def _ends(graph: Graph) -> tuple[list[fx.Node], list[fx.Node]]:
    """Inputs and outputs of a graph."""
    (output,) = (n for n in graph.graph.nodes if n.op == "output")
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    return inputs, list(output.args[0])


def _whole(
    training: Training, form: Form, state: State, values: Tensors, i: int, seed: int
) -> Graph:
    """Step i, undivided and without mutations."""
    examples = _examples(training, form, state, values, i, seed)

    def joint(*flat: Tensor) -> list[Tensor]:
        take = iter(flat)
        moving = [next(take).detach().requires_grad_() for _ in form.moved]
        counted = [next(take) for _ in form.counted]
        still = [next(take) for _ in form.still]
        inside = {n: next(take) for n in (*form.several, *form.single)}
        inside |= {n: inside[n].detach().requires_grad_() for n in form.learned}
        t = next(take)
        batch = tree_unflatten([next(take) for _ in form.shapes], form.batch)
        bars = list(take)
        around = state._replace(buffers=state.buffers | dict(zip(form.still, still, strict=True)))
        start = form.state(moving, counted, around)
        after = training.step_on(start, inside, t, batch)
        moved = form.moving(after)
        live = [(x, bar) for x, bar in zip(moved, bars, strict=True) if x.requires_grad]
        grads = torch.autograd.grad(
            [x for x, _ in live],
            [*moving, *(inside[n] for n in form.learned)],
            [bar for _, bar in live],
            allow_unused=True,
            materialize_grads=True,
        )
        return [
            *(x.detach() for x in moved),
            *(after.buffers[n].detach() for n in form.counted),
            *grads,
        ]

    # Seeded apart, so that a step which draws from Python or numpy is found out by its twin.
    numbers = random.getstate(), np.random.get_state()
    random.seed(i)
    np.random.seed(i)
    try:
        with seeded(i, state.p.device):
            traced = _retrace(joint, examples)
            return _retrace(torch.func.functionalize(traced, remove="mutations"), examples)
    except Exception as error:  # Whatever a model does that fake tensors cannot.
        raise CannotTrace(_first_line(error)) from error
    finally:
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])


def _retrace(function: Callable[..., Any], examples: Sequence[Tensor]) -> Graph:
    made = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)
    made.graph.eliminate_dead_code()
    return made


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def _listing(graph: Graph) -> list[str]:
    return [f"{n.op} {n.target} {n.args} {n.kwargs}" for n in graph.graph.nodes]


def _divide(form: Form, whole: Graph, examples: list[Tensor]) -> StepGraph:
    inputs, outputs = _ends(whole)
    fixed = len(form.moved) + len(form.counted) + len(form.still) + len(form.several)
    numbers = inputs[fixed : fixed + len(form.single) + 1]
    vectors = [n for n in inputs if n not in numbers]
    kept = len(form.moved) + len(form.counted)
    states, bars = outputs[:kept], outputs[kept : kept + len(form.moved)]
    grads = dict(zip(form.learned, outputs[kept + len(form.moved) :], strict=True))
    large = [grads[n] for n in form.learned if n in form.several]
    small = [grads[n] for n in form.learned if n in form.single]

    early = _numbers_alone(whole, numbers)
    late = _late(whole, {*states, *bars, *large}, small, early)
    body = [n for n in whole.graph.nodes if n.op == "call_function" and n not in early | late]
    read = {x for n in body for x in n.all_input_nodes} | {*states, *bars, *large}
    needed = [n for n in whole.graph.nodes if n in early and n in read]
    read_late = {x for n in late for x in n.all_input_nodes} | set(small)
    ending = [n for n in whole.graph.nodes if n in read_late and n not in early | late]

    by_type: dict[torch.dtype, list[fx.Node]] = {}
    for n in needed:
        by_type.setdefault(_type_in(n, body), []).append(n)
    groups = list(by_type.values())
    before = _extract(whole, numbers, [n for group in groups for n in group], draws=False)
    behind = _extract(whole, [*numbers, ending], small, draws=False)
    joint = _extract(
        whole,
        [*vectors[:fixed], *groups, *vectors[fixed:]],
        [*states, *bars, *large, [_Norm(bars[0]), *ending]],
    )
    made = dict(zip(inputs, examples, strict=True))
    with torch.no_grad():
        values = before(*(made[n] for n in numbers))
        rows, at = [], 0
        for dtype, group in by_type.items():
            rows.append(torch.stack([v.to(dtype) for v in values[at : at + len(group)]]))
            at += len(group)
        rows = [row.to(examples[0].device) for row in rows]
        flat = [*(made[n] for n in vectors[:fixed]), *rows, *(made[n] for n in vectors[fixed:])]
        joint = _retrace(joint, flat)
    lengths = tuple((dtype, len(group)) for dtype, group in by_type.items())
    return StepGraph(form, before, joint, behind, lengths, _draws(joint), tuple(flat))


def _numbers_alone(whole: Graph, numbers: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that are one number and depend on such inputs only."""
    alone = set(numbers)
    for n in whole.graph.nodes:
        if n.op != "call_function" or not _is_number(n) or _is_random(n):
            continue
        if n.all_input_nodes and all(x in alone for x in n.all_input_nodes):
            alone.add(n)
    return alone


def _late(
    whole: Graph, used: set[fx.Node], small: list[fx.Node], early: set[fx.Node]
) -> set[fx.Node]:
    """Nodes on the way from cotangents of numbers to those of hypers, numbers throughout."""
    late: set[fx.Node] = set()
    for n in reversed(list(whole.graph.nodes)):
        if n.op != "call_function" or n in used or n in early or not _is_number(n):
            continue
        wanted = n in small or bool(n.users)
        ends = all(user in late or user.op == "output" for user in n.users)
        if wanted and ends and all(map(_is_number, n.all_input_nodes)) and not _is_random(n):
            late.add(n)
    return late


def _is_number(n: fx.Node) -> bool:
    value = n.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == 0


def _is_random(n: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())


def _draws(graph: Graph) -> bool:
    return any(_is_random(n) for n in graph.graph.nodes)


def _type_in(number: fx.Node, body: list[fx.Node]) -> torch.dtype:
    """The type that a number takes beside the vectors it meets, float64 if it meets none."""
    users = [n for n in body if n in number.users]
    types = {n.meta["val"].dtype for n in users if isinstance(n.meta.get("val"), Tensor)}
    vectors = all(isinstance(n.meta.get("val"), Tensor) and n.meta["val"].ndim for n in users)
    dtype: torch.dtype = number.meta["val"].dtype
    if (
        dtype == torch.float64
        and vectors
        and len(types) == 1
        and (own := types.pop()).is_floating_point
    ):
        return own  # type: ignore[no-any-return]  # node.meta is untyped
    return dtype


@dataclass(frozen=True)
class _Norm:
    """Stands in an output for the norm of a node."""

    of: fx.Node


def _extract(
    whole: Graph,
    inputs: Sequence[fx.Node | list[fx.Node]],
    outputs: Sequence[fx.Node | list[fx.Node | _Norm]],
    *,
    draws: bool = True,
) -> Graph:
    """The part of a graph from inputs to outputs; a list of numbers is one vector of them.

    draws: every random draw stays, or those after it would come from another place of the stream.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for k, source in enumerate(inputs):
        placeholder = graph.placeholder(f"input_{k}")
        if isinstance(source, fx.Node):
            env[source] = placeholder
        else:
            for j, n in enumerate(source):
                env[n] = graph.call_function(aten.select.int, (placeholder, 0, j))
    flat = [x for out in outputs for x in (out if isinstance(out, list) else [out])]
    wanted = {x.of if isinstance(x, _Norm) else x for x in flat}
    needed: set[fx.Node] = set()
    for n in reversed(list(whole.graph.nodes)):
        if n in env or n.op in ("placeholder", "output"):
            continue
        if n in wanted or n in needed or (draws and _is_random(n)):
            needed.add(n)
            needed.update(n.all_input_nodes)
    for n in whole.graph.nodes:
        if n in needed and n not in env and n.op != "placeholder":
            env[n] = graph.node_copy(n, lambda x: env[x])

    def one(x: fx.Node | _Norm) -> fx.Node:
        if isinstance(x, _Norm):
            return graph.call_function(aten.linalg_vector_norm.default, (env[x.of],))
        return env[x]

    def double(x: fx.Node | _Norm) -> fx.Node:
        return graph.call_function(aten._to_copy.default, (one(x),), {"dtype": torch.float64})

    results = []
    for out in outputs:
        if isinstance(out, list):
            results.append(graph.call_function(aten.stack.default, ([double(x) for x in out],)))
        else:
            results.append(one(out))
    graph.output(tuple(results))
    return fx.GraphModule(whole, graph)
