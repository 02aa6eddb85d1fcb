"""One training and one hypergradient, for users who bring their own loop around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..inner.hyper import Tensors
from ..inner.rule import Rule, unknown
from ..inner.rules import find_rule
from ..inner.schedule import Schedule, find_schedule
from .bamm import BAMM
from .bda import BDA
from .checkpoint import revolve_steps
from .data import Split
from .estimate import Estimate, Estimator
from .evolution import ES, PES
from .fixed_point import FixedPoint, OnePass
from .forward import Forward
from .implicit import Implicit
from .linear import dense, neumann, normal_conjugate_gradient, nystrom
from .meha import MEHA
from .memory import comfortable, state_bytes
from .outcome import Outcome
from .penalty import Penalty
from .population import Population
from .problem import Problem
from .replay import Replay
from .sama import SAMA
from .training import Grain, Training

METHODS: dict[str, Callable[[], Estimator]] = {
    "replay": Replay,
    "truncated": partial(Replay, window=10),
    "forward": Forward,
    "population": Population,
    "implicit": Implicit,
    "gauss-newton": partial(Implicit, curvature="gauss-newton"),
    "normal-equations": partial(Implicit, solve=normal_conjugate_gradient()),
    "neumann": partial(Implicit, solve=neumann()),
    "nystrom": partial(Implicit, solve=nystrom(), tolerance=math.inf),
    "dense": partial(Implicit, solve=dense()),
    "identity": partial(Implicit, solve=neumann(1.0, steps=0), tolerance=math.inf),
    "fixed-point": FixedPoint,
    "one-pass": OnePass,
    "sama": SAMA,
    "bda": BDA,
    "f2sa": Penalty,
    "v-pbgd": partial(Penalty, 0.0, growth=0.1, limit=10.0, warm_start=True),
    "bamm": BAMM,
    "meha": MEHA,
    "es": ES,
    "guided-es": partial(ES, guide=Replay(window=10)),
    "pes": PES,
    "es-single": partial(PES, kind="single"),
}


# A pullback, and a step of one number's tangents, in plain steps; see BENCHMARKS.md.
REPLAY_STEPS, FORWARD_STEPS = 2.0, 0.7


@dataclass(frozen=True)
class Trained:
    """params, buffers: what training ended with, by name. measures: of each held-out split."""

    params: Tensors
    buffers: Tensors
    measures: dict[Split, dict[str, float]]


def make_training(
    problem: Problem,
    rule: str | Rule,
    steps: int,
    schedules: Mapping[str, str | Schedule] | None,
    grains: Mapping[str, Grain] | None,
    given: Mapping[str, float | Tensor] | None,
) -> Training:
    """A Training from names and specs, as every public function takes them."""
    found = {name: find_schedule(spec) for name, spec in (schedules or {}).items()}
    return Training(problem, find_rule(rule), steps, found, dict(grains or {}), dict(given or {}))


def split_names(learn: str | Iterable[str]) -> tuple[str, ...]:
    """("lr", "beta1") from "lr,beta1" or from any iterable of names."""
    if isinstance(learn, str):
        return tuple(name for part in learn.split(",") if (name := part.strip()))
    return tuple(learn)


def hypergradient(
    problem: Problem,
    rule: str | Rule = "adamw",
    *,
    learn: str | Iterable[str] = ("lr",),
    steps: int = 200,
    schedules: Mapping[str, str | Schedule] | None = None,
    grains: Mapping[str, Grain] | None = None,
    given: Mapping[str, float | Tensor] | None = None,
    seed: int = 0,
    method: str | Estimator = "auto",
) -> Estimate:
    """The held-out loss after training and its derivative in every hyper of learn.

    given: the values to differentiate at, where not the starting ones. method: "replay" and
    "forward" are exact for the training as it is, in every hyper, and "auto" is the cheaper of the
    two for this many hypers, steps and bytes of memory; "population" is their mean over several
    seeds; "implicit" is the limit of training to the end, in hypers of the loss only. Or an
    estimator with options of its own, such as Replay(memory="4GiB"). note.how says what was done.
    The derivatives are in the values, not in their logarithms.
    """
    training = make_training(problem, rule, steps, schedules, grains, given)
    names = split_names(learn)
    if not names:
        raise ValueError(
            f"learn names no hyper to differentiate in; known: {', '.join(training.hypers)}"
        )
    point = training.start(names)
    if method == "auto":
        return _cheaper(training, point, seed)
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(unknown("there is no method", method, [*METHODS, "auto"]))
        method = METHODS[method]()
    estimate, _ = method(training, point, None, seed=seed)
    return estimate


def _cheaper(training: Training, point: Tensors, seed: int) -> Estimate:
    method, reason = choose_method(training, point)
    estimate, _ = method(training, point, None, seed=seed)
    if estimate.note.outcome is Outcome.NOT_DIFFERENTIABLE and isinstance(method, Forward):
        reason = estimate.note.reason
        estimate, _ = Replay()(training, point, None, seed=seed)
    return replace(estimate, note=replace(estimate.note, how=f"{estimate.note.how} ({reason})"))


def choose_method(
    training: Training, point: Tensors, memory: int | None = None
) -> tuple[Replay | Forward, str]:
    """(the cheaper exact method at a point, why). memory: bytes for the states of a replay."""
    columns = sum(value.numel() for value in point.values())
    with torch.no_grad():
        state = training.begin(training.resolve(point).at(0), 0)
    room = comfortable(state.p.device) if memory is None else memory
    slots = max(1, room // max(state_bytes(state), 1))
    if slots >= training.steps:
        return Replay(memory), f"all {training.steps} states fit"
    if low := getattr(training.problem, "autocast", None):
        return Replay(memory), f"forward mode does not go through autocast={low}"
    sweeps = revolve_steps(training.steps, slots) / training.steps
    said = f"{columns} numbers at once cost {{}} than {sweeps:.1f} sweeps, {slots} states fit"
    if 1 + FORWARD_STEPS * columns < sweeps + REPLAY_STEPS:
        return Forward(), said.format("less")
    return Replay(memory), said.format("more")


def train(
    problem: Problem,
    rule: str | Rule = "adamw",
    *,
    steps: int = 200,
    schedules: Mapping[str, str | Schedule] | None = None,
    grains: Mapping[str, Grain] | None = None,
    given: Mapping[str, float | Tensor] | None = None,
    seed: int = 0,
) -> Trained | None:
    """Train once with given values; None if the weights stopped being finite."""
    training = make_training(problem, rule, steps, schedules, grains, given)
    state = training.run(training.resolve({}), seed)
    if state is None:
        return None
    measures = {split: training.measure(state, split) for split in problem.splits}
    return Trained(training.layout.unflatten(state.p), state.buffers, measures)
