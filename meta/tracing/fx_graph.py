"""A step recorded as a graph: the same whenever it is done, and nothing in place."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ...inner.fx_graph import CannotTrace, Graph, aten, check_alike, first_line, retraced
from ...inner.torch_internals import Refused, mutates
from ..problems.seeding import fork_rng


def traced(
    function: Callable[..., Any], examples: Sequence[Tensor], others: Sequence[Tensor]
) -> Graph:
    """The operations of a function on tensors like the examples, none of them in place.

    others: of another step; CannotTrace if the function does not do the same with them.
    """
    made = _recorded(function, examples, 0)
    check_alike(made, _recorded(function, others, 1))
    with _seeded(0, examples):
        # Each turn takes as long as the recording, and most steps do nothing in place.
        if _writes(made):
            made = retraced(torch.func.functionalize(made, remove="mutations"), examples)
        return retraced(made, examples) if _draw_in_place(made) else made


def _recorded(function: Callable[..., Any], examples: Sequence[Tensor], seed: int) -> Graph:
    with _seeded(seed, examples):
        return retraced(function, examples)


@contextmanager
def _seeded(seed: int, examples: Sequence[Tensor]) -> Iterator[None]:
    # In one thread: what stands in for tensors while tracing is not made for the one in which
    # autograd would go back through a GPU's operations, beside those on numbers of the host.
    alone = torch.autograd.set_multithreading_enabled(False)
    with numbered(seed), fork_rng(seed, examples[0].device), alone:
        try:
            yield
        except Refused:
            raise
        except Exception as error:  # Whatever a model does that tensors without values cannot.
            raise CannotTrace(first_line(error)) from error


def _writes(graph: Graph) -> bool:
    """Whether anything in it is done in place."""
    called = {n.target for n in graph.graph.nodes if n.op == "call_function"}
    return any(map(mutates, called - {operator.getitem}))


def _draw_in_place(graph: Graph) -> bool:
    """Let masks be drawn in the order of memory, as they are in place; whether any was not.

    Out of place, which is all that a graph may do, torch lays a mask out anew: dropout of a
    transposed tensor would have another mask than it has in an eager step.
    """
    changed = False
    for n in graph.graph.find_nodes(op="call_function", target=aten.bernoulli.p):
        like = n.args[0]
        strides = like.meta["val"].stride()
        order = sorted(range(len(strides)), key=lambda d: -strides[d])
        if order != list(range(len(strides))):
            with graph.graph.inserting_after(n):
                back = graph.graph.call_function(
                    aten.permute.default, (n, [order.index(d) for d in range(len(order))])
                )
            n.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)
            with graph.graph.inserting_before(n):
                there = graph.graph.call_function(aten.permute.default, (like, order))
            n.replace_input_with(like, there)
            changed = True
    if changed:
        graph.recompile()
    return changed


def batchable(graph: Graph) -> Graph:
    """The same in operations that vmap can give another dimension: reshape for view, which asks
    for a layout that this would change, and full_like for fill.
    """
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph.graph, {}))
    for n in copy.nodes:
        if n.target is aten.view.default:
            n.target = aten.reshape.default
        elif n.target is aten.fill.Scalar:
            n.target = aten.full_like.default
    return fx.GraphModule(graph, copy)


def contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors laid out as generated code takes them; those that are come back as they are."""
    return [x.contiguous() for x in tensors]


@contextmanager
def numbered(seed: int) -> Iterator[None]:
    """Python's and numpy's generators seeded: a step that draws from them betrays itself."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
