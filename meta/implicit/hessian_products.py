"""Second derivatives of the training loss as traced code: what all products share is done once.

Autograd differentiates the gradient's graph anew for every product with a vector. Here the gradient
and a product are traced into one graph, which is divided by what depends on the vector: the rest,
such as the derivatives of activations, is computed once per hypergradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import Tensor, fx

from ...inner.core.hyper import Tensors
from ...inner.fx_graph import Graph, computes_low, extract, graph_io, is_random
from ...inner.numerics.pullback import vjp
from ...inner.torch_internals import Run
from ..problems.problem import draws_of
from ..tracing.fx_graph import contiguous, numbered, traced
from ..tracing.machine import TracedCode, build_once
from ..tracing.matmul_layout import narrow_transposed
from ..tracing.state_layout import StateLayout
from ..tracing.verify import check_against_autograd, directions
from ..training.state import State
from ..training.training import Training
from .curvature import Curvature, product_and_gradient
from .linear_solvers import Matvec

# Other ways to look at the same memory: kept once is what they look at.
_VIEWS = {
    f"aten.{name}"
    for name in (
        "t.default",
        "view.default",
        "_unsafe_view.default",
        "expand.default",
        "slice.Tensor",
        "select.int",
        "permute.default",
        "transpose.int",
        "unsqueeze.default",
        "squeeze.dim",
    )
}


class HessianProducts(NamedTuple):
    """What a linear system of second derivatives is made of: product(v), the curvature times v;
    gradient(), of the training loss in the weights; mixed(v), the derivatives of <gradient, v> in
    the hypers learned.
    """

    product: Matvec
    gradient: Callable[[], Tensor]
    mixed: Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class ProductGraph:
    """A traced gradient and its derivatives along a vector, in three parts.

    once(p, *rest) -> (the gradient in p, *what the others read beside p and rest). across(*read, v)
    -> the Hessian times v. aside(*read, v) -> the derivatives of <gradient, v> in the hypers
    learned. read: by position, of (p, *rest, *kept). form: how (p, *rest, v) lie.
    """

    once: Graph
    across: Graph
    aside: Graph
    read: tuple[int, ...]
    form: StateLayout
    random: bool
    low: bool


def trace_products(
    training: Training, state: State, values: Tensors, learned: Sequence[str], seed: int
) -> ProductGraph:
    """The graph for a training's loss; CannotTrace if that is more than tensors."""
    hypers = training.of_loss(values)
    with numbered(seed):
        form = StateLayout.of_loss(training, state, hypers, learned, 0, seed)
        form.batch.check()
        one, other = (_inputs(training, form, state, hypers, i, seed + i) for i in (0, 1))
    whole = _whole(training, form, state, one, other)
    narrow_transposed(whole)
    inputs, outputs = graph_io(whole)
    fixed, v = inputs[:-1], inputs[-1]
    moves = {v}
    for n in whole.graph.nodes:
        if any(x in moves for x in n.all_input_nodes):
            moves.add(n)
    read: dict[fx.Node, None] = {}
    for n in whole.graph.nodes:
        if n.op == "call_function" and n in moves:
            still = (x for x in n.all_input_nodes if x not in moves and x.op != "get_attr")
            read.update(dict.fromkeys(map(_looked_at, still)))
    # Outputs that the vector does not reach are constants, such as zeros: taken as they are.
    still = (x for x in outputs[1:] if x not in moves and x.op != "get_attr")
    read.update(dict.fromkeys(still))
    kept = [n for n in read if n not in fixed]
    at = {n: k for k, n in enumerate([*fixed, *kept])}
    return ProductGraph(
        once=extract(whole, fixed, [outputs[0], *kept]),
        across=extract(whole, [*read, v], outputs[1:2], draws=False),
        aside=extract(whole, [*read, v], outputs[2:], draws=False),
        read=tuple(at[n] for n in read),
        form=form,
        random=any(map(is_random, whole.graph.nodes)),
        low=computes_low(whole),
    )


def _looked_at(n: fx.Node) -> fx.Node:
    while str(n.target) in _VIEWS:
        n = n.all_input_nodes[0]
    return n


def _inputs(
    training: Training, form: StateLayout, state: State, hypers: Tensors, i: int, seed: int
) -> list[Tensor]:
    """The weights and what the training loss reads beside them: buffers, its hypers, a batch."""
    batch = form.batch.leaves(training.problem.batch(i, seed))
    inputs = form.inputs(state, hypers, [hypers[n] for n in form.single], batch)
    return contiguous([x.detach() for x in inputs.flat()])


def _whole(
    training: Training, form: StateLayout, state: State, one: list[Tensor], other: list[Tensor]
) -> Graph:
    """The gradient and its derivatives along a vector, undivided."""

    def joint(*flat: Tensor) -> list[Tensor]:
        inputs = form.split(flat, len(form.single))
        start, hypers = form.start(inputs, state._replace(slots={}))
        p, batch = start.p.detach().requires_grad_(), form.batch.nest(inputs.batch)
        learned = {n: hypers[n].detach().requires_grad_() for n in form.learned}
        params = training.layout.unflatten(p)
        loss, _ = training.problem.inner_loss(params, start.buffers, hypers | learned, batch)
        (g,) = torch.autograd.grad(loss, p, create_graph=True)
        return [g.detach(), *vjp([g], [p, *learned.values()], inputs.beside)]

    v = torch.ones_like(state.p)
    return traced(joint, [*one, v], [*other, v])


@dataclass(eq=False)
class ProductMachine(TracedCode):
    """The parts of a gradient and its products."""

    graph: ProductGraph

    @property
    def captures(self) -> bool:
        return False  # All that is read would be copied for every product.

    @cached_property
    def once(self) -> Run:
        return self._compiled(self.graph.once)

    @cached_property
    def across(self) -> Run:
        return self._compiled(self.graph.across)

    @cached_property
    def aside(self) -> Run:
        return self._compiled(self.graph.aside)

    def at(
        self, training: Training, state: State, values: Tensors, i: int, seed: int
    ) -> Linearized:
        """At a state, for the batch of step i."""
        graph = self.graph
        fixed = _inputs(training, graph.form, state, training.of_loss(values), i, seed)
        draws = draws_of(i, seed, state.p.device) if graph.random else nullcontext()
        with torch.no_grad(), draws:
            gradient, *kept = self.once(*fixed)
        every = [*fixed, *kept]
        return Linearized(self, gradient, contiguous([every[k] for k in graph.read]))


@dataclass(frozen=True, eq=False)
class Linearized:
    """The gradient at a state, and its derivatives along vectors."""

    machine: ProductMachine
    gradient: Tensor
    read: Sequence[Tensor]

    def product(self, v: Tensor) -> Tensor:
        """The Hessian times v."""
        with torch.no_grad():
            return self.machine.across(*self.read, v)[0]

    def mixed(self, v: Tensor) -> list[Tensor]:
        """The derivatives of <gradient, v> in the hypers learned."""
        with torch.no_grad():
            return list(self.machine.aside(*self.read, v))


def product_machine_of(
    training: Training,
    values: Tensors,
    learned: Sequence[str],
    seed: int,
    *,
    interpreted: bool,
) -> ProductMachine:
    """The machine for a training's loss, once it agrees with autograd; Refused if it does not.

    It is looked at where training begins: where it ends, gradients are rounding.
    """

    def start() -> State:
        with torch.no_grad():
            return training.begin(values, seed)

    def make_graph() -> tuple[ProductGraph, float]:
        began = time.monotonic()
        return trace_products(training, start(), values, learned, seed), time.monotonic() - began

    def make() -> ProductMachine:
        graph, seconds = build_once(training, "second graph", values, learned, make_graph)
        return ProductMachine(graph, interpreted=interpreted, seconds=seconds)

    machine = build_once(training, f"second, {interpreted=}", values, learned, make)
    with machine.unproven(["products"]) as left:
        if left and _agrees(machine, training, start(), values, learned, seed):
            machine.agreed.update(left)
    return machine


def _agrees(
    machine: ProductMachine,
    training: Training,
    state: State,
    values: Tensors,
    learned: Sequence[str],
    seed: int,
) -> bool:
    (v,) = directions([state.p])
    second = machine.at(training, state, values, 0, seed)
    found = [second.gradient, second.product(v), *second.mixed(v)]

    def by_autograd(state: State) -> list[Tensor]:
        plain = autograd_products(training, state, values, learned, [0], seed)
        return [plain.gradient(), plain.product(v), *plain.mixed(v)]

    names = ["the gradient", "a product with the Hessian", *(f"the slope of {n}" for n in learned)]
    return check_against_autograd(training, names, found, by_autograd, state, machine.graph.low)


def traced_products(
    machine: ProductMachine,
    training: Training,
    state: State,
    values: Tensors,
    steps: Sequence[int],
    seed: int,
) -> HessianProducts:
    """The same by a machine."""
    each = [machine.at(training, state, values, i, seed) for i in steps]
    if len(each) == 1:
        (only,) = each
        return HessianProducts(only.product, lambda: only.gradient, only.mixed)
    return HessianProducts(
        lambda v: _mean([x.product(v) for x in each]),
        lambda: _mean([x.gradient for x in each]),
        lambda v: list(map(_mean, zip(*(x.mixed(v) for x in each), strict=True))),
    )


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).mean(0)


def autograd_products(
    training: Training,
    state: State,
    values: Tensors,
    learned: Sequence[str],
    steps: Sequence[int],
    seed: int,
    curvature: Curvature = "hessian",
) -> HessianProducts:
    """Of the mean training loss over batches of steps."""
    p = state.p.detach().requires_grad_()
    values = values | {n: values[n].detach().requires_grad_() for n in learned}
    state = state._replace(p=p)
    product, graph = product_and_gradient(training, state, values, steps, seed, curvature)
    gradient = cache(graph)
    leaves = [values[n] for n in learned]
    return HessianProducts(
        product, lambda: gradient().detach(), lambda v: vjp([gradient()], leaves, [v])
    )


__all__ = [
    "HessianProducts",
    "ProductMachine",
    "autograd_products",
    "product_machine_of",
    "trace_products",
    "traced_products",
]
