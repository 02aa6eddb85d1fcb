"""The kernels of a pass over vectors as a Python function that writes where it may.

That is into the vectors themselves, where nobody reads any more what they held, and else into few
buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .fuse import fuse
from .simplify import (
    Number,
    Step,
    Trace,
    Vanished,
    Zero,
    dtype,
    nodes,
    simplified,
    without_weights,
)

Buffers = Mapping[torch.dtype, list[Tensor]]
# (vectors, numbers, the same as tensors, buffers) -> sums: kernels, one after the other.
Run = Callable[[Sequence[Tensor], Sequence[Any], Sequence[Tensor], Buffers], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Code:
    """A pass over vectors. buffers: how many of each dtype it takes. weights: whether it reads or
    changes them; a last pass that does not has what is to be taken off them in the place of the
    gradient.
    """

    run: Run
    buffers: Mapping[torch.dtype, int]
    weights: bool


def written(
    trace: Trace, kinds: Sequence[float | None], *, fused: bool, gathered: bool = False
) -> Code:
    """The pass for numbers of which some are 0 or 1. kinds: which. gathered: weights and gradients
    are copies, so that a gradient may be overwritten, and weights that are not read need none.
    """
    steps, found = kernels_of(trace, kinds, fused=fused, apart=gathered)
    read = {n for step in steps for n in step.reads}.union(nodes(found.values()))
    weights = "p" in found or trace.inputs["p"] in read
    writer = _Writer(trace.inputs, scratch=("g",) if gathered and "g" not in found else ())
    return Code(*writer.code(steps, found, trace.sums), weights)


def kernels_of(
    trace: Trace, kinds: Sequence[float | None], *, fused: bool, apart: bool = False
) -> tuple[list[Step], dict[str, Any]]:
    """(the kernels, the operands that the vectors become), for numbers of which some are 0 or 1.
    kinds: which. apart: what is to be taken off the weights is in the place of the gradient, and
    nothing in that of the weights, if they are read for nothing else.
    """
    try:
        steps, found = simplified(trace, kinds)
    except Vanished:
        steps, found = simplified(trace, None)
    if apart:
        steps, found = without_weights(trace, steps, found)
    numbers = {place: n for n, place in trace.places.items()}
    ends = {*nodes(found.values()), *trace.sums}
    return fuse(steps, ends, numbers) if fused else steps, found


class _Writer:
    """Knows where every value is, and which buffers are free."""

    def __init__(self, inputs: Mapping[str, fx.Node], scratch: Sequence[str]) -> None:
        self._inputs = inputs
        self._names = {n: f"x[{i}]" for i, n in enumerate(inputs.values())}
        self._free: dict[torch.dtype, list[str]] = {}
        # Buffers in use; an input among them is one from when it is read for the last time.
        self._taken = {inputs[name]: self._names[inputs[name]] for name in scratch}
        self._made: dict[torch.dtype, int] = {}
        self._scope: dict[str, Any] = {"torch": torch}

    def code(
        self, steps: Sequence[Step], found: Mapping[str, Any], sums: Sequence[fx.Node]
    ) -> tuple[Run, dict[torch.dtype, int]]:
        last = {n: i for i, step in enumerate(steps) for n in step.reads}
        last |= dict.fromkeys(nodes(found.values()), len(steps))
        homes = {n: self._inputs[name] for name, n in found.items() if isinstance(n, fx.Node)}
        # What a vector becomes, and when: until then it may hold what is made on the way.
        due = {homes[step.node]: i for i, step in enumerate(steps) if step.node in homes}
        lent = dict[fx.Node, int]()
        lines: list[str] = []
        for i, step in enumerate(steps):
            given = [*map(self._spelled, step.args)]
            given += [f"{name}={self._spelled(x)}" for name, x in step.kwargs.items()]
            # What is read here for the last time gives its place back, to this very step even.
            for n in step.reads:
                if last[n] == i and n in self._taken:
                    self._free.setdefault(dtype(n), []).append(self._taken.pop(n))
            if step.writes:
                own = homes.get(step.node)
                vacant = [
                    home
                    for home, end in due.items()
                    if last.get(home, -1) <= i
                    and lent.get(home, -1) <= i
                    and dtype(home) == dtype(step.node)
                    and (home is own or (own is None and last[step.node] <= end))
                ]
                if vacant:
                    place, lent[vacant[0]] = self._names[vacant[0]], last[step.node]
                else:
                    place = self._taken[step.node] = self._buffer(dtype(step.node))
                lines.append(f"k{i}({', '.join([*given, f'out={place}'])})")
            else:
                place = f"b{i}"
                lines.append(f"{place} = k{i}({', '.join(given)})")
            self._names[step.node] = place
        lines += self._moves(found)
        lines.append(f"return ({''.join(f'{self._names[n]}, ' for n in sums)})")
        source = "\n    ".join(["def run(x, n, m, o):", *lines])
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
        if isinstance(operand, Number):
            sign = "-" if operand.minus else ""
            over = "" if operand.over is None else f" / n[{operand.over}]"
            return f"{sign}{'m' if operand.tensor else 'n'}[{operand.place}]{over}"
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
        changed = {homes[name] for name in away}
        for i, value in enumerate(away.values()):
            yield f"c{i} = {value}{'.clone()' if value in changed else ''}"
        yield from (f"{homes[n]}.zero_()" for n, x in found.items() if isinstance(x, Zero))
        yield from (f"{homes[name]}.copy_(c{i})" for i, name in enumerate(away))


__all__ = ["Buffers", "Code", "kernels_of", "written"]
