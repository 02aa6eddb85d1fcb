"""The benchmark of one implicit hypergradient: its time, memory and error, here and by peers.

One L2 penalty per weight, at the optimum that training leads to. Time is the ratio to as many
full-batch training steps as a solver makes products, taken in the same round. Memory is measured in
a fresh process per method. Errors are against the whole Hessian in float64, solved directly, of a
model small enough to have one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...inner.core.hyper import Tensors, positive
from ...inner.registry import find_rule
from ...meta.implicit.implicit import Implicit
from ...meta.implicit.inner_solution import InnerSolution
from ...meta.implicit.linear_solvers import Solve, conjugate_gradient, largest_eigenvalue, neumann
from ...meta.problems.module_problem import problem_from_module
from ...meta.problems.seeding import fork_rng
from ...meta.training.state import State
from ...meta.training.training import Training
from ..measure.memory_meter import Meter
from ..measure.timing import Grown, Say, check_repeats, interleaved, reason, run_isolated
from .implicit_cases import Case
from .implicit_peers import IMPLICIT_PEERS, SOLVERS, Optimum, Solver, training_loss
from .metagradient_peers import make_optimizer
from .workloads import SEED, digits, mean_loss

PLAIN = "plain training"
# This project's routes, by the name they have in the tables.
OURS: dict[str, Callable[..., Implicit]] = {
    "compiled": partial(Implicit, compile=True),
    "no compiler": partial(Implicit, compile="trace"),
    "by autograd": partial(Implicit, compile=False),
}
# Products of the power method that finds Neumann's step size, and what is added to its answer.
_PROBES, _MARGIN = 30, 1.1

# (solver, method), or None for plain training.
Way = tuple[Solver, str] | None


@dataclass(frozen=True)
class SolveRow:
    """One method with one solver on one case.

    ratios: times in units of plain training's, one per round. mib: growth of peak memory. error:
    relative, in float64, against the exact hypergradient; cosine: with it. left_out: why there is
    no time, no memory or nothing at all.
    """

    solver: Solver
    method: str
    ratios: Sequence[float] = ()
    mib: float | None = None
    error: float | None = None
    cosine: float | None = None
    left_out: str = ""


@dataclass(frozen=True)
class ImplicitResult:
    """One case, as plain data. seconds: of plain training, one per round. step_size: of Neumann's
    series. exact_memory: whether the system could say.
    """

    case: str
    what: str
    products: int
    step_size: float
    seconds: Sequence[float]
    mib: float | None
    rows: Sequence[SolveRow]
    exact_memory: bool = True

    def ahead(self, solver: Solver) -> tuple[str, list[float]] | None:
        """(the fastest peer, its time in units of our fastest's by round); None without both.

        A peer whose answer is not what it should be is still a peer.
        """
        timed = [row for row in self.rows if row.solver == solver and row.ratios]
        ours = [row for row in timed if row.method in OURS]
        peers = [row for row in timed if row.method in IMPLICIT_PEERS]
        if not ours or not peers:
            return None
        best, peer = (min(rows, key=lambda row: median(row.ratios)) for rows in (ours, peers))
        return peer.method, [x / y for x, y in zip(peer.ratios, best.ratios, strict=True)]


def bench_implicit(
    cases: Sequence[Case], *, repeats: int = 5, say: Say = lambda told: None
) -> Iterator[ImplicitResult]:
    """Measure every method on one case after the other, yielding each as it is done."""
    check_repeats(repeats)
    return (_measured(case, repeats, say) for case in cases)


def _measured(case: Case, repeats: int, say: Say) -> ImplicitResult:
    def told(what: str) -> None:
        say(f"{case.name}: {what}")

    told("training")
    optimum = reach(case, case.model, torch.float32)
    ways: list[Way] = [None, *((s, name) for s in SOLVERS for name in (*OURS, *IMPLICIT_PEERS))]
    grown = {way: _grown(optimum, way, told) for way in ways}
    methods = {way: find_way(way, optimum) for way in ways if not grown[way].left_out}
    seconds, _ = interleaved(methods, repeats, told, called)
    plain = seconds[None]
    judged = _judged(case, ways[1:], told)
    rows = []
    for way in ways:
        if way is None:
            continue
        times = seconds.get(way, [])
        error, cosine, refused = judged.get(way, _Judged())
        rows.append(
            SolveRow(
                *way,
                ratios=[x / y for x, y in zip(times, plain, strict=False)],
                mib=grown[way].mib,
                error=error,
                cosine=cosine,
                left_out=grown[way].left_out or refused,
            )
        )
    return ImplicitResult(
        case.name,
        case.what,
        case.products,
        optimum.step_size,
        plain,
        grown[None].mib,
        rows,
        all(of.exact for of in grown.values()),
    )


def reach(case: Case, model: Callable[[], nn.Module], dtype: torch.dtype) -> Optimum:
    """Trained by L-BFGS, in double precision: a narrow step is not a matter of rounding."""
    with fork_rng(SEED):
        made = model().double()
    weights = list(made.parameters())
    (inputs, target), valid = ((x.double(), y) for x, y in digits())
    penalties = [torch.full_like(w, case.penalty) for w in weights]
    optimizer = torch.optim.LBFGS(
        weights,
        max_iter=case.iterations,
        history_size=20,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = training_loss(made(inputs), target, weights, penalties)
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()
    optimum = Optimum(
        made.to(dtype),
        [c.detach().to(dtype) for c in penalties],
        (inputs.to(dtype), target),
        (valid[0].to(dtype), valid[1]),
        case.products,
        math.nan,
    )
    gradient, held_out = _gradients(optimum)

    def product(v: Tensor) -> Tensor:
        return _flat(torch.autograd.grad(gradient, optimum.weights, v, retain_graph=True))

    top = largest_eigenvalue(product, held_out, _PROBES)
    return replace(optimum, step_size=1 / (_MARGIN * top))


def exact(optimum: Optimum) -> Tensor:
    """The hypergradient by the whole Hessian: minus weight times H^-1 dF/dw, one per weight."""
    gradient, held_out = _gradients(optimum)
    rows = [
        _flat(torch.autograd.grad(gradient, optimum.weights, unit, retain_graph=True))
        for unit in torch.eye(len(gradient), dtype=gradient.dtype)
    ]
    solved: Tensor = torch.linalg.solve(torch.stack(rows), held_out)
    return -_flat(optimum.weights) * solved


def _gradients(optimum: Optimum) -> tuple[Tensor, Tensor]:
    """(of the training loss, with a graph; of the held-out loss)."""
    (inputs, target), (held_out, held_out_target) = optimum.train, optimum.valid
    weights = optimum.weights
    loss = training_loss(optimum.model(inputs), target, weights, optimum.penalties)
    gradient = _flat(torch.autograd.grad(loss, weights, create_graph=True), keep_graph=True)
    outer = mean_loss(optimum.model(held_out), held_out_target)
    return gradient, _flat(torch.autograd.grad(outer, weights))


def _flat(tensors: Iterable[Tensor], keep_graph: bool = False) -> Tensor:
    flat = torch.cat([x.reshape(-1) for x in tensors])
    return flat if keep_graph else flat.detach()


def find_way(way: Way, optimum: Optimum) -> Callable[[], Any]:
    """What goes that way, every time that it is called."""
    if way is None:
        return partial(_train_plainly, optimum)
    solver, name = way
    if name in IMPLICIT_PEERS:
        return IMPLICIT_PEERS[name](optimum, solver)
    return ours(OURS[name], optimum, solver)


def _train_plainly(optimum: Optimum) -> None:
    """As many steps as there are products, and no farther: the rate is 0."""
    optimizer = make_optimizer("sgd", optimum.weights, {"lr": 0.0})
    inputs, target = optimum.train
    for _ in range(optimum.products):
        optimizer.zero_grad(set_to_none=True)
        loss = training_loss(optimum.model(inputs), target, optimum.weights, optimum.penalties)
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def ours(
    make: Callable[..., Implicit], optimum: Optimum, solver: Solver
) -> Callable[[], list[Tensor]]:
    """This project's hypergradient where training ended, without the training."""
    count = optimum.products
    solve: Solve = (
        conjugate_gradient(count, tolerance=0.0, check=False)
        if solver == "CG"
        else neumann(optimum.step_size, count, check=False)
    )
    # So few products leave what they leave; how much is in the table.
    implicit = make(solve=solve, tolerance=math.inf)
    training = _training(optimum)
    weights = {n: w.detach() for n, w in zip(optimum.names, optimum.weights, strict=True)}
    state = State(training.layout.flatten(weights), {}, {})
    point: Tensors = {"l2": torch.cat([c.reshape(-1) for c in optimum.penalties]).double()}

    def hypergradient() -> list[Tensor]:
        estimate = implicit.at(training, point, InnerSolution(state, 0), seed=SEED)
        if not estimate.ok:
            raise ArithmeticError(f"{estimate.note.outcome}: {estimate.note.reason}")
        return [estimate.grad["l2"]]

    return hypergradient


def _training(optimum: Optimum) -> Training:
    def loss_fn(output: Tensor, target: Tensor, *, hypers: Tensors, params: Tensors) -> Tensor:
        weights = list(params.values())
        flat = hypers["l2"].to(weights[0]).split([w.numel() for w in weights])
        penalties = [c.view_as(w) for c, w in zip(flat, weights, strict=True)]
        return training_loss(output, target, weights, penalties)

    problem = problem_from_module(
        lambda: optimum.model,
        loss_fn,
        optimum.train,
        optimum.valid,
        batch_size=len(optimum.train[1]),
        hypers={"l2": positive(1e-2, search=(1e-6, 1.0))},
        outer_loss_fn=mean_loss,
        name="digits with penalties",
    )
    return Training(problem, find_rule("sgd"), 1, granularity={"l2": "element"})


class _Judged(NamedTuple):
    error: float | None = None
    cosine: float | None = None
    left_out: str = ""


def _judged(case: Case, ways: Sequence[Way], say: Say) -> dict[Way, _Judged]:
    """Every method in float64 against the exact hypergradient."""
    if case.small is None:
        return {}
    say("the exact hypergradient")
    optimum = reach(case, case.small, torch.float64)
    truth = exact(optimum)
    found: dict[Way, _Judged] = {}
    for way in ways:
        if _missing(way):
            continue
        say(f"error, {called(way)}")
        try:
            answer = _flat(find_way(way, optimum)())
        except Exception as error:  # Of whatever kind another library raises: a row says so.
            found[way] = _Judged(left_out=f"in float64, {reason(error)}")
            continue
        off = float((answer - truth).norm() / truth.norm())
        found[way] = _Judged(off, float(torch.cosine_similarity(answer, truth, 0)))
    return found


def called(way: Way) -> str:
    return PLAIN if way is None else ", ".join(way)


def _missing(way: Way) -> str:
    """Why it cannot be gone here; empty if it can."""
    return IMPLICIT_PEERS[way[1]].missing if way and way[1] in IMPLICIT_PEERS else ""


def _grown(optimum: Optimum, way: Way, say: Say) -> Grown:
    """The memory of one call, in a process that did nothing else."""
    if missing := _missing(way):
        return Grown(None, left_out=missing)
    say(f"memory, {called(way)}")
    return run_isolated(memory_at, optimum, way)


def memory_at(optimum: Optimum, way: Way) -> Grown:
    """In this process, whose resting memory is what a first call leaves behind."""
    torch.set_num_threads(1)
    try:
        method = find_way(way, optimum)
        method()
        meter = Meter()
        method()
    except Exception as error:  # Of whatever kind another library raises: a row says so.
        return Grown(None, left_out=reason(error))
    return Grown(meter.mib, meter.exact)


__all__ = [
    "OURS",
    "PLAIN",
    "ImplicitResult",
    "SolveRow",
    "bench_implicit",
    "exact",
    "find_way",
    "ours",
    "reach",
]
