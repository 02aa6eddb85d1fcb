"""A rule as a few passes over its vectors, each a list of kernels that write where they may.

A rule is mathematics: out of place, with numbers as tensors. Done as it is written, a step makes
a tensor per operation and computes its bias corrections once per block. A plan is the same
operations, traced once: those on numbers are done once a step, and the others on Python numbers
into a few buffers, or into the weights and slots themselves. Nothing is rearranged, so the bits are
the rule's; a term with the factor 0 is left out. Fused, a product and the sum it enters are one
kernel, as in torch.optim, which rounds once where the rule rounds twice.

A rule over elements is one pass. One over tensors or the model may sum over all elements: what
follows from a sum is known only after a pass that reads, and what was made on the way is made
again. Such sums are made block by block, and round in another order than the rule's.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ..core.hyper import Tensors
from ..core.layout import Layout
from ..core.rule import Rule
from ..numerics.elementwise import at_least_float32
from .codegen import Code, written
from .simplify import Trace, aten


@dataclass
class Stage:
    """What is known of a step at one time, and the pass over the vectors that it allows.

    numbers(t, *hypers, *shared slots, *loss, *sums of the passes before) -> (*those shared slots
    after the step that are known now, *numbers for the kernels).
    trace: of the pass, over "p" and "g" and the slots with an entry per element.
    given: which of the numbers for the kernels do not come from sums.
    """

    numbers: fx.GraphModule
    shared: tuple[str, ...]
    trace: Trace
    given: Sequence[bool]
    _codes: dict[tuple[object, ...], Code] = field(default_factory=dict)

    def code(self, numbers: Sequence[Any], *, fused: bool, gathered: bool = False) -> Code:
        """The kernels for numbers of which some are 0 or 1, so that terms are left out; not if it
        is by what was summed, since 0 times infinity has to be seen.
        """
        pairs = zip(numbers, self.given, strict=True)
        kinds = tuple(float(x) if given and x in (0, 1) else None for x, given in pairs)
        key = (fused, gathered, *kinds)
        if key not in self._codes:
            self._codes[key] = written(self.trace, kinds, fused=fused, gathered=gathered)
        return self._codes[key]


@dataclass(frozen=True)
class Plan:
    """The traced step of a rule for weights of a dtype on a device. slots: those with an entry per
    element, which every pass takes after the weights and gradients. shared: the others.
    """

    rule: Rule
    slots: tuple[str, ...]
    shared: tuple[str, ...]
    stages: tuple[Stage, ...]


# Operations that are elementwise but not said to be by torch.
_ELEMENTWISE = {
    aten._to_copy.default,
    aten.clone.default,
    aten.full_like.default,
    aten.ones_like.default,
    aten.zeros_like.default,
}


def _mean(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    total = x.sum(dtype=dtype or at_least_float32(x.dtype))
    return (total / x.numel()).to(dtype or x.dtype)


# Of a vector in blocks, sums can be put together, and means cannot.
_MEANS = {aten.mean.default: _mean}


@dataclass(frozen=True)
class Of:
    """What a plan is for. kind: `Rule.kind` of the layout, all that matters of names."""

    rule: Rule
    dtype: torch.dtype
    device: torch.device
    shapes: tuple[torch.Size, ...]
    kind: Hashable
    layout: Layout = field(compare=False)


def plan_of(
    rule: Rule, dtype: torch.dtype, device: torch.device, layout: Layout | None = None
) -> Plan | None:
    """The plan of a rule for weights of a dtype on a device; None if it is more than elementwise
    operations and, unless it is over elements, sums.

    layout: of the tensor or the model, which a rule over elements does not see.
    """
    layout = layout or Layout.alone(torch.Size([3]))
    return _plan_of(Of(rule, dtype, device, layout.shapes, rule.kind(layout), layout))


@lru_cache(maxsize=512)
def _plan_of(of: Of) -> Plan | None:
    try:
        if of.rule.over == "model" and not _begins_by_element(of.rule):
            return None
        with FakeTensorMode(allow_non_fake_inputs=True):
            traced, slots = _traced(of)
    except Exception:
        # A branch on a value, say. If a rule is wrong, a step of it as it is written will tell.
        return None
    return _plan(of.rule, traced, slots)


def _begins_by_element(rule: Rule) -> bool:
    """Whether slots with an entry per element begin in parts as in the whole."""
    p, layout = torch.arange(3.0), Layout(("", ""), (torch.Size([2]), torch.Size([1])))
    whole = rule.init(p, rule.values(), layout)
    parts = [rule.init(x, rule.values()) for x in p.split(layout.sizes)]
    return all(
        torch.equal(whole[n], torch.cat([own[n] for own in parts])) for n in _kinds(rule, whole)[0]
    )


def _traced(of: Of) -> tuple[fx.GraphModule, Tensors]:
    """(a step, the slots before it). (t, *hypers, *shared slots, *loss, p, g, *other slots) ->
    (*shared slots, p, *other slots)
    """
    rule, layout, values = of.rule, of.layout, of.rule.values()
    shape = torch.Size([sum(layout.sizes)]) if rule.over == "model" else layout.shapes[0]
    like = torch.empty(shape, dtype=of.dtype, device=of.device)
    slots = rule.init(like, values, layout)
    vectors, shared = _kinds(rule, slots)
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
        p, after = rule(p, g, before, t, own, loss=rest[-1] if loss else None, layout=layout)
        return [*(after[n] for n in shared), p, *(after[n] for n in vectors)]

    with torch.no_grad():
        # No tensor twice: the trace would take them for one.
        flat = [x.clone() for x in (*numbers, *loss, like, like, *(slots[n] for n in vectors))]
        traced = make_fx(step, _MEANS, tracing_mode="fake", _allow_non_fake_inputs=True)(*flat)
    traced.graph.eliminate_dead_code()
    return traced, slots


def _kinds(rule: Rule, slots: Tensors) -> tuple[list[str], list[str]]:
    """(the slots with an entry per element, those of one number for all)."""
    whole = rule.over != "element"
    shared = [n for n, x in slots.items() if rule.slots[n].shared or (whole and not x.ndim)]
    # A slot that belongs to another option has no entry.
    return [n for n, x in slots.items() if n not in shared and x.numel()], shared


def _plan(rule: Rule, traced: fx.GraphModule, slots: Tensors) -> Plan | None:
    """A traced step in stages."""
    vectors, shared = _kinds(rule, slots)
    *nodes, output = traced.graph.nodes
    at = _times(traced, nodes, sums=rule.over != "element")
    if at is None:
        return None
    placeholders = [n for n in nodes if n.op == "placeholder"]
    numbers, held = placeholders[: -2 - len(vectors)], placeholders[-2 - len(vectors) :]
    inputs = dict(zip(("p", "g", *vectors), held, strict=True))
    known = dict(zip(shared, output.args[0], strict=False))
    ends = dict(zip(("p", *vectors), output.args[0][len(shared) :], strict=True))
    shape, kept = _shape(inputs["p"]), {n: inputs[n].meta["val"].dtype for n in ends}
    if any(_shape(n) != shape for n in (*inputs.values(), *ends.values())):
        return None
    if any(n.meta["val"].dtype != kept[name] for name, n in ends.items()):
        return None
    last, stages = max(at[n] for n in nodes if _is_vector(n)), []
    for i in range(1 + max([last, *(at[n] for n in known.values())])):
        # Before the last pass nothing may change: weights and slots are read again.
        outputs = ends if i == last else {}
        sums = [n for n in nodes if _is_sum(n) and at[n] == i + 1]
        operations = _needed(nodes, [*outputs.values(), *sums])
        read = {x for n in operations for x in n.all_input_nodes if not _is_vector(x)}
        places = {n: k for k, n in enumerate(n for n in nodes if n in read)}
        now = {name: n for name, n in known.items() if at[n] == i}
        earlier = sorted((n for n in nodes if _is_sum(n) and at[n] <= i), key=at.__getitem__)
        made = _made(traced, nodes, [*numbers, *earlier], [*now.values(), *places])
        trace = Trace(operations, inputs, outputs, sums, places)
        stages.append(Stage(made, tuple(now), trace, [at[n] == 0 for n in places]))
    return Plan(rule, tuple(vectors), tuple(shared), tuple(stages))


def _times(
    traced: fx.GraphModule, nodes: Sequence[fx.Node], *, sums: bool
) -> dict[fx.Node, int] | None:
    """Before which pass over the vectors a number is known, in which a vector can be made; None if
    there is more than elementwise operations and sums.
    """
    at = dict[fx.Node, int]()
    for n in nodes:
        at[n] = max((at[x] for x in n.all_input_nodes), default=0)
        if n.op == "get_attr" and getattr(traced, str(n.target)).ndim:
            return None  # As many numbers as were traced.
        if n.op != "call_function":
            continue
        if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()):
            return None  # Every pass would draw its own.
        of_vectors = any(map(_is_vector, n.all_input_nodes))
        if _is_sum(n) and sums:
            at[n] += 1
        elif of_vectors != _is_vector(n) or (of_vectors and not _elementwise(n)):
            return None  # A number made of vectors, a vector of numbers, or of other elements.
    return at


def _needed(nodes: Sequence[fx.Node], ends: Sequence[fx.Node]) -> list[fx.Node]:
    """The operations on vectors that lead to these ends, in order."""
    needed = set(ends)
    for n in reversed(nodes):
        if n in needed:
            needed.update(filter(_is_vector, n.all_input_nodes))
    return [n for n in nodes if n in needed and n.op == "call_function"]


def _made(
    traced: fx.GraphModule,
    nodes: Sequence[fx.Node],
    given: Sequence[fx.Node],
    wanted: Sequence[fx.Node],
) -> fx.GraphModule:
    """given -> wanted, numbers both."""
    graph = fx.Graph()
    env = {n: graph.placeholder(n.name) for n in given}
    for n in nodes:
        if n not in env and not _is_vector(n) and all(x in env for x in n.all_input_nodes):
            env[n] = graph.node_copy(n, lambda x: env[x])
    graph.output(tuple(env[n] for n in wanted))
    graph.eliminate_dead_code()
    return fx.GraphModule(traced, graph)


def _is_vector(n: fx.Node) -> bool:
    """Whether a node is no number; lists of tensors are taken for vectors, and no kernel's."""
    return n.op != "get_attr" and getattr(n.meta["val"], "ndim", 1) > 0


def _shape(n: fx.Node) -> object:
    return getattr(n.meta.get("val"), "shape", None)


def _is_sum(n: fx.Node) -> bool:
    """Whether an operation makes a number of all elements."""
    return n.target is aten.sum.default and _is_vector(n.all_input_nodes[0])


def _elementwise(n: fx.Node) -> bool:
    """Whether a kernel makes new memory, an entry of it from those in the same place."""
    if not isinstance(n.target, torch._ops.OpOverload):
        return False
    if any(made.alias_info is not None for made in n.target._schema.returns):
        return False
    return torch.Tag.pointwise in n.target.tags or n.target in _ELEMENTWISE


__all__ = ["Plan", "Stage", "plan_of"]
