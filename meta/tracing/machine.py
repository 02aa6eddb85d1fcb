"""The runnable parts of a traced step, each made when first asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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
class TracedCode(Verified):
    """The parts of a traced graph as code, each made when first asked for.

    interpreted: run the traced operations as they are. agreed: the parts that were seen to agree
    with autograd. remark: what is to be said of how they run, once they have been made.
    """

    interpreted: bool = field(default=False, kw_only=True)
    agreed: set[str] = field(default_factory=set, init=False)
    remark: str = field(default="", init=False)

    @property
    def how(self) -> str:
        return "traced" if self.interpreted else "compiled"

    @property
    def captures(self) -> bool:
        """Whether a part is one CUDA graph on a GPU, which may not draw random numbers."""
        raise NotImplementedError

    @contextmanager
    def unproven(self, parts: Iterable[str]) -> Iterator[list[str]]:
        """Those of the parts that have yet to agree with autograd; the machine is refused for good
        if that is raised inside.
        """
        with self.trial():
            yield [part for part in parts if part not in self.agreed]

    def _compiled(self, graph: Graph) -> Run:
        run = scripted(graph, self._note) if self.interpreted else generate(graph, self.spend)
        return captured(run) if self.captures else run

    def _note(self, why: str) -> None:
        self.remark = f", some of it as Python: {why}"


@dataclass(eq=False)
class Machine(TracedCode):
    """The parts of a training's step."""

    graph: StepGraph

    @property
    def captures(self) -> bool:
        return not self.graph.random

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


M = TypeVar("M")


def build_once(
    training: Training, kind: str, values: Tensors, learned: Sequence[str], make: Callable[[], M]
) -> M:
    """What make() returns, made once per problem, rule and set of learned hypers.

    Steps, schedules, values and seeds play no part in it. Raises Refused if it cannot be.
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
        return Machine(graph, interpreted=interpreted, seconds=seconds)

    return build_once(training, f"reverse, {interpreted=}", values, learned, make)
