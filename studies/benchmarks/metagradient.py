"""The benchmark of one exact metagradient: its time, memory and error, here and by peers.

Time is the ratio to plain training of the same steps, taken in the same round. Memory is measured
in a fresh process per method. Errors are against finite differences of plain float64 trainings, in
which no line of this project's differentiation takes part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from ...inner.registry import find_rule
from ...meta.forward.forward import Forward
from ...meta.problems.module_problem import ModuleProblem
from ...meta.reverse.memory_budget import available
from ...meta.reverse.replay import Replay
from ...meta.training.estimate import Estimator
from ...meta.training.training import Training
from ..measure.device import gpu_name, synchronize
from ..measure.memory_meter import meter_of
from ..measure.timing import Grown, Say, check_repeats, interleaved, reason, run_isolated
from .metagradient_peers import PEERS, Answer, held_out_loss, train_plainly
from .workloads import SEED, Workload

# The states that the lean rows keep, at any number of steps.
_STATES = 100
# This project's routes to a metagradient, by the name they have in the tables.
OURS: dict[str, Callable[[], Estimator]] = {
    "fast": partial(Replay, compile=True, memory="4GiB"),
    "lean": partial(Replay, compile=True, graphs="recompute", checkpoints=_STATES),
    "fast, no compiler": partial(Replay, compile="trace", memory="4GiB"),
    "lean, no compiler": partial(Replay, compile="trace", graphs="recompute", checkpoints=_STATES),
    "lean, by autograd": partial(Replay, compile=False, graphs="recompute", checkpoints=_STATES),
    "forward, 4 numbers": partial(Forward, compile=True),
}
# Where a hundred states or the graphs of all steps may not fit: with what one GPU has to spare.
_ROOMY = "48GiB"
LARGE: dict[str, Callable[[], Estimator]] = {
    "fast": partial(Replay, compile=True, graphs="keep"),
    "lean": partial(Replay, compile=True, graphs="recompute", memory=_ROOMY),
    "lean, states on the host": partial(
        Replay, compile=True, graphs="recompute", memory=_ROOMY, store="cpu"
    ),
}
# What "forward" differentiates in besides, at their defaults, where they change nothing.
_FOUR = {"forward, 4 numbers": {"sgd": ("dampening", "weight_decay"), "adam": ("eps",)}}
PLAIN = "plain training"
# Of what is free, the share that a method may be expected to take.
_ROOM = 0.7
# Step of the finite differences, in units of lr or of one minus a beta.
_H = 3e-3

Method = Callable[[Workload], Answer | nn.Module]


class Difference(NamedTuple):
    """A derivative, and the relative error it may have."""

    slope: float
    doubt: float


@dataclass(frozen=True)
class RouteRow:
    """One method on one workload.

    ratios: times in units of plain training's, one per round. mib: growth of peak memory. slopes:
    the derivatives in float64, after `judged` steps; a hyper it refuses is missing. left_out: why
    there is no time, no memory or nothing at all. how: the steps that were timed were done.
    """

    method: str
    ratios: Sequence[float] = ()
    mib: float | None = None
    slopes: Mapping[str, float] = field(default_factory=dict)
    left_out: str = ""
    how: str = ""


@dataclass(frozen=True)
class WorkloadResult:
    """One workload, as plain data. seconds: of plain training, one per round. truth: derivatives
    by finite differences. exact_memory: whether the system could say. gpu: where it was trained,
    if not on the CPU. left_out: why there is nothing.
    """

    workload: str
    what: str
    rule: str
    steps: int
    judged: int
    seconds: Sequence[float] = ()
    mib: float | None = None
    truth: Mapping[str, Difference] = field(default_factory=dict)
    rows: Sequence[RouteRow] = ()
    left_out: str = ""
    exact_memory: bool = True
    gpu: str = ""

    def error(self, row: RouteRow, hyper: str) -> float | None:
        """Relative; None if the method refuses the hyper or was not asked."""
        if hyper not in row.slopes or hyper not in self.truth:
            return None
        return abs(row.slopes[hyper] / self.truth[hyper].slope - 1)


def bench_metagradient(
    workloads: Sequence[Workload], *, repeats: int = 5, say: Say = lambda told: None
) -> Iterator[WorkloadResult]:
    """Measure every method on one workload after the other, yielding each as it is done."""
    check_repeats(repeats)
    return (_measured(workload, repeats, say) for workload in workloads)


def _measured(workload: Workload, repeats: int, say: Say) -> WorkloadResult:
    blank = WorkloadResult(
        *(workload.name, workload.what, workload.rule, workload.steps, workload.judged),
        gpu=gpu_name(workload.device),
    )
    try:
        workload.parts()
    except OSError as error:
        return replace(blank, left_out=str(error))
    names = [PLAIN, *LARGE] if workload.large else [PLAIN, *OURS, *PEERS]
    # Small ones side by side on a GPU: torch tells each how much is its own.
    several = bool(blank.gpu) and not workload.large
    with ThreadPoolExecutor(len(names) if several else 1) as threads:
        measured = threads.map(lambda name: _grown(workload, name, say), names)
        grown = dict(zip(names, measured, strict=True))
    fitting = [name for name in names if not grown[name].left_out]
    if PLAIN not in fitting:
        return replace(blank, left_out=grown[PLAIN].left_out)
    if workload.large:  # Once has to do.
        seconds = {name: [grown[name].seconds] for name in fitting}
        hows = {name: grown[name].how for name in fitting}
    else:
        seconds, hows = _timed(workload, fitting, repeats, say)
    plain = seconds.pop(PLAIN)
    judged = names[1:] if workload.judged else []
    shorter = workload.at(workload.judged)
    slopes, refusals = _differentiated(shorter, judged, say)
    rows = [
        RouteRow(
            name,
            [x / y for x, y in zip(seconds.get(name, []), plain, strict=False)],
            grown[name].mib,
            slopes.get(name, {}),
            grown[name].left_out or refusals.get(name, ""),
            hows.get(name, ""),
        )
        for name in names[1:]
    ]
    return replace(
        blank,
        seconds=plain,
        mib=grown[PLAIN].mib,
        truth=finite_differences(shorter, say) if judged else {},
        rows=rows,
        exact_memory=all(of.exact for of in grown.values()),
    )


def find_method(name: str, workload: Workload, problem: ModuleProblem) -> Method:
    """A method by its name, ready to be called with the workload of that problem at any steps."""
    if name == PLAIN:
        return lambda workload: train_plainly(workload, problem)
    if name in PEERS:
        return lambda workload: PEERS[name](workload, problem)
    ours = LARGE if workload.large else OURS
    return _Ours(ours[name](), problem, _FOUR.get(name, {}))


@dataclass
class _Ours:
    """One of this project's routes, with what it carries from call to call."""

    estimator: Estimator
    problem: ModuleProblem
    besides: Mapping[str, Sequence[str]] = field(default_factory=dict)
    carry: Any = None
    trainings: dict[int, Training] = field(default_factory=dict)

    def __call__(self, workload: Workload) -> Answer:
        if workload.steps not in self.trainings:
            self.trainings[workload.steps] = Training(
                self.problem, find_rule(workload.rule), workload.steps, values=workload.values
            )
        training = self.trainings[workload.steps]
        start = training.start(workload.values)
        for name in self.besides.get(workload.rule, ()):
            start[name] = training.defaults()[name]
        estimate, self.carry = self.estimator(training, start, self.carry, seed=SEED)
        if not estimate.ok:
            raise ArithmeticError(f"{estimate.note.outcome}: {estimate.note.reason}")
        slopes = {name: float(x) for name, x in estimate.grad.items()}
        return Answer(estimate.loss, slopes, estimate.note.how)


def _timed(
    workload: Workload, names: Sequence[str], repeats: int, say: Say
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """(seconds of every method in every round, after one that does not count; how it did them)."""
    problem = workload.problem(torch.float32)
    methods = {name: partial(find_method(name, workload, problem), workload) for name in names}
    seconds, answers = interleaved(
        methods,
        repeats,
        lambda told: say(f"{workload.name}: {told}"),
        synchronize=lambda: synchronize(workload.device),
    )
    hows = {name: x.how if isinstance(x, Answer) else "" for name, x in answers.items()}
    return seconds, hows


def _clocked(method: Method, workload: Workload) -> tuple[float, str]:
    """(seconds of one call, how it was done)."""
    synchronize(workload.device)
    begun = time.perf_counter()
    answer = method(workload)
    synchronize(workload.device)
    return time.perf_counter() - begun, answer.how if isinstance(answer, Answer) else ""


def _grown(workload: Workload, name: str, say: Say) -> Grown:
    """The memory of one call, in a process that did nothing else."""
    missing = PEERS[name].missing if name in PEERS else ""
    if missing:
        return Grown(None, left_out=missing)
    say(f"{workload.name}: memory, {name}")
    return run_isolated(memory_of, workload, name, available(workload.device) / 2**20)


def memory_of(workload: Workload, name: str, free: float) -> Grown:
    """In this process, whose resting memory is what imports, data and two steps leave.

    A peer is not run, with the reason, if from a shorter run it seems to need more than its share
    of free: its memory grows with every step. This project's routes bound their own.
    """
    torch.set_num_threads(1)
    method = find_method(name, workload, workload.problem(torch.float32))
    try:
        method(workload.at(2))
        meter = meter_of(workload.device)
        probe = min(100, max(2, workload.steps // 10))
        if name in PEERS and probe < workload.steps:
            method(workload.at(probe))
            needed = meter.mib * workload.steps / probe
            if needed > _ROOM * free:
                return Grown(None, left_out=_too_large(needed, free, probe))
        took, how = _clocked(method, workload)
    except Exception as error:  # Of whatever kind another library raises: a row says so.
        return Grown(None, left_out=reason(error))
    return Grown(meter.mib, meter.exact, seconds=took, how=how)


def _too_large(needed: float, free: float, probe: int) -> str:
    return (
        f"it would take about {needed / 2**10:.1f} GiB (by its growth over {probe} steps), more "
        f"than {_ROOM:.0%} of the {free / 2**10:.1f} GiB that are free"
    )


def _differentiated(
    workload: Workload, names: Sequence[str], say: Say
) -> tuple[dict[str, Mapping[str, float]], dict[str, str]]:
    """The derivatives of every method in float64, and why one has none."""
    problem = workload.problem(torch.float64)
    slopes: dict[str, Mapping[str, float]] = {}
    refusals: dict[str, str] = {}
    for name in names:
        if name in PEERS and PEERS[name].missing:
            continue
        say(f"{workload.name}: error, {name}")
        try:
            answer = find_method(name, workload, problem)(workload)
            slopes[name] = answer.slopes if isinstance(answer, Answer) else {}
        except Exception as error:  # As above; an hour of measurements must not be lost for it.
            refusals[name] = f"in float64, {reason(error)}"
    return slopes, refusals


def finite_differences(workload: Workload, say: Say = lambda told: None) -> dict[str, Difference]:
    """The derivative in every hyper by six plain trainings in float64 each.

    Central differences with steps h, h/2 and h/4, extrapolated twice (Romberg 1955), so that the
    error is of order h**6. doubt: relative, the last extrapolation's change plus rounding.
    """
    problem = workload.problem(torch.float64)
    loss = _trained_loss(workload, problem, workload.values)
    found = {}
    for name, value in workload.values.items():
        say(f"{workload.name}: finite differences in {name}")
        unit = _H * (value if name == "lr" else 1 - value)

        def at(x: float, name: str = name) -> float:
            return _trained_loss(workload, problem, {**workload.values, name: x})

        steps = [unit / 2**i for i in range(3)]
        central = [(at(value + h) - at(value - h)) / (2 * h) for h in steps]
        once = [(4 * fine - rough) / 3 for rough, fine in pairwise(central)]
        slope = (16 * once[1] - once[0]) / 15
        rounding = torch.finfo(torch.float64).eps * loss / steps[-1]
        found[name] = Difference(slope, (abs(slope - once[1]) + rounding) / abs(slope))
    return found


def _trained_loss(workload: Workload, problem: ModuleProblem, values: Mapping[str, float]) -> float:
    model = train_plainly(workload, problem, values)
    with torch.no_grad():
        return float(held_out_loss(model, problem))


__all__ = [
    "LARGE",
    "OURS",
    "PLAIN",
    "RouteRow",
    "WorkloadResult",
    "bench_metagradient",
    "finite_differences",
]
