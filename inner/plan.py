"""A rule over elements as a list of kernels that write where they may.

A rule is mathematics: out of place, with numbers as tensors. Done as it is written, a step makes
a tensor per operation and computes its bias corrections once per block. A plan is the same
operations, traced once: those on numbers are done once a step, and the others on Python numbers
into a few buffers, or into the weights and slots themselves. Nothing is rearranged, so the bits are
the rule's; a term with the factor 0 is left out. Fused, a product and the sum it enters are one
kernel, as in torch.optim, which rounds once where the rule rounds twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from .hyper import Tensors
from .rule import Rule

aten = torch.ops.aten

# Elements at a time: what a step makes on its way stays in cache.
BLOCK = 2**16

# Kernels that take numbers beside tensors.
_MIXED: dict[object, Callable[..., Tensor]] = {
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
}
# Kernels that write into a given tensor.
_WRITERS: dict[object, Callable[..., Tensor]] = _MIXED | {
    aten.abs.default: torch.abs,
    aten.clamp.default: torch.clamp,
    aten.exp.default: torch.exp,
    aten.log.default: torch.log,
    aten.maximum.default: torch.maximum,
    aten.minimum.default: torch.minimum,
    aten.neg.default: torch.neg,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.reciprocal.default: torch.reciprocal,
    aten.rsqrt.default: torch.rsqrt,
    aten.sigmoid.default: torch.sigmoid,
    aten.sign.default: torch.sign,
    aten.sqrt.default: torch.sqrt,
    aten.tanh.default: torch.tanh,
    aten.where.self: torch.where,
}

Buffers = Mapping[torch.dtype, list[Tensor]]
# (vectors, numbers, the same as tensors, buffers): the kernels of a step, one after the other.
Code = Callable[[Sequence[Tensor], Sequence[Any], Sequence[Tensor], Buffers], None]


@dataclass
class Plan:
    """The traced step of a rule for weights of a dtype on a device.

    vectors: what kernels read and write, "p" and "g" and the slots with an entry per element.
    before(t, *hypers, *shared slots, loss) -> (*shared slots after the step, *numbers for kernels).
    outputs: what becomes of the vectors that change. places: of the numbers, in their list.
    """

    rule: Rule
    vectors: tuple[str, ...]
    shared: tuple[str, ...]
    before: fx.GraphModule
    graph: fx.Graph
    outputs: dict[str, fx.Node]
    places: dict[fx.Node, int]
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
            try:
                self._codes[key] = _Writer(self, kinds, fused).code()
            except _Vanished:
                self._codes[key] = _Writer(self, None, fused).code()
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
        self.slots = plan.vectors[2:]
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
        vectors=vectors,
        shared=shared,
        before=fx.GraphModule(traced, before),
        graph=graph,
        outputs=dict(zip(("p", *vectors[2:]), ends, strict=True)),
        places={n: i for i, n in enumerate(wanted)},
    )


# From here on an operand is a node of the graph, a _Number, _ZERO or a plain Python value.


@dataclass(frozen=True)
class _Number:
    """One of a step's numbers. tensor: for a kernel that takes no other. minus: its negative."""

    place: int
    tensor: bool = False
    minus: bool = False


class _Zero:
    """A term that vanished."""


_ZERO = _Zero()


class _Vanished(Exception):
    """A kernel needs a term that vanished."""


@dataclass
class _Step:
    """A kernel on operands, and the node it stands for."""

    node: fx.Node
    kernel: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    writes: bool

    @property
    def reads(self) -> list[fx.Node]:
        given = (*self.args, *self.kwargs.values())
        return list(dict.fromkeys(a for a in given if isinstance(a, fx.Node)))


class _Writer:
    """Writes the kernels of a plan as Python code, for numbers of which some are 0 or 1. kinds:
    which; None for all kernels as they were traced.
    """

    def __init__(self, plan: Plan, kinds: tuple[float | None, ...] | None, fused: bool) -> None:
        self._plan, self._kinds, self._fused = plan, kinds, fused
        inputs = [n for n in plan.graph.nodes if n.op == "placeholder"]
        inputs = inputs[-len(plan.vectors) :]
        self._inputs = dict(zip(plan.vectors, inputs, strict=True))
        # Where every node's value is.
        self._names = {n: f"x[{i}]" for i, n in enumerate(inputs)}
        self._free: dict[torch.dtype, list[str]] = {}
        self._taken: dict[fx.Node, str] = {}
        self._made: dict[torch.dtype, int] = {}
        self._scope: dict[str, Any] = {"torch": torch}

    def code(self) -> tuple[Code, dict[torch.dtype, int]]:
        steps, found = self._simplified()
        if self._fused:
            steps = _fused(steps, {n for n in found.values() if isinstance(n, fx.Node)})
        last = {n: i for i, step in enumerate(steps) for n in step.reads}
        last |= {n: len(steps) for n in found.values() if isinstance(n, fx.Node)}
        homes = {n: self._inputs[name] for name, n in found.items() if isinstance(n, fx.Node)}
        lines: list[str] = []
        for i, step in enumerate(steps):
            given = [*map(self._spelled, step.args)]
            given += [f"{name}={self._spelled(x)}" for name, x in step.kwargs.items()]
            # What is read here for the last time gives its place back, to this very step even.
            for n in step.reads:
                if last[n] == i and n in self._taken:
                    self._free.setdefault(_dtype(n), []).append(self._taken.pop(n))
            if step.writes:
                home = homes.get(step.node)
                vacant = home is not None and last.get(home, -1) <= i
                if home is not None and vacant and _dtype(home) == _dtype(step.node):
                    place = self._names[home]
                else:
                    place = self._taken[step.node] = self._buffer(_dtype(step.node))
                lines.append(f"k{i}({', '.join([*given, f'out={place}'])})")
            else:
                place = f"b{i}"
                lines.append(f"{place} = k{i}({', '.join(given)})")
            self._names[step.node] = place
        lines += self._moves(found)
        source = "\n    ".join(["def run(x, n, m, o):", *(lines or ["pass"])])
        self._scope |= {f"k{i}": step.kernel for i, step in enumerate(steps)}
        exec(source, self._scope)
        return self._scope["run"], self._made

    def _buffer(self, dtype: torch.dtype) -> str:
        if self._free.get(dtype):
            return self._free[dtype].pop()
        count = self._made[dtype] = self._made.get(dtype, 0) + 1
        return f"o[{dtype}][{count - 1}]"

    def _spelled(self, operand: Any) -> str:
        if isinstance(operand, fx.Node):
            return self._names[operand]
        if isinstance(operand, _Number):
            sign = "-" if operand.minus else ""
            return f"{sign}{'m' if operand.tensor else 'n'}[{operand.place}]"
        name = f"a{len(self._scope)}"
        self._scope[name] = operand
        return name

    def _moves(self, found: Mapping[str, Any]) -> Iterator[str]:
        """What brings values that are elsewhere to where they belong."""
        homes = {name: self._names[self._inputs[name]] for name in found}
        away = {
            name: self._names[n]
            for name, n in found.items()
            if isinstance(n, fx.Node) and self._names[n] != homes[name]
        }
        # A slot may become what another was: such are read before any is written.
        written = {homes[name] for name in away}
        for i, value in enumerate(away.values()):
            yield f"c{i} = {value}{'.clone()' if value in written else ''}"
        yield from (f"{homes[n]}.zero_()" for n, x in found.items() if isinstance(x, _Zero))
        yield from (f"{homes[name]}.copy_(c{i})" for i, name in enumerate(away))

    def _simplified(self) -> tuple[list[_Step], dict[str, Any]]:
        """The kernels, without factors of 1 and terms of 0, and what the vectors become."""
        plan, value = self._plan, dict[fx.Node, Any]()
        steps: list[_Step] = []

        def of(a: Any) -> Any:
            if not isinstance(a, fx.Node):
                return a
            if a in plan.places:
                kind = self._kinds[plan.places[a]] if self._kinds else None
                return _Number(plan.places[a]) if kind is None else kind
            return value.get(a, a)

        def exact(a: Any) -> Any:
            """A number as it is: a Python number would take the dtype of what is beside it."""
            number = isinstance(a, fx.Node) and a in plan.places
            return _Number(plan.places[a], tensor=True) if number else of(a)

        for n in plan.graph.nodes:
            if n.op != "call_function" or n.meta["val"].ndim == 0:
                continue
            args = tuple(map(of, n.args))
            same = _same(n.target, args) if self._kinds and not n.kwargs else None
            if isinstance(same, fx.Node) and _dtype(same) != _dtype(n):
                same = None
            if isinstance(same, fx.Node | _Zero):
                value[n] = same
            elif same is not None:
                raise _Vanished  # A vector became a number.
            elif (inside := _of_root(n)) is not None:
                steps.append(_Step(n, torch.sqrt, (of(inside),), {}, True))
            else:
                beside = [a for a in n.args if isinstance(a, fx.Node) and a not in plan.places]
                if n.target not in _MIXED or not all(_dtype(a).is_floating_point for a in beside):
                    args = tuple(map(exact, n.args))
                if any(isinstance(a, _Zero) for a in args):
                    raise _Vanished
                kernel = _WRITERS.get(n.target, n.target)
                steps.append(_Step(n, kernel, args, dict(n.kwargs), n.target in _WRITERS))
        found = {name: of(n) for name, n in plan.outputs.items()}
        used = {n for n in found.values() if isinstance(n, fx.Node)}
        kept = []
        for step in reversed(steps):
            if step.node in used:
                kept.append(step)
                used.update(step.reads)
        return kept[::-1], found


def _fused(steps: list[_Step], ends: set[fx.Node]) -> list[_Step]:
    """Sums that do a product or a quotient of theirs themselves, where nobody else reads it."""
    readers: dict[fx.Node, int] = {}
    for step in steps:
        for n in step.reads:
            # Twice by one step is not once.
            readers[n] = readers.get(n, 0) + sum(a is n for a in step.args)
    made = {step.node: step for step in steps}
    gone: set[fx.Node] = set()

    def once(a: Any, *kernels: Callable[..., Tensor]) -> _Step | None:
        """The step that makes an operand for one reader alone."""
        step = made.get(a) if isinstance(a, fx.Node) else None
        mine = step and step.kernel in kernels and not step.kwargs
        return step if mine and readers[a] == 1 and a not in ends else None

    for step in steps:
        if step.kernel not in (torch.add, torch.sub) or step.kwargs:
            continue
        orders = [step.args, step.args[::-1]] if step.kernel is torch.add else [step.args]
        for a, b in orders:
            product = once(b, torch.mul)
            if not isinstance(a, fx.Node) or product is None or _dtype(b) != _dtype(a):
                continue
            number, x = _scaled(product)
            if number is None or _dtype(x) != _dtype(a):
                continue
            inner = once(x, torch.mul, torch.div)
            gone.add(b)
            if inner is not None and inner.kernel is torch.div and _vectors(inner, a):
                value = replace(number, minus=step.kernel is torch.sub)
                step.kernel, step.args = torch.addcdiv, (a, *inner.args)
                step.kwargs = {"value": value}
                gone.add(x)
            else:
                step.args, step.kwargs = (a, x), {"alpha": number}
            break
        else:
            _add_product(step, orders, once, gone)
    return [step for step in steps if step.node not in gone]


def _add_product(
    step: _Step,
    orders: Sequence[Sequence[Any]],
    once: Callable[..., _Step | None],
    gone: set[fx.Node],
) -> None:
    """a + (number * x) * y in one kernel."""
    for a, b in orders:
        outer = once(b, torch.mul)
        if not isinstance(a, fx.Node) or outer is None or not _vectors(outer, a):
            continue
        for x, y in (outer.args, outer.args[::-1]):
            inner = once(x, torch.mul)
            number, z = _scaled(inner) if inner is not None else (None, None)
            if number is not None and isinstance(z, fx.Node) and _dtype(z) == _dtype(a):
                value = replace(number, minus=step.kernel is torch.sub)
                step.kernel, step.args, step.kwargs = torch.addcmul, (a, z, y), {"value": value}
                gone.update((b, x))
                return


def _scaled(product: _Step) -> tuple[_Number | None, Any]:
    """(number, vector) of a product of the two; no number otherwise."""
    for number, x in (product.args, product.args[::-1]):
        if isinstance(number, _Number) and isinstance(x, fx.Node):
            return number, x
    return None, None


def _vectors(step: _Step, like: fx.Node) -> bool:
    """Whether all operands are vectors of a node's dtype."""
    return all(isinstance(a, fx.Node) and _dtype(a) == _dtype(like) for a in step.args)


def _elementwise(n: fx.Node) -> bool:
    """Whether a kernel makes new memory, and takes no shape, which would be the traced one."""
    makes = all(made.alias_info is None for made in n.target._schema.returns)  # type: ignore[union-attr]  # an operator
    return makes and not any(isinstance(a, list | tuple) for a in (*n.args, *n.kwargs.values()))


def _dtype(n: fx.Node) -> torch.dtype:
    dtype: torch.dtype = n.meta["val"].dtype
    return dtype


def _same(target: object, args: tuple[Any, ...]) -> Any:
    """What an operation comes to without being done; None if it has to be."""
    zero = [isinstance(a, _Zero) or (isinstance(a, float) and a == 0) for a in args]
    one = [isinstance(a, float) and a == 1 for a in args]
    if target is aten.mul.Tensor:
        if any(zero):
            return _ZERO
        return args[1] if one[0] else args[0] if one[1] else None
    if target is aten.add.Tensor:
        if all(zero):
            return _ZERO
        return args[1] if zero[0] else args[0] if zero[1] else None
    if target is aten.sub.Tensor and zero[1]:
        return args[0]
    if target is aten.div.Tensor:
        return _ZERO if zero[0] else args[0] if one[1] else None
    return None


def _of_root(n: fx.Node) -> Any:
    """The argument of `root`, whose value is that of sqrt; None for anything else."""
    if n.target is not aten.where.self:
        return None
    zero, x, y = n.args
    if not isinstance(zero, fx.Node) or (zero.target, zero.args) != (aten.eq.Scalar, (x, 0)):
        return None
    if not isinstance(y, fx.Node) or y.target is not aten.sqrt.default:
        return None
    (inner,) = y.args
    if not isinstance(inner, fx.Node) or inner.target is not aten.where.self:
        return None
    return x if inner.args[0] is zero and inner.args[2] is x else None


__all__ = ["Plan", "Running", "make_plan", "plan_of"]
