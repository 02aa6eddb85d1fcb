"""The kernels of a pass over vectors: fewer than its operations.

Terms of 0 and factors of 1 are left out, and a root is one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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


class Vanished(Exception):
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


def without_weights(
    trace: Trace, steps: list[Step], found: dict[str, Any]
) -> tuple[list[Step], dict[str, Any]]:
    """The same without the weights, if all of them that is read is what the step is taken off."""
    p, g, end = trace.inputs["p"], trace.inputs["g"], found.get("p")
    last = next((step for step in steps if step.node is end), None)
    if last is None or last.kernel is not torch.sub or last.kwargs:
        return steps, found
    before, taken = last.args
    rest = [step for step in steps if step is not last]
    others = {n: x for n, x in found.items() if n != "p"}
    read = {*nodes(others.values()), *trace.sums, *(n for step in rest for n in step.reads)}
    if before is not p or taken is p or not read.isdisjoint((p, end)):
        return steps, found
    return (rest, {**others, "g": taken}) if alike(last, p, g, taken) else (steps, found)


def nodes(operands: Iterable[Any]) -> list[fx.Node]:
    """Those operands that are nodes, each once."""
    return list(dict.fromkeys(a for a in operands if isinstance(a, fx.Node)))


def simplified(
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
            raise Vanished  # A vector became a number.
        elif (inside := _of_root(n)) is not None:
            steps.append(Step(n, torch.sqrt, (of(inside),), {}, True))
        else:
            beside = [a for a in n.args if isinstance(a, fx.Node) and a not in places]
            if n.target not in _MIXED or not all(dtype(a).is_floating_point for a in beside):
                args = tuple(map(exact, n.args))
            if any(isinstance(a, Zero) for a in args):
                raise Vanished
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


def alike(step: Step, *operands: Any) -> bool:
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


__all__ = [
    "Number",
    "Step",
    "Trace",
    "Vanished",
    "Zero",
    "alike",
    "aten",
    "dtype",
    "nodes",
    "simplified",
    "without_weights",
]
