"""A rule's step as generated code, by torch.compile, in the memory of weights and slots.

As it is written a rule computes its numbers, bias corrections and the like, beside its vectors, and
a compiler would compute them again for every element. So they are split off: what follows from
hypers, the counter and the loss alone is done once a step on the host and handed over in a vector,
and only the rest is compiled. A schedule changes values of tensors, and never the code.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from ..core.flat import flat_step
from ..core.hyper import Tensors
from ..core.layout import Layout
from ..core.rule import Rule
from ..fx_graph import (
    Graph,
    ScalarPrelude,
    aten,
    check_alike,
    extract,
    first_line,
    graph_io,
    is_random,
    retraced,
    split_scalars,
)
from ..torch_internals import Refused

# The most numbers that a tensor made of hypers may be and still count as one of them.
_LARGEST = 64
# None: an entry per element.
_Declared = tuple[tuple[str, torch.Size | None, torch.dtype], ...]


@dataclass(frozen=True)
class StepKey:
    """What a step is generated for; of a rule over elements, whatever the length.

    slots, shared: names, shapes and types. kind: all that the rule may see of names. stacked: how
    many tensors are one batch, 0 if it is none.
    """

    rule: Rule
    options: tuple[tuple[str, object], ...]
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    slots: _Declared
    shared: _Declared
    kind: Hashable
    stacked: int
    layout: Layout = field(compare=False)

    @staticmethod
    def of(
        rule: Rule, p: Tensor, slots: Tensors, shared: Tensors, layout: Layout, *, stacked: bool
    ) -> StepKey:
        return StepKey(
            rule,
            tuple(rule.options().items()),
            p.dtype,
            p.device,
            torch.Size() if rule.over == "element" else p.shape,
            _declared(slots, p.shape),
            _declared(shared, None),
            rule.kind(layout),
            len(p) if stacked else 0,
            layout,
        )

    def examples(self, length: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """(weights, slots, shared slots) of a step like it; length: of a rule over elements."""
        long = self.rule.over == "element"
        shape = torch.Size([length]) if long else self.shape

        def one(shape: torch.Size, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        slots = [one(shape if own is None else own, dtype) for _, own, dtype in self.slots]
        shared = [torch.ones(own or (), dtype=dtype) for _, own, dtype in self.shared]
        return one(shape, self.dtype), slots, shared


def _declared(tensors: Tensors, long: torch.Size | None) -> _Declared:
    return tuple((n, None if x.shape == long else x.shape, x.dtype) for n, x in tensors.items())


Numbers = tuple[list[Tensor], Tensors]


class CompiledStep:
    """A step of a rule on tensors of one kind. refused: why it cannot be compiled after all."""

    def __init__(self, key: StepKey) -> None:
        self.refused = ""
        self._key = key
        graph = _traced(key, 3)
        if key.rule.over == "element":
            check_alike(graph, _traced(key, 5))
        if any(map(is_random, graph.graph.nodes)):
            raise Refused("it draws random numbers")
        inputs, outputs = graph_io(graph)
        count = 1 + len(key.rule.hypers) + len(key.shared) + ("loss" in key.rule.needs)
        given, held = inputs[:count], inputs[count:]
        prelude, early = split_scalars(graph, given, _LARGEST)
        shared = dict(zip((n for n, *_ in key.shared), outputs, strict=False))
        known = {n: x for n, x in shared.items() if x in early}
        self._prelude, self._known = prelude, tuple(known)
        self._late = tuple(n for n in shared if n not in known)
        self._host = extract(graph, given, [*_flat(prelude), *known.values()], draws=False)
        vectors = extract(
            graph,
            [*(nodes for _, nodes in prelude.rows), *held],
            [*(shared[n] for n in self._late), *outputs[len(shared) :]],
        )
        _write_back(vectors, len(self._late), len(prelude.rows))
        dynamic = key.rule.over == "element"
        self._run: Callable[..., Any] = torch.compile(vectors, fullgraph=True, dynamic=dynamic)
        self._ran = False

    def numbers(self, t: Tensor, values: Tensors, shared: Tensors, loss: Tensor | None) -> Numbers:
        """(what the vectors need of the numbers at a step, the shared slots that follow)."""
        given = [t, *(values[n] for n in self._key.rule.hypers)]
        given += [shared[n].to("cpu") for n, *_ in self._key.shared]
        if "loss" in self._key.rule.needs:
            assert loss is not None
            given.append(loss.to("cpu", torch.float64))
        made = iter(self._host(*given))
        rows = [
            torch.cat([next(made).to(dtype).reshape(-1) for _ in nodes]).to(self._key.device)
            for dtype, nodes in self._prelude.rows
        ]
        return rows, dict(zip(self._known, made, strict=True))

    def __call__(self, p: Tensor, g: Tensor, slots: Tensors, numbers: Numbers) -> Tensors | None:
        """One step in the memory of p and slots; the shared ones after it. None, and nothing done,
        if the first of them shows that it cannot be compiled.
        """
        rows, known = numbers
        inputs = *rows, p, g, *slots.values()
        if self.refused:
            return None
        if self._ran:
            late = self._run(*inputs)
        else:
            try:
                with warnings.catch_warnings():
                    # What torch warns of inside itself is nothing a user could change.
                    warnings.simplefilter("ignore")
                    late = self._run(*inputs)
            except Exception as error:  # Whatever a compiler, or one that is not there, raises.
                self.refused = first_line(error)
                return None
            self._ran = True
        return {**known, **dict(zip(self._late, late, strict=True))}


@lru_cache(maxsize=1024)
def compiled_step(key: StepKey) -> CompiledStep | str:
    """The step for what a key says; why there is none, otherwise."""
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return "TORCH_COMPILE_DISABLE=1 is set"
    try:
        with torch.no_grad():
            return CompiledStep(key)
    except Refused as why:
        return str(why)
    except Exception as error:  # A branch on a value, say.
        return first_line(error)


def _traced(key: StepKey, length: int) -> Graph:
    """(t, *hypers, *shared slots, *loss, p, g, *other slots) -> (*shared slots, p, *other slots)"""
    rule, layout = key.rule, key.layout
    hypers, shared, slots = [*rule.hypers], [n for n, *_ in key.shared], [n for n, *_ in key.slots]
    needs_loss = "loss" in rule.needs

    def step(*flat: Tensor) -> list[Tensor]:
        rest = iter(flat)
        t = next(rest)
        values = {n: next(rest) for n in hypers}
        held = {n: next(rest) for n in shared}
        loss = next(rest) if needs_loss else None
        p, g, *own = rest

        def one(p: Tensor, g: Tensor, own: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            before = {**held, **dict(zip(slots, own, strict=True))}
            if rule.over == "model":
                moved, after = flat_step(rule, layout, p, g, before, t, values, loss=loss)
            else:
                moved, after = rule(p, g, before, t, values, loss=loss, layout=layout)
            return [after[n] for n in shared], [moved, *(after[n] for n in slots)]

        if key.stacked:
            one = torch.vmap(one, out_dims=(None, 0))  # type: ignore[arg-type]  # None: no batch
        whole, each = one(p, g, own)
        return [*whole, *each]

    p, own, held = key.examples(length)
    numbers = [torch.ones((), dtype=torch.float64) for _ in range(1 + len(hypers))] + held
    numbers += [torch.ones((), dtype=torch.float64)] if needs_loss else []
    return retraced(step, [*numbers, p, torch.empty_like(p), *own])


def _flat(prelude: ScalarPrelude) -> list[fx.Node]:
    return [n for _, nodes in prelude.rows for n in nodes]


def _write_back(graph: Graph, late: int, rows: int) -> None:
    """Write the outputs of a step, but for the first ones, into the inputs that they replace."""
    inputs, outputs = graph_io(graph)
    p, _, *slots = inputs[rows:]
    (end,) = (n for n in graph.graph.nodes if n.op == "output")
    pairs = [(x, y) for x, y in zip((p, *slots), outputs[late:], strict=True) if x is not y]
    with graph.graph.inserting_before(end):
        # Apart first: an output may be another input, or a view of one.
        new = [graph.graph.call_function(aten.clone.default, (y,)) for _, y in pairs]
        for (x, _), y in zip(pairs, new, strict=True):
            graph.graph.call_function(aten.copy_.default, (x, y))
    end.args = (tuple(outputs[:late]),)
    graph.recompile()


__all__ = ["CompiledStep", "Numbers", "StepKey", "compiled_step"]
