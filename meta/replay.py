"""Replayed reverse mode: the exact gradient of the held-out loss through every training step.

Training is done once, keeping every state; going backwards, one step at a time is done again with
a graph and pulled back, so that no graph is ever longer than a step. Where there is memory for it,
a step's graph is kept from the first time and need not be made again. Maclaurin, Duvenaud & Adams
2015, arXiv:1502.03492; Engstrom et al. 2025, arXiv:2503.13751.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..inner.hyper import Tensors
from .estimate import Estimate, Note, finished
from .outcome import Outcome
from .training import Resolved, State, Training


@dataclass(frozen=True)
class Replay:
    """Exact in every hyperparameter of rule, schedule and loss, for any number of them.

    memory: bytes for graphs kept from the forward pass; bit-identical with any. All kept, a
    metagradient takes about 2.7 plain trainings of time, none kept about 3.7. The states take
    another steps + 1 copies of weights, slots and buffers.
    """

    memory: int = 2**30

    def __call__(
        self, training: Training, point: Tensors, carry: None = None, *, seed: int
    ) -> tuple[Estimate, None]:
        leaves = {name: value.detach().requires_grad_() for name, value in point.items()}
        resolved = training.resolve(leaves)
        cotangents = _Cotangents(resolved)
        tape = _Tape(training, _detached(resolved), seed, cotangents.names, self.memory)
        last = training.run(tape.plain, seed, advance=tape.record)
        if last is None:
            done = len(tape.steps)
            reason = f"the weights stopped being finite by step {done}"
            return Estimate.diverged(done, reason), None
        loss, adjoint = _seed_adjoint(tape, last, cotangents)
        if adjoint is None:
            reason = f"the held-out loss of {training.problem.name} has no graph to the parameters"
            note = Note(Outcome.NOT_DIFFERENTIABLE, reason, training.steps)
            return Estimate(float(loss), {}, note), None
        graphs = sum(isinstance(step, _Taped) for step in tape.steps)
        norms = [adjoint[0].norm()]
        try:
            for i in reversed(range(training.steps)):
                adjoint = _pull_back(tape.pop(i), adjoint, i, cotangents)
                norms.append(adjoint[0].norm())
        except RuntimeError as error:
            note = Note(Outcome.NOT_DIFFERENTIABLE, _only_once(error), training.steps)
            return Estimate(float(loss), {}, note), None
        _pull_back_start(training, adjoint, tape.plain, seed, cotangents)
        note = Note(steps=training.steps, adjoint=torch.stack(norms[::-1]), graphs=graphs)
        return finished(loss, cotangents.through(resolved, leaves), note), None


@dataclass(frozen=True)
class _Taped:
    """One step with its graph: inputs are leaves, the state before it and then the hypers."""

    inputs: list[Tensor]
    outputs: list[Tensor]


@dataclass
class _Tape:
    """What the forward pass leaves for the way back: a graph or a state for each step.

    fixed: the buffers of the start. Until a step replaces one (frozen weights: never), it is a
    constant without an adjoint.
    """

    training: Training
    plain: Resolved
    seed: int
    names: list[str]
    room: float
    fixed: Tensors = field(default_factory=dict)
    steps: list[_Taped | State] = field(default_factory=list)
    _graph_bytes: float = math.inf

    def record(self, i: int, state: State) -> State:
        """Step i, kept in the form there is room for."""
        if i == 0:
            self.fixed = state.buffers
        if i == 0 and self.room > 0:
            with _saved_bytes() as saved:
                taped, after = self._with_graph(i, state)
            self._graph_bytes = sum(saved.values())
        elif self._graph_bytes > self.room:
            self.steps.append(state)
            return self.training.step(state, self.plain.at(i), i, self.seed)
        else:
            taped, after = self._with_graph(i, state)
        self.room -= self._graph_bytes
        self.steps.append(taped)
        return after

    def pop(self, i: int) -> _Taped:
        """Step i with its graph, done again if only its state was kept."""
        kept = self.steps.pop()
        return kept if isinstance(kept, _Taped) else self._with_graph(i, kept)[0]

    def _with_graph(self, i: int, state: State) -> tuple[_Taped, State]:
        values, hypers = _leaf_values(self.plain, i, self.names)
        before = _leaves(state, self.fixed)
        after = self.training.step(before, values, i, self.seed, graph=True)
        taped = _Taped([*_moved(before, self.fixed), *hypers], _moved(after, self.fixed))
        return taped, _each(after, self.fixed, Tensor.detach)


@contextmanager
def _saved_bytes() -> Iterator[dict[int, int]]:
    """The bytes of every storage that graphs made inside keep alive, by address."""
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield saved


class _Cotangents:
    """Sums d loss / d value in force, per step where scheduled, and pulls them to the knobs."""

    def __init__(self, resolved: Resolved) -> None:
        self.names = [
            name
            for name, value in (resolved.varying | resolved.constant).items()
            if value.requires_grad
        ]
        self._varying = {n: torch.zeros_like(v) for n, v in resolved.varying.items()}
        self._constant = {n: torch.zeros_like(v) for n, v in resolved.constant.items()}

    def add(self, step: int, grads: Sequence[Tensor | None]) -> None:
        for name, grad in zip(self.names, grads, strict=True):
            if grad is not None:
                if name in self._varying:
                    self._varying[name][step] += grad
                else:
                    self._constant[name] += grad

    def through(self, resolved: Resolved, leaves: Tensors) -> Tensors:
        """The gradient in the knobs."""
        outputs = resolved.varying | resolved.constant
        sums = self._varying | self._constant
        grads = torch.autograd.grad(
            [outputs[name] for name in self.names],
            list(leaves.values()),
            [sums[name] for name in self.names],
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(leaves, grads, strict=True))


def _detached(resolved: Resolved) -> Resolved:
    return Resolved(
        {name: table.detach() for name, table in resolved.varying.items()},
        {name: value.detach() for name, value in resolved.constant.items()},
    )


def _leaf_values(plain: Resolved, step: int, names: Sequence[str]) -> tuple[Tensors, list[Tensor]]:
    values = plain.at(step)
    leaves = {name: values[name].detach().requires_grad_() for name in names}
    return values | leaves, list(leaves.values())


def _each(state: State, fixed: Tensors, change: Callable[[Tensor], Tensor]) -> State:
    """A state with every tensor that can carry an adjoint changed."""

    def through(x: Tensor) -> Tensor:
        return change(x) if x.is_floating_point() else x

    buffers = {n: x if x is fixed.get(n) else through(x) for n, x in state.buffers.items()}
    return State(through(state.p), {name: through(x) for name, x in state.slots.items()}, buffers)


def _leaves(state: State, fixed: Tensors) -> State:
    return _each(state, fixed, lambda x: x.detach().requires_grad_())


def _moved(state: State, fixed: Tensors) -> list[Tensor]:
    """The tensors that can carry an adjoint, in a fixed order."""
    moved = [x for name, x in state.buffers.items() if x is not fixed.get(name)]
    return [x for x in (state.p, *state.slots.values(), *moved) if x.is_floating_point()]


def _only_once(error: RuntimeError) -> str:
    """Why a training step has no derivative; any other error is raised again."""
    op = re.search(r"derivative for '?([\w:]+)'? is not implemented", str(error))
    if not op:
        raise error
    return (
        f"a training step cannot be differentiated: torch has no derivative for {op[1]}; use "
        "another form of that operation in the model or its loss"
    )


def _seed_adjoint(
    tape: _Tape, last: State, cotangents: _Cotangents
) -> tuple[Tensor, list[Tensor] | None]:
    """The held-out loss and its gradient in the final state; None if it has no graph to it."""
    final = tape.training.steps - 1
    values, hypers = _leaf_values(tape.plain, final, cotangents.names)
    state = _leaves(last, tape.fixed)
    loss = tape.training.outer_loss(state, values)
    if not loss.requires_grad:
        return loss, None
    inputs = _moved(state, tape.fixed)
    grads = torch.autograd.grad(loss, inputs + hypers, allow_unused=True, materialize_grads=True)
    cotangents.add(final, grads[len(inputs) :])
    return loss.detach(), list(grads[: len(inputs)])


def _pull_back(
    taped: _Taped, adjoint: list[Tensor], i: int, cotangents: _Cotangents
) -> list[Tensor]:
    """d loss / d state before step i from that after it; the hypers' share goes to cotangents."""
    live = [(x, bar) for x, bar in zip(taped.outputs, adjoint, strict=True) if x.requires_grad]
    grads = torch.autograd.grad(
        [x for x, _ in live],
        taped.inputs,
        [bar for _, bar in live],
        allow_unused=True,
        materialize_grads=True,
    )
    of_state = len(taped.inputs) - len(cotangents.names)
    cotangents.add(i, grads[of_state:])
    return list(grads[:of_state])


def _pull_back_start(
    training: Training, adjoint: list[Tensor], plain: Resolved, seed: int, cotangents: _Cotangents
) -> None:
    """The share of hypers that fill a slot before the first step."""
    values, hypers = _leaf_values(plain, 0, cotangents.names)
    state = training.begin(values, seed)
    start = _moved(state, state.buffers)
    live = [(x, bar) for x, bar in zip(start, adjoint, strict=True) if x.requires_grad]
    if live:
        outputs, bars = zip(*live, strict=True)
        cotangents.add(0, torch.autograd.grad(outputs, hypers, bars, allow_unused=True))
