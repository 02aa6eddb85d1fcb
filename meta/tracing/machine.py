"""The runnable parts of a traced step, each made when first asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from ...inner.core.hyper import Tensors
from ...inner.fx_graph import CannotTrace, Graph
from ...inner.torch_internals import Refused, Run
from ..training.cache import cache_of
from ..training.state import State
from ..training.training import Training
from .codegen import generate
from .cuda_graph import captured
from .step_graph import StepGraph, trace
from .torchscript import scripted
from .verify import Verified


@dataclass(eq=False)
class Machine(Verified):
    """The compiled parts of one step, each made when first asked for.

    interpreted: run the traced operations as they are. agreed: the parts that were seen to agree
    with autograd.
    """

    graph: StepGraph
    interpreted: bool = False
    agreed: set[str] = field(default_factory=set)

    @cached_property
    def advance(self) -> Run:
        return self._compiled(self.graph.advance())

    @cached_property
    def pull(self) -> Run:
        return self._compiled(self.graph.pull())

    @cached_property
    def record(self) -> Run:
        return self._compiled(self._halves[0])

    @cached_property
    def rewind(self) -> Run:
        return self._compiled(self._halves[1])

    @property
    def graph_bytes(self) -> int:
        """What `record` keeps per step."""
        return self._halves[2]

    @cached_property
    def _halves(self) -> tuple[Graph, Graph, int]:
        with self.trial():
            try:
                return self.graph.halves()
            except CannotTrace as why:
                raise Refused(f"it cannot be compiled: {why}") from why

    @property
    def how(self) -> str:
        return "traced" if self.interpreted else "compiled"

    def _compiled(self, graph: Graph) -> Run:
        run = scripted(graph) if self.interpreted else generate(graph, self.spend)
        return run if self.graph.random else captured(run)


M = TypeVar("M")


def build_once(
    training: Training, kind: str, values: Tensors, learned: Sequence[str], make: Callable[[], M]
) -> M:
    """What make() returns, made once per problem, rule and set of learned hypers.

    Steps, schedules, values and seeds play no part in it. Raises Distrusted if it cannot be.
    """
    rule = training.rule
    shapes = tuple((name, value.shape, value.dtype) for name, value in values.items())
    key = (kind, rule.update, tuple(rule.options().items()), shapes, tuple(learned))
    made = cache_of(training.problem)
    if key not in made:
        try:
            made[key] = make()
        except CannotTrace as why:
            # Another one, without the frames of that, which hold the problem.
            made[key] = CannotTrace(str(why))
    found = made[key]
    if isinstance(found, CannotTrace):
        raise Refused(f"{training.label} cannot be compiled: {found}")
    return found  # type: ignore[no-any-return]  # of the kind that make returned


def machine_of(
    training: Training,
    state: State,
    values: Tensors,
    learned: Sequence[str],
    seed: int,
    *,
    interpreted: bool = False,
) -> Machine:
    """The machine for a training's steps."""

    def make_graph() -> tuple[StepGraph, float]:
        began = time.monotonic()
        return trace(training, state, values, learned, seed), time.monotonic() - began

    def make() -> Machine:
        graph, seconds = build_once(training, "graph", values, learned, make_graph)
        return Machine(graph, interpreted, seconds=seconds)

    return build_once(training, f"reverse, {interpreted=}", values, learned, make)
