"""The one inner loop: a training run as a pure function of its hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...inner.core.flat import flat_readout, flat_step, flat_step_, initial_slots
from ...inner.core.hyper import Granularity, Hyper, Tensors
from ...inner.core.layout import Layout
from ...inner.core.messages import unknown
from ...inner.core.rule import Rule
from ...inner.schedules.schedule import Schedule, constant
from ..problems.data import Split
from ..problems.problem import Problem, draws_of, loss_at

Loss = Callable[[Tensor], tuple[Tensor, tuple[Tensor, Tensors]]]
Gradient = Callable[[Loss, Tensor], tuple[Tensor, tuple[Tensor, Tensors]]]
_CHECK_EVERY = 50


class State(NamedTuple):
    """All that training carries from one step to the next."""

    p: Tensor
    slots: Tensors
    buffers: Tensors


@dataclass(frozen=True)
class Resolved:
    """The hyperparameters in force: per step (first dimension time) and constant ones."""

    varying: Tensors
    constant: Tensors

    def at(self, step: int) -> Tensors:
        return {name: table[step] for name, table in self.varying.items()} | self.constant

    def over(self, name: str, steps: int) -> Tensor:
        """A value at each of the steps, the first dimension time."""
        if name in self.varying:
            return self.varying[name]
        return self.constant[name].expand(steps, *self.constant[name].shape)

    def detach(self) -> Resolved:
        return Resolved(
            {name: table.detach() for name, table in self.varying.items()},
            {name: value.detach() for name, value in self.constant.items()},
        )


@dataclass(frozen=True)
class Training:
    """`steps` updates of a problem's parameters by a rule.

    schedules: by hyperparameter of the rule or of the loss; its knobs replace it, as "lr.knots".
    granularity: "tensor" or "element" for one value per parameter tensor or weight. values: those
    other than the defaults, by hyperparameter or knob; one for a scheduled hyper stands for its
    peak or for all its knobs.
    """

    problem: Problem
    rule: Rule
    steps: int
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    granularity: Mapping[str, Granularity] = field(default_factory=dict)
    values: Mapping[str, float | Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.steps, Integral):
            raise ValueError(f"steps={self.steps!r} is not a whole number; give an int")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} trains nothing; give at least 1")
        clash = sorted(set(self.rule.hypers) & set(self.problem.hypers))
        if clash:
            raise ValueError(
                f"{', '.join(clash)} is a hyperparameter of {self.rule.name} and of the loss of "
                f"{self.problem.name}; rename the loss's"
            )
        for where in (self.schedules, self.granularity):
            for name in where:
                if name not in self.declared:
                    raise ValueError(unknown(f"{self.label} has no hyper", name, self.declared))
        for name, value in self.values.items():
            if name not in self.hypers and name not in self.declared:
                raise ValueError(unknown(f"{self.label} has no hyper", name, self.hypers))
            hyper = self.hypers.get(name) or self.declared[name]
            hyper.check(name, value)
            shape = torch.as_tensor(value).shape
            if shape and shape != hyper.shape:
                raise ValueError(
                    f"{name} is given {tuple(shape)} values and has {hyper.shape or 'one'}; give "
                    "one number or as many as its schedule and granularity make"
                )

    @property
    def label(self) -> str:
        return f"{self.rule.name} on {self.problem.name}"

    @cached_property
    def layout(self) -> Layout:
        """The model's parameter tensors, the same for every seed."""
        return Layout.of(self.problem.start(0)[0])

    @cached_property
    def declared(self) -> dict[str, Hyper]:
        """The hypers of rule and loss in their granularity, before schedules."""
        shapes: dict[str, Callable[[], tuple[int, ...]]] = {
            "shared": lambda: (),
            "tensor": lambda: (len(self.layout.names),),
            "element": lambda: (sum(self.layout.sizes),),
        }
        declared = {**self.rule.hypers, **self.problem.hypers}
        for name, granularity in self.granularity.items():
            if name in declared:
                if granularity not in shapes:
                    raise ValueError(unknown(f"{name} has no granularity", granularity, shapes))
                order = list(shapes)
                if order.index(granularity) > order.index(declared[name].finest):
                    raise ValueError(
                        f"{name}={granularity} is too fine: {self.rule.name} has at most one "
                        f"{name} per {declared[name].finest}"
                        if declared[name].finest != "shared"
                        else f"{name} is one number for the whole model in {self.rule.name}"
                    )
                declared[name] = declared[name].shaped(*shapes[granularity]())
        return declared

    @cached_property
    def _knobs(self) -> dict[str, dict[str, Hyper]]:
        """For each hyper of rule and loss, its schedule's knobs by suffix."""
        return {
            name: self._schedule(name).knobs(hyper, self.steps)
            for name, hyper in self.declared.items()
        }

    @cached_property
    def hypers(self) -> dict[str, Hyper]:
        """Every hyperparameter of this training by its full name, such as "beta1", "lr.knots"."""
        return {
            _full(name, suffix): knob
            for name, knobs in self._knobs.items()
            for suffix, knob in knobs.items()
        }

    def rough(self) -> dict[str, str]:
        """The hypers whose derivative says little of their effect, by full name, and why."""
        of_rule = self.rule.rough()
        found = {}
        for name, hyper in self.hypers.items():
            base = name.partition(".")[0]
            declared = self.rule.hypers.get(base)
            lifted = declared and declared.rough == hyper.rough and base not in of_rule
            if hyper.rough and not lifted:
                found[name] = hyper.rough
        return found

    def expand(self, names: Iterable[str]) -> list[str]:
        """Full names from names of hypers: "lr" stands for all knobs of its schedule."""
        full: list[str] = []
        for name in names:
            if name in self._knobs:
                full += [_full(name, suffix) for suffix in self._knobs[name]]
            elif name in self.hypers:
                full.append(name)
            else:
                known = sorted({*self._knobs, *self.hypers})
                raise ValueError(unknown(f"{self.label} has no hyper", name, known))
        return list(dict.fromkeys(full))

    def levels(self, name: str) -> list[str]:
        """Full names of what holds values of a hyper itself: of its schedule's knobs, or it."""
        return [_full(name, suffix) for suffix in self._schedule(name).levels]

    def defaults(self) -> Tensors:
        """The values in force where nothing is learned: given ones, then declared defaults."""
        return {name: self._given(name, learned=False) for name in self.hypers}

    def start(self, learn: Iterable[str]) -> Tensors:
        """Where tuning of the hypers in learn begins, by full name, each in its dtype."""
        start = {name: self._given(name, learned=True) for name in self.expand(learn)}
        for name, value in start.items():
            self.hypers[name].check_start(name, value)
        self.complain(start)
        return start

    def complain(self, point: Tensors) -> None:
        """Raise ValueError if the rule's values at a point contradict its options."""
        self.rule.complain(self._of_rule(self.resolve(point).at(0)))

    def _given(self, name: str, *, learned: bool) -> Tensor:
        hyper, (base, _, suffix) = self.hypers[name], name.partition(".")
        level = suffix in self._schedule(base).levels
        value = self.values.get(name, self.values.get(base) if level else None)
        if value is not None:
            return torch.as_tensor(value, dtype=hyper.dtype).expand(hyper.shape).clone()
        if learned:
            return hyper.starting_value(self._sizes(base) if level else torch.tensor(1.0))
        return torch.full(hyper.shape, hyper.default, dtype=hyper.dtype)

    def _schedule(self, name: str) -> Schedule:
        return self.schedules.get(name) or constant()

    def _sizes(self, base: str) -> Tensor:
        """The numel of the tensors each value of a hyper acts on, in the hyper's granularity."""
        sizes = torch.tensor(self.layout.sizes, dtype=torch.float64)
        granularity = self.granularity.get(base, "shared")
        if granularity == "shared":
            return sizes.log().mean().exp()
        return sizes if granularity == "tensor" else sizes.repeat_interleave(sizes.long())

    def resolve(self, point: Tensors) -> Resolved:
        """What is in force at every step at a point (learned values by full name)."""
        given = {n: self._given(n, learned=False) for n in self.hypers if n not in point}
        full = given | point
        varying, fixed = {}, {}
        for name, knobs in self._knobs.items():
            if name in self.schedules:
                values = {suffix: full[_full(name, suffix)] for suffix in knobs}
                varying[name] = self.schedules[name].table(self.steps, values, self.declared[name])
            else:
                fixed[name] = full[name]
        return Resolved(varying, fixed)

    def begin(self, values: Tensors, seed: int) -> State:
        """The state before the first step; differentiable in the values that fill slots."""
        params, buffers = self.problem.start(seed)
        p = self.layout.flatten(params)
        return State(p, self.slots(p, values), buffers)

    def slots(self, p: Tensor, values: Tensors) -> Tensors:
        """The slots before the first step."""
        return initial_slots(self.rule, self.layout, p, self._of_rule(values))

    def step(
        self,
        state: State,
        values: Tensors,
        i: int,
        seed: int,
        *,
        graph: bool = False,
        overwrite: bool = False,
    ) -> State:
        """Step i. With graph, the result is differentiable in state and values, and state.p must
        require grad; without, nothing is tracked, and with overwrite the tensors of state may be
        those of the result.
        """
        t = torch.tensor(float(i + 1), dtype=torch.float64)
        batch = self.problem.batch(i, seed)
        with draws_of(i, seed, state.p.device):
            if graph:
                return self.step_on(state, values, t, batch)
            p = state.p.detach().requires_grad_()
            after = self.step_on(
                state._replace(p=p), values, t, batch, graph=False, overwrite=overwrite
            )
        # What the step did not touch stays the same object: Replay takes it for a constant.
        same = state.buffers
        buffers = {n: b if b is same.get(n) else b.detach() for n, b in after.buffers.items()}
        return State(after.p.detach(), after.slots, buffers)

    def step_on(
        self,
        state: State,
        values: Tensors,
        t: Tensor,
        batch: Any,
        *,
        graph: bool = True,
        gradient: Gradient | None = None,
        overwrite: bool = False,
    ) -> State:
        """The step after t - 1 others on a batch at hand; random draws are torch's global ones.

        gradient(loss, p): the gradient of loss in p, and what else loss returns; by autograd,
        through the graph that p is in, if not given.
        """

        def loss(p: Tensor) -> tuple[Tensor, tuple[Tensor, Tensors]]:
            params = self.layout.unflatten(p)
            value, buffers = self.problem.inner_loss(
                params, state.buffers, self.of_loss(values), batch
            )
            return value, (value, buffers)

        if gradient:
            g, (value, buffers) = gradient(loss, state.p)
        else:
            with torch.enable_grad():
                value, (_, buffers) = loss(state.p)
                (g,) = torch.autograd.grad(value, state.p, create_graph=graph)
        with torch.set_grad_enabled(graph):
            value = value if graph or gradient else value.detach()
            return self.apply(state, g, values, t, buffers, loss=value, overwrite=overwrite)

    def apply(
        self,
        state: State,
        g: Tensor,
        values: Tensors,
        t: Tensor,
        buffers: Tensors,
        *,
        loss: Tensor | None = None,
        overwrite: bool = False,
    ) -> State:
        """What the rule makes of a gradient, and of the loss it is of, after t - 1 other steps."""
        step = flat_step_ if overwrite and _apart(state, buffers) else flat_step
        hypers = self._of_rule(values)
        p, slots = step(self.rule, self.layout, state.p, g, state.slots, t, hypers, loss=loss)
        return State(p, slots, buffers)

    def of_loss(self, values: Tensors) -> Tensors:
        """The values that the training loss is a function of."""
        return {name: values[name] for name in self.problem.hypers}

    def _of_rule(self, values: Tensors) -> Tensors:
        return {name: values[name] for name in self.rule.hypers}

    def run(
        self,
        resolved: Resolved,
        seed: int,
        watch: Callable[[int, State], object] | None = None,
        *,
        start: State | None = None,
        overwrite: bool = False,
        done: int = 0,
        advance: Callable[[int, State], State] | None = None,
    ) -> State | None:
        """Train without a graph. watch sees every state, the first as (0, …). None: diverged,
        that is, the weights were not finite at the end, or when something raised because of it.

        start: go on from this state, reached after `done` steps, instead of from fresh weights;
        with overwrite its tensors may be those of the result.
        advance: does a step in another way than `step` without a graph would.
        """
        state = start
        if state is None:
            with torch.no_grad():
                state = self.begin(resolved.at(0), seed)
        overwrite = overwrite and watch is None  # Who watches may keep what it sees.
        try:
            for i in range(self.steps):
                if watch:
                    watch(i, state)
                if advance:
                    state = advance(i, state)
                else:
                    state = self.step(state, resolved.at(i), done + i, seed, overwrite=overwrite)
                    overwrite = watch is None  # From here on states are its own.
                if i % _CHECK_EVERY == _CHECK_EVERY - 1 and not finite(state):
                    return None
            if watch:
                watch(self.steps, state)
        except Exception:  # A model may refuse NaN in any way it likes.
            if finite(state):
                raise
            return None
        return state if finite(state) else None

    def inner_loss(
        self, state: State, values: Tensors, i: int, seed: int
    ) -> tuple[Tensor, Tensors]:
        """The training loss of a state at step i, and the buffers after it."""
        params = self.layout.unflatten(state.p)
        return loss_at(self.problem, params, state.buffers, self.of_loss(values), i, seed)

    def params(self, state: State, values: Tensors) -> Tensors:
        """The weights to use: those the rule reads out of a state, mostly its p."""
        hypers = self._of_rule(values)
        p = flat_readout(self.rule, self.layout, state.p, state.slots, hypers)
        return self.layout.unflatten(p)

    def outer_loss(self, state: State, values: Tensors) -> Tensor:
        """The held-out loss of a state, with a graph to whatever requires grad."""
        params = self.params(state, values)
        return self.problem.outer_loss(params, state.buffers, self.of_loss(values))

    def outer_loss_at(self, p: Tensor, state: State, values: Tensors) -> Tensor:
        """The held-out loss of other weights than a state's."""
        params = self.layout.unflatten(p)
        return self.problem.outer_loss(params, state.buffers, self.of_loss(values))

    def measure(self, state: State, values: Tensors, split: Split) -> dict[str, float]:
        return self.problem.measure(self.params(state, values), state.buffers, split)

    def curve(self, point: Tensors, seed: int, points: int = 25) -> list[tuple[int, float]]:
        """(step, held-out loss) along training at a point, about `points` of them."""
        every = max(1, self.steps // points)
        marks: list[tuple[int, float]] = []
        resolved = self.resolve(point)

        def watch(i: int, state: State) -> None:
            if i % every == 0 or i == self.steps:
                values = resolved.at(min(i, self.steps - 1))
                marks.append((i, self.measure(state, values, "valid")["loss"]))

        self.run(resolved, seed, watch)
        return marks


def _apart(state: State, buffers: Tensors) -> bool:
    """Whether weights and slots share their memory with nothing: a slot or a buffer may be the
    weights.
    """
    written = [x.untyped_storage().data_ptr() for x in (state.p, *state.slots.values())]
    kept = {x.untyped_storage().data_ptr() for x in buffers.values()}
    return len({*written}) == len(written) and kept.isdisjoint(written)


def finite(state: State) -> bool:
    """Whether every weight is a number."""
    return bool(state.p.isfinite().all())


def _full(name: str, suffix: str) -> str:
    return f"{name}.{suffix}" if suffix else name
