"""A rule over elements as a list of kernels that write where they may.

A rule is mathematics: out of place, with numbers as tensors. Done as it is written, a step makes
a tensor per operation and computes its bias corrections once per block. A plan is the same
operations, traced once: those on numbers are done once a step, and the others on Python numbers
into a few buffers, or into the weights and slots themselves. Nothing is rearranged, so the bits are
the rule's; a term with the factor 0 is left out. Fused, a product and the sum it enters are one
kernel, as in torch.optim, which rounds once where the rule rounds twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from .hyper import Tensors
from .kernels import Trace
from .rule import Rule
from .written import Buffers, Code, written

# Elements at a time: what a step makes on its way stays in a cache, but not in the fastest, whose
# gain is less than the microseconds of so many more calls.
BLOCK = 2**18


@dataclass
class Plan:
    """The traced step of a rule for weights of a dtype on a device.

    before(t, *hypers, *shared slots, loss) -> (*shared slots after the step, *numbers for kernels).
    after: what is done with the vectors, "p" and "g" and the slots with an entry per element.
    """

    rule: Rule
    shared: tuple[str, ...]
    before: fx.GraphModule
    after: Trace
    _codes: dict[tuple[object, ...], tuple[Code, dict[torch.dtype, int]]] = field(
        default_factory=dict
    )

    def numbers(
        self, t: Tensor, loss: Tensor | None, values: Tensors, shared: Tensors
    ) -> tuple[list[Tensor], Tensors]:
        """(what the kernels of a step take of numbers, the shared slots after it)."""
        given = [t, *(values[n] for n in self.rule.hypers), *(shared[n] for n in self.shared)]
        if "loss" in self.rule.needs:
            assert loss is not None
            given.append(loss)
        made = list(self.before(*given))
        count = len(self.shared)
        return made[count:], dict(zip(self.shared, made[:count], strict=True))

    def code(self, numbers: Sequence[Any], *, fused: bool) -> tuple[Code, dict[torch.dtype, int]]:
        """(the kernels for numbers of which some are 0 or 1, how many buffers of each dtype)."""
        kinds = tuple(float(x) if x in (0, 1) else None for x in numbers)
        key = (fused, *kinds)
        if key not in self._codes:
            self._codes[key] = written(self.after, kinds, fused=fused)
        return self._codes[key]


class Running:
    """A plan at one step: its numbers, and buffers for blocks. shared: slots after the step."""

    def __init__(
        self,
        plan: Plan,
        t: Tensor,
        loss: Tensor | None,
        values: Tensors,
        shared: Tensors,
        *,
        fused: bool = False,
    ) -> None:
        self.slots = [*plan.after.inputs][2:]
        self._tensors, self.shared = plan.numbers(t, loss, values, shared)
        self._numbers = [x.item() for x in self._tensors]
        self._code, self._needs = plan.code(self._numbers, fused=fused)
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        self._size = 0

    def step(self, vectors: Sequence[Tensor]) -> None:
        """Change the first of the plan's vectors, the weights, and the slots among them, all of
        one length, where they are.
        """
        size, device = vectors[0].numel(), vectors[0].device
        block = BLOCK if device.type == "cpu" else size
        tensors = [x.to(device) for x in self._tensors]
        blocks = (
            [vectors] if size <= block else zip(*(x.split(block) for x in vectors), strict=True)
        )
        for each in blocks:
            self._code(each, self._numbers, tensors, self._room(each[0].numel(), device))

    def _room(self, size: int, device: torch.device) -> Buffers:
        """Buffers of so many elements."""
        if size > self._size:
            self._size = size
            self._buffers = {
                dtype: [torch.empty(size, dtype=dtype, device=device) for _ in range(count)]
                for dtype, count in self._needs.items()
            }
        if size == self._size:
            return self._buffers
        return {dtype: [x[:size] for x in each] for dtype, each in self._buffers.items()}


@lru_cache(maxsize=64)
def plan_of(rule: Rule, dtype: torch.dtype, device: torch.device) -> Plan | None:
    """The plan of a rule over elements for weights of a dtype on a device."""
    return make_plan(rule, torch.empty(0, dtype=dtype, device=device), rule.values())


def make_plan(rule: Rule, p: Tensor, values: Tensors) -> Plan | None:
    """The plan of a rule over elements for weights like p; None if it is more than elementwise
    operations on them.
    """
    like = torch.zeros(3, dtype=p.dtype, device=p.device)
    slots = rule.init(like, values)
    # A slot that belongs to another option has no entry.
    vectors = [n for n, x in slots.items() if not rule.slots[n].shared and x.numel()]
    shared = [n for n in slots if rule.slots[n].shared]
    if any(slots[n].shape != like.shape for n in vectors):
        return None
    numbers = [torch.ones((), dtype=torch.float64) for _ in range(1 + len(rule.hypers))]
    numbers += [slots[n] for n in shared]
    loss = [like.new_ones(())] if "loss" in rule.needs else []
    count = len(numbers) + len(loss)

    def step(*flat: Tensor) -> list[Tensor]:
        t, *rest = flat[:count]
        own = dict(zip(rule.hypers, rest, strict=False))
        before = slots | dict(zip(shared, rest[len(own) :], strict=False))
        p, g, *each = flat[count:]
        before |= dict(zip(vectors, each, strict=True))
        p, after = rule(p, g, before, t, own, loss=rest[-1] if loss else None)
        return [*(after[n] for n in shared), p, *(after[n] for n in vectors)]

    with torch.no_grad():
        # No tensor twice: the trace would take them for one.
        flat = [x.clone() for x in (*numbers, *loss, like, like, *(slots[n] for n in vectors))]
        traced = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*flat)
    return _divided(rule, traced, count, ("p", "g", *vectors), tuple(shared))


def _divided(
    rule: Rule,
    traced: fx.GraphModule,
    count: int,
    vectors: tuple[str, ...],
    shared: tuple[str, ...],
) -> Plan | None:
    graph = traced.graph
    graph.eliminate_dead_code()
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    (output,) = (n for n in graph.nodes if n.op == "output")
    after: list[fx.Node] = list(output.args[0])
    early = set(inputs[:count])
    for n in graph.nodes:
        if n.op == "get_attr":
            if getattr(traced, n.target).ndim:
                return None  # As many numbers as were traced.
            early.add(n)
        elif n.op == "call_function":
            number = n.meta["val"].ndim == 0
            if number != all(x in early for x in n.all_input_nodes):
                return None  # A number made of vectors, or a vector of numbers.
            if not number and not _elementwise(n):
                return None
            if number:
                early.add(n)
    ends = after[len(shared) :]
    if any(n in early for n in ends):
        return None
    late = [n for n in graph.nodes if n.op == "call_function" and n not in early]
    read = {x for n in late for x in n.all_input_nodes}
    wanted = [n for n in graph.nodes if n in early and n in read]
    before = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for n in graph.nodes:
        if n in early:
            env[n] = before.node_copy(n, lambda x: env[x])
    before.output(tuple(env[n] for n in (*after[: len(shared)], *wanted)))
    before.eliminate_dead_code()
    return Plan(
        rule=rule,
        shared=shared,
        before=fx.GraphModule(traced, before),
        after=Trace(
            graph,
            inputs=dict(zip(vectors, inputs[count:], strict=True)),
            outputs=dict(zip(("p", *vectors[2:]), ends, strict=True)),
            places={n: i for i, n in enumerate(wanted)},
        ),
    )


def _elementwise(n: fx.Node) -> bool:
    """Whether a kernel makes new memory, and takes no shape, which would be the traced one."""
    makes = all(made.alias_info is None for made in n.target._schema.returns)  # type: ignore[union-attr]  # an operator
    return makes and not any(isinstance(a, list | tuple) for a in (*n.args, *n.kwargs.values()))


__all__ = ["Plan", "Running", "make_plan", "plan_of"]
