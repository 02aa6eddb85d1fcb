"""The kernels of a pass over vectors: fewer than its operations.

Terms of 0 and factors of 1 are left out, a root is one kernel, and, fused, so is a sum with a
product in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

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


@dataclass(frozen=True)
class Trace:
    """A pass over vectors. operations: in order. inputs: the vectors, by what they are called.
    outputs: what becomes of those that change. sums: operations that make a number of all elements.
    places: of the numbers that are read, in their list.
    """

    operations: Sequence[fx.Node]
    inputs: Mapping[str, fx.Node]
    outputs: Mapping[str, fx.Node]
    sums: Sequence[fx.Node]
    places: Mapping[fx.Node, int]


# From here on an operand is a node of the graph, a Number, Zero or a plain Python value.


@dataclass(frozen=True)
class Number:
    """One of a step's numbers. tensor: for a kernel that takes no other. minus: its negative. over:
    the place of what it is divided by.
    """

    place: int
    tensor: bool = False
    minus: bool = False
    over: int | None = None


class Zero:
    """A term that vanished."""


_ZERO = Zero()


class _Vanished(Exception):
    """A kernel needs a term that vanished."""


@dataclass
class Step:
    """A kernel on operands, and the node it stands for."""

    node: fx.Node
    kernel: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    writes: bool

    @property
    def reads(self) -> list[fx.Node]:
        return nodes((*self.args, *self.kwargs.values()))


def kernels_of(
    trace: Trace, kinds: Sequence[float | None], *, fused: bool, apart: bool = False
) -> tuple[list[Step], dict[str, Any]]:
    """(the kernels, the operands that the vectors become), for numbers of which some are 0 or 1.
    kinds: which. apart: what is to be taken off the weights is in the place of the gradient, and
    nothing in that of the weights, if they are read for nothing else.
    """
    try:
        steps, found = _simplified(trace, kinds)
    except _Vanished:
        steps, found = _simplified(trace, None)
    if apart:
        steps, found = _apart(trace, steps, found)
    numbers = {place: n for n, place in trace.places.items()}
    ends = {*nodes(found.values()), *trace.sums}
    return _fused(steps, ends, numbers) if fused else steps, found


def _apart(
    trace: Trace, steps: list[Step], found: dict[str, Any]
) -> tuple[list[Step], dict[str, Any]]:
    """The same without the weights, if all of them that is read is what the step is taken off."""
    p, g, end = trace.inputs["p"], trace.inputs["g"], found.get("p")
    rest = [step for step in steps if step.node is not end]
    others = {n: x for n, x in found.items() if n != "p"}
    read = {*nodes(others.values()), *trace.sums, *(n for step in rest for n in step.reads)}
    for last in steps:
        if last.node is end and last.kernel is torch.sub and not last.kwargs:
            before, taken = last.args
            if before is p and taken is not p and read.isdisjoint((p, end)):
                if _alike(last, p, g, taken):
                    return rest, {**others, "g": taken}
    return steps, found


def nodes(operands: Iterable[Any]) -> list[fx.Node]:
    """Those operands that are nodes, each once."""
    return list(dict.fromkeys(a for a in operands if isinstance(a, fx.Node)))


def _simplified(
    trace: Trace, kinds: Sequence[float | None] | None
) -> tuple[list[Step], dict[str, Any]]:
    """The kernels without factors of 1 and terms of 0; without kinds, all as they were traced."""
    places, value = trace.places, dict[fx.Node, Any]()
    steps: list[Step] = []

    def of(a: Any) -> Any:
        if not isinstance(a, fx.Node):
            return a
        if a in places:
            kind = kinds[places[a]] if kinds else None
            return Number(places[a]) if kind is None else kind
        return value.get(a, a)

    def exact(a: Any) -> Any:
        """A number as it is: a Python number would take the dtype of what is beside it."""
        number = isinstance(a, fx.Node) and a in places
        return Number(places[a], tensor=True) if number else of(a)

    for n in trace.operations:
        args = tuple(map(of, n.args))
        same = _same(n.target, args) if kinds and not n.kwargs else None
        if isinstance(same, fx.Node) and dtype(same) != dtype(n):
            same = None
        if isinstance(same, fx.Node | Zero):
            value[n] = same
        elif same is not None:
            raise _Vanished  # A vector became a number.
        elif (inside := _of_root(n)) is not None:
            steps.append(Step(n, torch.sqrt, (of(inside),), {}, True))
        else:
            beside = [a for a in n.args if isinstance(a, fx.Node) and a not in places]
            if n.target not in _MIXED or not all(dtype(a).is_floating_point for a in beside):
                args = tuple(map(exact, n.args))
            if any(isinstance(a, Zero) for a in args):
                raise _Vanished
            itself: Any = n.target
            kernel = _WRITERS.get(itself, itself)
            steps.append(Step(n, kernel, args, dict(n.kwargs), itself in _WRITERS))
    found = {name: of(n) for name, n in trace.outputs.items()}
    used = {*nodes(found.values()), *trace.sums}
    kept = []
    for step in reversed(steps):
        if step.node in used:
            kept.append(step)
            used.update(step.reads)
    return kept[::-1], found


# The step that makes an operand by one of these kernels and for one reader alone.
Once = Callable[..., Step | None]


def _fused(steps: list[Step], ends: set[fx.Node], numbers: Mapping[int, fx.Node]) -> list[Step]:
    """Sums that do products and quotients of theirs themselves, where nobody else reads them.
    numbers: by place.
    """
    readers: dict[fx.Node, int] = {}
    for step in steps:
        for n in step.reads:
            # Twice by one step is not once.
            readers[n] = readers.get(n, 0) + sum(a is n for a in step.args)
    made = {step.node: step for step in steps}
    gone: set[fx.Node] = set()

    def once(a: Any, *kernels: Callable[..., Tensor]) -> Step | None:
        step = made.get(a) if isinstance(a, fx.Node) else None
        mine = step and step.kernel in kernels and not step.kwargs
        return step if mine and readers[a] == 1 and a not in ends else None

    for step in steps:
        if step.kernel not in (torch.add, torch.sub) or step.kwargs:
            continue
        orders = [step.args, step.args[::-1]] if step.kernel is torch.add else [step.args]
        # Those that spare two kernels first.
        ways = (partial(_average, numbers=numbers), _add_product, _add_quotient, _add_multiple)
        any(way(step, a, b, once, gone) for way in ways for a, b in orders)
    return [step for step in steps if step.node not in gone]


def _average(
    step: Step, a: Any, b: Any, once: Once, gone: set[fx.Node], *, numbers: Mapping[int, fx.Node]
) -> bool:
    """(1 - share) * x + share * y, and x + share * (y - x), in one kernel."""
    share, y = _scaled(once(b, torch.mul))
    if share is None or step.kernel is not torch.add or not _alike(step, a, b, y):
        return False
    kept, x = _scaled(once(a, torch.mul))
    whole = kept is not None and _make_one(numbers[share.place], numbers[kept.place])
    difference = once(y, torch.sub)
    if whole and _alike(step, x):
        gone.update((a, b))
    elif difference is not None and difference.args[1] is a and _alike(step, difference.args[0]):
        gone.update((b, y))
        x, y = a, difference.args[0]
    else:
        return False
    step.kernel, step.args = torch.lerp, (x, y, share)
    return True


def _make_one(a: fx.Node, b: fx.Node) -> bool:
    """Whether two numbers make 1, as the trace tells."""
    pairs = ((a, b), (b, a))
    return any(x.target is aten.rsub.Scalar and x.args == (y, 1) for x, y in pairs)


def _add_product(step: Step, a: Any, b: Any, once: Once, gone: set[fx.Node]) -> bool:
    """a + (number * x) * y in one kernel."""
    outer = once(b, torch.mul)
    if outer is None or not _alike(step, a, *outer.args):
        return False
    for x, y in (outer.args, outer.args[::-1]):
        number, z = _scaled(once(x, torch.mul))
        if number is not None and _alike(step, z):
            value = replace(number, minus=step.kernel is torch.sub)
            step.kernel, step.args, step.kwargs = torch.addcmul, (a, z, y), {"value": value}
            gone.update((b, x))
            return True
    return False


def _add_quotient(step: Step, a: Any, b: Any, once: Once, gone: set[fx.Node]) -> bool:
    """a + number * (x / y) in one kernel, and so if x is divided by another number."""
    number, x = _scaled(once(b, torch.mul))
    inner = once(x, torch.div)
    if number is None or inner is None or not _alike(step, a, b, *inner.args):
        return False
    above, below = inner.args
    gone.update((b, x))
    if (divided := once(above, torch.div)) is not None:
        x, by = divided.args
        if isinstance(by, Number) and _alike(step, x):
            gone.add(above)
            above, number = x, replace(number, over=by.place)
    value = replace(number, minus=step.kernel is torch.sub)
    step.kernel, step.args, step.kwargs = torch.addcdiv, (a, above, below), {"value": value}
    return True


def _add_multiple(step: Step, a: Any, b: Any, once: Once, gone: set[fx.Node]) -> bool:
    """a + number * x in one kernel."""
    number, x = _scaled(once(b, torch.mul))
    if number is None or not _alike(step, a, b, x):
        return False
    gone.add(b)
    step.args, step.kwargs = (a, x), {"alpha": number}
    return True


def _scaled(product: Step | None) -> tuple[Number | None, Any]:
    """(number, vector) of a product of the two; no number otherwise."""
    args = product.args if product is not None else ()
    for number, x in zip(args, args[::-1], strict=True):
        if isinstance(number, Number) and isinstance(x, fx.Node):
            return number, x
    return None, None


def _alike(step: Step, *operands: Any) -> bool:
    """Whether operands are vectors of the dtype that a step makes."""
    return all(isinstance(a, fx.Node) and dtype(a) == dtype(step.node) for a in operands)


def dtype(n: fx.Node) -> torch.dtype:
    found: torch.dtype = n.meta["val"].dtype
    return found


def _same(target: object, args: tuple[Any, ...]) -> Any:
    """What an operation comes to without being done; None if it has to be."""
    zero = [isinstance(a, Zero) or (isinstance(a, float) and a == 0) for a in args]
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


__all__ = ["Number", "Step", "Trace", "Zero", "dtype", "kernels_of", "nodes"]
