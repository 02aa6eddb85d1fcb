"""Compiled steps: a traced step run by generated code, trusted once it has agreed with autograd."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch._inductor
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..inner.flat import Layout
from ..inner.hyper import Tensors
from .graph import StepGraph, Uneven, trace
from .kept import kept_for
from .parts import CannotTrace, Graph, contiguous, first_line
from .problem import Problem, draws_of
from .script import scripted
from .steps import Cotangents, Eager
from .training import Resolved, State, Training

# Inductor on CPU lays convolutions out anew and then returns wrong derivatives where weights are
# slices of one vector; and its own random numbers are not the ones that an eager step draws.
OPTIONS: dict[str, Any] = {"layout_optimization": False, "fallback_random": True}
# How far a compiled vector may be from autograd's: units of its norm in the last place, and times
# what one such unit in the weights changes in it.
_UNITS, _SPREADS = 1e3, 50.0

Run = Callable[..., Sequence[Tensor]]


class Distrusted(Exception):
    """Why a compiled step is not used: it cannot be made, or it differs from autograd's."""


@dataclass(eq=False)
class Machine:
    """The compiled parts of one step, each made when first asked for.

    interpreted: run the traced operations as they are. agreed: the parts that were seen to agree
    with autograd. refused: how one did not. seconds: spent on making them, tracing included.
    """

    graph: StepGraph
    interpreted: bool = False
    agreed: set[str] = field(default_factory=set)
    refused: str = ""
    seconds: float = 0.0

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
        try:
            return self.graph.halves()
        except CannotTrace as why:
            self.refused = f"it cannot be compiled: {why}"
            raise Distrusted(self.refused) from why

    @property
    def how(self) -> str:
        return "traced" if self.interpreted else "compiled"

    def _compiled(self, graph: Graph) -> Run:
        if self.interpreted:
            return scripted(graph)
        run = generate(graph, self._spend)

        def or_refuse(*inputs: Tensor) -> Sequence[Tensor]:
            try:
                return run(*inputs)
            except Distrusted as why:
                self.refused = str(why)
                raise

        return or_refuse

    def _spend(self, seconds: float) -> None:
        self.seconds += seconds


@contextmanager
def _quietly() -> Iterator[None]:
    """What torch warns of inside itself is nothing a user could change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def generate(graph: Graph, spent: Callable[[float], None] = lambda seconds: None) -> Run:
    """Generated code for a graph, made at its first call; Distrusted if that fails.

    By inductor itself, which torch.compile would reach through dynamo: the graph is traced already,
    with fixed shapes, and dynamo would look at every Python frame that runs while it does. Inputs
    must be contiguous, as they were at the first call.
    """
    made: list[Run] = []

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        if not made:
            began = time.monotonic()
            try:
                # Inductor looks on disk only for what was traced in a context such as dynamo's.
                shapes = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
                with torch.no_grad(), tracing(TracingContext(shapes)), _quietly():
                    made.append(torch._inductor.compile(graph, list(inputs), options=OPTIONS))
                with torch.no_grad():
                    return made[0](*inputs)
            except Exception as error:  # Any part of the compiler may refuse a model.
                made.clear()
                raise Distrusted(f"it cannot be compiled: {first_line(error)}") from error
            finally:
                spent(time.monotonic() - began)
        return made[0](*inputs)

    return run


M = TypeVar("M")


def made_once(
    training: Training, kind: str, values: Tensors, learned: Sequence[str], make: Callable[[], M]
) -> M:
    """What make() returns, made once per problem, rule and set of learned hypers.

    Steps, schedules, values and seeds play no part in it. Raises Distrusted if it cannot be.
    """
    rule = training.rule
    shapes = tuple((name, value.shape) for name, value in values.items())
    key = (kind, rule.update, tuple(rule.options().items()), shapes, tuple(learned))
    made = kept_for(training.problem)
    if key not in made:
        try:
            made[key] = make()
        except CannotTrace as why:
            made[key] = why
    found = made[key]
    if isinstance(found, CannotTrace):
        raise Distrusted(f"{training.label} cannot be compiled: {found}")
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
        graph, seconds = made_once(training, "graph", values, learned, make_graph)
        return Machine(graph, interpreted, seconds=seconds)

    machine = made_once(training, f"reverse, {interpreted=}", values, learned, make)
    if machine.refused:
        raise Distrusted(machine.refused)
    return machine


class Compiled:
    """Steps by a machine, the same State outside, flat lists of tensors inside.

    The first of each kind is checked against autograd; Distrusted is raised if they differ.
    """

    def __init__(
        self,
        machine: Machine,
        training: Training,
        plain: Resolved,
        seed: int,
        sums: Cotangents,
        fixed: Tensors,
    ) -> None:
        self._machine, self._training, self._plain, self._seed = machine, training, plain, seed
        self._sums, self._fixed, self._form = sums, fixed, machine.graph.form
        form, steps = self._form, training.steps
        t = torch.arange(1, steps + 1, dtype=torch.float64)
        self._numbers = [plain.over(n, steps) for n in form.single] + [t]
        device = machine.graph.examples[0].device
        self._rows = machine.graph.before.over(self._numbers, device)
        width = machine.graph.numbers_back
        self._back = torch.full((steps, width), float("nan"), dtype=torch.float64, device=device)
        self._several = [n for n in form.learned if n in form.several]
        self._watched: dict[int, State] = {}
        self._pulled = steps  # The earliest step that was pulled back.
        self._seconds = machine.seconds if machine.agreed else 0.0

    def graph_bytes(self, start: State) -> float:
        return self._machine.graph_bytes

    @property
    def seconds(self) -> float:
        """Spent on making the parts that this run was the first to use; 0 if there were none."""
        return 0.0 if self._machine.interpreted else self._machine.seconds - self._seconds

    def advance(self, i: int, state: State) -> State:
        with self._quiet(i):
            out = self._machine.advance(*self._inputs(i, state))
        return self._after("advance", i, state, out)

    def record(self, i: int, state: State) -> tuple[Sequence[Tensor], State]:
        with self._quiet(i):
            out = self._machine.record(*self._inputs(i, state))
        if "rewind" not in self._machine.agreed and i == self._training.steps - 1:
            self._watched[i] = state
        kept = len(self._form.moved) + len(self._form.counted)
        return out[kept:], self._after("record", i, state, out[:kept])

    def rewind(self, i: int, tape: Sequence[Tensor], adjoint: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            out = self._machine.rewind(*tape, *contiguous(adjoint))
        return self._before("rewind", i, self._watched.pop(i, None), adjoint, out)

    def pull(self, i: int, state: State, adjoint: list[Tensor]) -> list[Tensor]:
        with self._quiet(i):
            out = self._machine.pull(*self._inputs(i, state), *contiguous(adjoint))
        return self._before("pull", i, state, adjoint, out)

    def finish(self) -> tuple[Tensor, Tensors]:
        norms, numbers = self._back[:, 0], self._back[:, 1:].cpu()
        numbers[: self._pulled] = 0  # Earlier steps have no share.
        return norms, self._machine.graph.numbers_behind(self._numbers, numbers)

    def _inputs(self, i: int, state: State) -> list[Tensor]:
        form = self._form
        values = self._plain.at(i) if form.several else {}
        return contiguous(
            [
                *form.moving(state),
                *form.rest(state),
                *(values[n] for n in form.several),
                *(row[i] for row in self._rows),
                *form.leaves(self._training.problem.batch(i, self._seed)),
            ]
        )

    @contextmanager
    def _quiet(self, i: int) -> Iterator[None]:
        draws: AbstractContextManager[None] = nullcontext()
        if self._machine.graph.random:
            draws = draws_of(i, self._seed, self._back.device)
        with torch.no_grad(), draws:
            yield

    def _after(self, part: str, i: int, state: State, out: Sequence[Tensor]) -> State:
        form = self._form
        after = form.state(out[: len(form.moved)], out[len(form.moved) :], state)
        if part not in self._machine.agreed:

            def replaced(state: State) -> list[Tensor]:
                return [*form.moving(state), *(state.buffers[n] for n in form.counted)]

            def step(state: State) -> list[Tensor]:
                values = self._plain.at(i)
                return replaced(self._training.step(state, values, i, self._seed))

            names = [f"{kind} {name}".strip() for kind, name in form.moved]
            names += [f"buffers {name}" for name in form.counted]
            self._check(part, names, replaced(after), step, state)
        return after

    def _before(
        self, part: str, i: int, state: State | None, adjoint: list[Tensor], out: Sequence[Tensor]
    ) -> list[Tensor]:
        many = len(self._form.moved)
        self._back[i], self._pulled = out[-1], i
        self._sums.add(i, out[many:-1], self._several)
        if part not in self._machine.agreed and state is not None:

            def pull(state: State) -> list[Tensor]:
                sums = self._sums.empty()
                eager = Eager(self._training, self._plain, self._seed, sums, self._fixed)
                return [*eager.pull(i, state, adjoint), *(sums.at(n, i) for n in hypers)]

            numbers = [n[i : i + 1] for n in self._numbers]
            back = self._machine.graph.numbers_behind(numbers, self._back[i : i + 1, 1:].cpu())
            hypers = [*back, *self._several]
            # Buffers of the start are constants for autograd.
            moved = [at for at in self._form.moved if i or at[0] != "buffers"]
            names = [f"the adjoint of {kind} {name}".strip() for kind, name in moved]
            names += [f"the cotangent of {name}" for name in hypers]
            found = [*out[: len(moved)], *(x[0] for x in back.values()), *out[many:-1]]
            self._check(part, names, found, pull, state)
        return list(out[:many])

    def _check(
        self,
        part: str,
        names: list[str],
        found: list[Tensor],
        by_autograd: Callable[[State], list[Tensor]],
        state: State,
    ) -> None:
        machine = self._machine
        try:
            if check(self._training, names, found, by_autograd, state, machine.graph.low):
                machine.agreed.add(part)
        except Distrusted as why:
            machine.refused = str(why)
            raise


def check(
    training: Training,
    names: list[str],
    found: Sequence[Tensor],
    by_autograd: Callable[[State], list[Tensor]],
    state: State,
    low: bool = False,
) -> bool:
    """Raise Distrusted unless compiled results are as near to autograd's as rounding lets them be.

    False if there was nothing to compare, because autograd's are not finite: divergence is not
    the compiler's fault.

    What rounding does is seen by the same once more from weights that are rounded otherwise: some
    numbers are noise through and through, such as the gradient of a bias that batch norm takes
    off again. So flat vectors are compared by parameter tensor. low: whether some of the step is
    computed in bfloat16.
    """
    unit = torch.finfo(torch.bfloat16 if low else state.p.dtype).eps
    draw = torch.Generator(state.p.device).manual_seed(0)
    noise = torch.randn(state.p.shape, generator=draw, device=state.p.device)
    expected = by_autograd(state)
    nudged = by_autograd(state._replace(p=state.p * (1 + unit * noise.to(state.p))))
    compared = True
    for name, x, y, near in zip(names, found, expected, nudged, strict=True):
        whole = float(y.double().norm())
        if not whole < float("inf"):
            compared = False
            continue
        differences = near - y, x.to(y.device) - y
        for part, *each in _by_tensor(training.layout, y, *differences):
            size, spread, error = (float(z.double().norm()) for z in each)
            # One unit of the whole beside its own: a part may be 0 but for rounding.
            if not error <= unit * (_UNITS * size + whole) + _SPREADS * spread:
                raise Distrusted(
                    f"the compiled step of {training.label} is wrong: {name} differs from "
                    f"autograd's{part} by {error / max(size, 1e-300):.1e} of its norm"
                )
    return compared


def _by_tensor(layout: Layout, *vectors: Tensor) -> Iterator[tuple[str, *tuple[Tensor, ...]]]:
    """(" at its name", its part of every vector) for each parameter tensor; one part without a name
    where they are no flat vectors of parameters.
    """
    if vectors[0].shape[-1:] != (sum(layout.sizes),):
        yield "", *vectors
        return
    parts = [x.split(layout.sizes, -1) for x in vectors]
    for name, *each in zip(layout.names, *parts, strict=True):
        yield f" at {name}", *each


def or_by_autograd(problem: Problem, compile: object, attempt: Callable[[str], M]) -> M:
    """attempt(""), which may use compiled steps; if they are refused, attempt(why) from the start:
    nothing that they have summed up may stay.
    """
    kept = kept_for(problem)
    try:
        # Batches of several shapes are found late, when much of a training is done; once is enough.
        return attempt(kept.get("uneven", "") if compile == "auto" else "")
    except (Distrusted, Uneven) as why:
        refused = str(why)
        if isinstance(why, Uneven):
            if compile != "auto":
                raise
            kept["uneven"] = refused
    # Behind the exception, which held all states.
    if compile is True:
        warnings.warn(f"{refused}; its steps are done by autograd", stacklevel=3)
    return attempt(refused)
