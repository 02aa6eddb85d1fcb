"""A traced graph taken apart: numbers that are known beforehand from vectors that are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .torch_internals import trace, without_duplicates

aten = torch.ops.aten
Graph = fx.GraphModule
_LOW = (torch.bfloat16, torch.float16)


class CannotTrace(Exception):
    """Why a step is not a function of tensors alone."""


def retraced(function: Callable[..., Any], examples: Sequence[Tensor]) -> Graph:
    """The operations of a function on tensors like the examples."""
    made = trace(function, examples)
    _describe_constants(made)
    _shorten(made)
    return made


def _describe_constants(graph: Graph) -> None:
    """Say of constants what is said of all nodes; torch 2.6 does not."""
    described = (n.meta.get("val") for n in graph.graph.nodes)
    mode = next((x.fake_mode for x in described if hasattr(x, "fake_mode")), None)
    for n in graph.graph.find_nodes(op="get_attr"):
        held = getattr(graph, str(n.target))
        if mode is not None and "val" not in n.meta and isinstance(held, Tensor):
            n.meta["val"] = mode.from_tensor(held)


def _shorten(graph: Graph) -> None:
    """Take out what changes nothing: detaching, what is computed twice, what nobody reads."""
    for n in list(graph.graph.nodes):
        if n.target is aten.detach.default:
            n.replace_all_uses_with(n.args[0])
            graph.graph.erase_node(n)
        elif str(n.target) == "aten._new_zeros_with_same_feature_meta.default":
            # Forward mode's own zeros, which no compiler knows.
            val = n.meta["val"]
            n.target, n.args = aten.zeros.default, (list(val.shape),)
            n.kwargs = {"dtype": val.dtype, "device": val.device}
    short = without_duplicates(graph.graph)
    short.eliminate_dead_code()
    graph.graph = short  # Which recompiles.


def check_alike(one: Graph, other: Graph) -> None:
    """Raise CannotTrace unless two steps do the same."""
    same = _listing(one) == _listing(other) and all(
        _same(getattr(one, str(n.target)), getattr(other, str(n.target)))
        for n in one.graph.nodes
        if n.op == "get_attr"
    )
    if not same:
        raise CannotTrace(
            "two steps of it do different things: its loss depends on the step, on values of "
            "tensors or on draws that are not torch's"
        )


def _listing(graph: Graph) -> list[str]:
    return [f"{n.op} {n.target} {n.args} {n.kwargs}" for n in graph.graph.nodes]


def _same(one: object, other: object) -> bool:
    """Whether two constants of a graph are equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    return one is other


def first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def over_time(graph: Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
    """A graph of numbers at all steps, the first dimension of every input."""
    with torch.no_grad():
        return list(torch.vmap(lambda *each: tuple(graph(*each)))(*inputs))


def graph_io(graph: Graph) -> tuple[list[fx.Node], list[fx.Node]]:
    """Inputs and outputs of a graph."""
    (output,) = (n for n in graph.graph.nodes if n.op == "output")
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    return inputs, list(output.args[0])


@dataclass(frozen=True)
class ScalarPrelude:
    """What a step computes of numbers alone, for all steps at once.

    graph(*numbers) -> what the rest of the step reads of them. rows: by type, the nodes of the
    whole graph that one row of them holds.
    """

    graph: Graph
    rows: tuple[tuple[torch.dtype, tuple[fx.Node, ...]], ...]

    def over(self, numbers: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """The rows of every step, from the numbers at every step: (steps, length) each."""
        made = iter(over_time(self.graph, numbers))
        steps = len(numbers[0])
        return [
            torch.cat([next(made).to(dtype).reshape(steps, -1) for _ in nodes], 1).to(device)
            for dtype, nodes in self.rows
        ]


def split_scalars(
    whole: Graph, numbers: Sequence[fx.Node], largest: int, others: Iterable[fx.Node] = ()
) -> tuple[ScalarPrelude, set[fx.Node]]:
    """(the early part of a graph, its nodes). largest: the most numbers that a node of it may be.

    others: nodes that are not there when the rest runs either.
    """
    early, constant = set(numbers), set[fx.Node]()
    place = numbers[0].meta["val"].device
    for n in whole.graph.nodes:
        small = n.op in ("call_function", "get_attr") and 0 <= _numel(n) <= largest
        if not small or n.meta["val"].device != place or is_random(n):
            continue
        # What is made of constants alone is done again wherever it is read.
        varying = [x for x in n.all_input_nodes if x not in constant]
        if not varying:
            constant.add(n)
        elif all(x in early for x in varying):
            early.add(n)
    absent = early | set(others)
    body = [n for n in whole.graph.nodes if n.op in ("call_function", "output") and n not in absent]
    read = {x for n in body for x in n.all_input_nodes}
    by_type: dict[torch.dtype, list[fx.Node]] = {}
    for n in whole.graph.nodes:
        if n in early and n in read:
            by_type.setdefault(_type_in(n, body), []).append(n)
    rows = tuple((dtype, tuple(nodes)) for dtype, nodes in by_type.items())
    flat = [n for _, nodes in rows for n in nodes]
    return ScalarPrelude(extract(whole, numbers, flat, draws=False), rows), early


def _numel(n: fx.Node) -> int:
    value = n.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else -1


def computes_low(graph: Graph) -> bool:
    """Whether anything in a graph is of less than float32."""
    values = (n.meta.get("val") for n in graph.graph.nodes)
    return any(isinstance(x, Tensor) and x.dtype in _LOW for x in values)


def is_number(n: fx.Node) -> bool:
    value = n.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == 0


def is_random(n: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())


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
class NormOf:
    """Stands in an output for the norm of a node."""

    of: fx.Node


def extract(
    whole: Graph,
    inputs: Sequence[fx.Node | Sequence[fx.Node]],
    outputs: Sequence[fx.Node | list[fx.Node | NormOf]],
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
            env.update(_unpacked(graph, placeholder, source))
    flat = [x for out in outputs for x in (out if isinstance(out, list) else [out])]
    wanted = {x.of if isinstance(x, NormOf) else x for x in flat}
    needed: set[fx.Node] = set()
    for n in reversed(list(whole.graph.nodes)):
        if n in env or n.op in ("placeholder", "output"):
            continue
        if n in wanted or n in needed or (draws and is_random(n)):
            needed.add(n)
            needed.update(n.all_input_nodes)
    for n in whole.graph.nodes:
        if n in needed and n not in env and n.op != "placeholder":
            env[n] = graph.node_copy(n, lambda x: env[x])

    def one(x: fx.Node | NormOf) -> fx.Node:
        if isinstance(x, NormOf):
            return graph.call_function(aten.linalg_vector_norm.default, (env[x.of],))
        return env[x]

    def double(x: fx.Node | NormOf) -> fx.Node:
        return graph.call_function(aten.to.dtype, (one(x), torch.float64))

    results = []
    for out in outputs:
        if isinstance(out, list):
            results.append(graph.call_function(aten.stack.default, ([double(x) for x in out],)))
        else:
            results.append(one(out))
    graph.output(tuple(results))
    return fx.GraphModule(whole, graph)


def _unpacked(
    graph: fx.Graph, row: fx.Node, nodes: Sequence[fx.Node]
) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Each of the nodes that a row holds, in their shapes."""
    at = 0
    for n in nodes:
        shape = list(n.meta["val"].shape)
        if shape:
            part = graph.call_function(aten.slice.Tensor, (row, 0, at, at + _numel(n)))
            yield n, graph.call_function(aten.view.default, (part, shape))
        else:
            yield n, graph.call_function(aten.select.int, (row, 0, at))
        at += _numel(n)


__all__ = [
    "CannotTrace",
    "Graph",
    "NormOf",
    "ScalarPrelude",
    "aten",
    "check_alike",
    "computes_low",
    "extract",
    "first_line",
    "graph_io",
    "is_number",
    "is_random",
    "over_time",
    "retraced",
    "split_scalars",
]
