"""The kernels of a step on vectors: fewer than its operations.

Terms of 0 and factors of 1 are left out, a root is one kernel, and, fused, so is a sum with a
product in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    """A step on vectors. inputs: the vectors, by what they are called. outputs: what becomes of
    those that change. places: of the numbers that are read, in their list.
    """

    graph: fx.Graph
    inputs: Mapping[str, fx.Node]
    outputs: Mapping[str, fx.Node]
    places: Mapping[fx.Node, int]


# From here on an operand is a node of the graph, a Number, Zero or a plain Python value.


@dataclass(frozen=True)
class Number:
    """One of a step's numbers. tensor: for a kernel that takes no other. minus: its negative."""

    place: int
    tensor: bool = False
    minus: bool = False


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
    trace: Trace, kinds: Sequence[float | None], *, fused: bool
) -> tuple[list[Step], dict[str, Any]]:
    """(the kernels, the operands that the vectors become), for numbers of which some are 0 or 1.
    kinds: which.
    """
    try:
        steps, found = _simplified(trace, kinds)
    except _Vanished:
        steps, found = _simplified(trace, None)
    return _fused(steps, set(nodes(found.values()))) if fused else steps, found


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

    for n in trace.graph.nodes:
        if n.op != "call_function" or n.meta["val"].ndim == 0:
            continue
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
            kernel = _WRITERS.get(n.target, n.target)
            steps.append(Step(n, kernel, args, dict(n.kwargs), n.target in _WRITERS))
    found = {name: of(n) for name, n in trace.outputs.items()}
    used = set(nodes(found.values()))
    kept = []
    for step in reversed(steps):
        if step.node in used:
            kept.append(step)
            used.update(step.reads)
    return kept[::-1], found


def _fused(steps: list[Step], ends: set[fx.Node]) -> list[Step]:
    """Sums that do a product or a quotient of theirs themselves, where nobody else reads it."""
    readers: dict[fx.Node, int] = {}
    for step in steps:
        for n in step.reads:
            # Twice by one step is not once.
            readers[n] = readers.get(n, 0) + sum(a is n for a in step.args)
    made = {step.node: step for step in steps}
    gone: set[fx.Node] = set()

    def once(a: Any, *kernels: Callable[..., Tensor]) -> Step | None:
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
            if not isinstance(a, fx.Node) or product is None or dtype(b) != dtype(a):
                continue
            number, x = _scaled(product)
            if number is None or dtype(x) != dtype(a):
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
    step: Step,
    orders: Sequence[Sequence[Any]],
    once: Callable[..., Step | None],
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
            if number is not None and isinstance(z, fx.Node) and dtype(z) == dtype(a):
                value = replace(number, minus=step.kernel is torch.sub)
                step.kernel, step.args, step.kwargs = torch.addcmul, (a, z, y), {"value": value}
                gone.update((b, x))
                return


def _scaled(product: Step) -> tuple[Number | None, Any]:
    """(number, vector) of a product of the two; no number otherwise."""
    for number, x in (product.args, product.args[::-1]):
        if isinstance(number, Number) and isinstance(x, fx.Node):
            return number, x
    return None, None


def _vectors(step: Step, like: fx.Node) -> bool:
    """Whether all operands are vectors of a node's dtype."""
    return all(isinstance(a, fx.Node) and dtype(a) == dtype(like) for a in step.args)


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
