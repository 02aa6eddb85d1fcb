"""A million hyperparameters: one L2 weight for every weight of a net, learned in its one training.

Every few steps the hypergradient of the held-out loss is taken by implicit differentiation, warm
started, and all L2 weights move (Lorraine, Vicol & Duvenaud 2020, arXiv:1911.02590). What counts is
what that costs beside plain training, in time and memory, and whether a million weights fit the
held-out data better than the best single one of a grid does. That they can fit it too well is what
the test data say.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ...inner.core.hyper import Tensors, positive
from ...meta.hypergradient import train
from ...meta.implicit.implicit import Implicit
from ...meta.implicit.linear_solvers import Solve, conjugate_gradient, neumann
from ...meta.online import train_online
from ...meta.problems.module_problem import ModuleProblem, problem_from_module
from ...meta.training.trained import Trained
from ...search.provenance import provenance
from ..benchmarks.metagradient_peers import started
from ..benchmarks.workloads import SEED, perceptron
from ..engine.record import Json, Measures, Record
from ..measure.memory_meter import Meter, return_freed_blocks
from ..problems import accuracy, digits_mlp

NAME, SEEDS = "million-hypers", 2
_SEARCH = (1e-8, 1.0)
# Bytes per weight of the model and of Adam's two slots, in float32.
_MODEL = 12


@dataclass(frozen=True)
class MillionHypersSetting:
    """width: of the two hidden layers. steps: of Adam at lr, in batches. every, rate: steps between
    two moves of the L2 weights, and their length in logarithms. terms: products with the curvature
    per move. grid: single L2 weights that are tried. rounds, round: repetitions of the timing, and
    steps of each.
    """

    width: int = 980
    steps: int = 600
    lr: float = 1e-3
    batch: int = 256
    every: int = 10
    rate: float = 0.5
    start: float = 1e-5
    terms: int = 20
    step_size: float = 0.2
    grid: int = 20
    rounds: int = 5
    round: int = 40


SETTING = MillionHypersSetting()
PLAIN, GRID = "no L2 weight", "one, best of a grid"
# The Gauss-Newton matrix, which has no negative curvature early in training either.
METHODS: Mapping[str, Callable[[MillionHypersSetting], Solve]] = {
    "one each, Neumann": lambda setting: neumann(setting.step_size, setting.terms),
    "one each, CG": lambda setting: conjugate_gradient(setting.terms),
}
# memory: growth of the peak, also in units of the model with its optimizer state. step cost: time
# of a step, a share of every move's included, in units of a step by torch.optim.
MEASURES = (
    "valid loss",
    "test loss",
    "test accuracy",
    "step cost",
    "memory MiB",
    "memory times",
    "seconds",
)


@dataclass(frozen=True)
class MillionCell:
    """One way to choose L2 weights on one split of the data."""

    method: str
    seed: int
    study: str = NAME

    @property
    def inputs(self) -> dict[str, Json]:
        return {
            "study": self.study,
            "problem": {"name": "digits", "setting": asdict(SETTING)},
            "arm": {"name": self.method},
            "seed": self.seed,
        }


def million_cells() -> tuple[list[MillionCell], list[str]]:
    """(the cells of the study, nothing that is left out)."""
    names = (PLAIN, GRID, *METHODS)
    return [MillionCell(name, seed) for seed in range(SEEDS) for name in names], []


def learn_penalties(cell: MillionCell) -> Record:
    """Train with the L2 weights that the cell's method chooses, and measure quality and price."""
    torch.set_num_threads(1)
    return_freed_blocks()
    problem = million_problem(SETTING, cell.seed)
    go = partial(_trained, cell.method, problem)
    cost: Measures = {}
    if cell.method in METHODS:
        cost["step"] = {"cost": _step_cost(problem, go)}
    go(SETTING.round)  # What only a first call takes is no one's.
    meter, began = Meter(), time.perf_counter()
    trained = go(SETTING.steps)
    seconds = time.perf_counter() - began
    if not trained.ok:
        return Record(cell.study, cell.inputs, trained.outcome, provenance=provenance())
    weights = sum(p.numel() for p in trained.params.values())
    cost["memory"] = {"MiB": meter.mib, "times": meter.mib * 2**20 / (_MODEL * weights)}
    quality: Measures = {split: dict(told) for split, told in trained.measures.items()}
    return Record(
        study=cell.study,
        inputs=cell.inputs,
        outcome=trained.outcome,
        measures=quality | cost,
        seconds=seconds,
        provenance=provenance(),
    )


def million_problem(setting: MillionHypersSetting, split: int) -> ModuleProblem:
    """Ten digits by a perceptron, and "l2", one number per weight w: the penalty is the sum
    of l2 w^2 / 2.
    """
    data = digits_mlp(split).splits
    made = partial(perceptron, setting.width)
    weights = sum(p.numel() for p in made().parameters())
    l2 = positive(setting.start, search=_SEARCH)
    return problem_from_module(
        made,
        _penalized,
        *(data[name].whole() for name in ("train", "valid")),
        test=data["test"].whole(),
        batch_size=setting.batch,
        hypers={"l2": replace(l2, shape=(weights,), dtype=torch.float32)},
        outer_loss_fn=functional.cross_entropy,
        metrics={"accuracy": accuracy},
        name=NAME,
    )


def _penalized(output: Tensor, target: Tensor, *, hypers: Tensors, params: Tensors) -> Tensor:
    each = hypers["l2"].split([p.numel() for p in params.values()])
    penalties = [(l2.view_as(p) * p * p).sum() for l2, p in zip(each, params.values(), strict=True)]
    return functional.cross_entropy(output, target) + torch.stack(penalties).sum() / 2


def _trained(method: str, problem: ModuleProblem, steps: int) -> Trained:
    """Trained for some steps by one of the methods."""
    if method == PLAIN:
        return _by_torch(problem, steps)
    if method == GRID:
        return _best_of_grid(problem, steps)
    estimator = Implicit(
        METHODS[method](SETTING),
        warm_start=True,
        tolerance=float("inf"),
        curvature="gauss-newton",
    )
    return train_online(
        problem,
        "adam",
        learn="l2",
        steps=steps,
        every=SETTING.every,
        rate=SETTING.rate,
        method=estimator,
        values={"lr": SETTING.lr},
    ).trained


def _by_torch(problem: ModuleProblem, steps: int) -> Trained:
    """As anyone would train it, on the same batches from the same weights."""
    model = started(problem)
    optimizer = torch.optim.Adam(model.parameters(), lr=SETTING.lr)
    for i in range(steps):
        inputs, target = problem.batch(i, SEED)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), target).backward()
        optimizer.step()
    params = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    measures = {split: problem.measure(params, buffers, split) for split in problem.splits}
    return Trained(params, buffers, measures)


def _best_of_grid(problem: ModuleProblem, steps: int) -> Trained:
    """The lowest held-out loss with a single L2 weight."""
    low, high = (torch.tensor(edge).log10().item() for edge in _SEARCH)
    each = [
        train(problem, "adam", steps=steps, values={"lr": SETTING.lr, "l2": l2})
        for l2 in torch.logspace(low, high, SETTING.grid).tolist()
    ]
    return min(each, key=_loss)


def _loss(trained: Trained) -> float:
    return trained.measures["valid"]["loss"] if trained.ok else math.inf


def _step_cost(problem: ModuleProblem, go: Callable[[int], object]) -> float:
    """The median over rounds of (time of so many steps) / (time of as many by torch.optim)."""
    ratios = []
    for _ in range(SETTING.rounds + 1):
        plain = _seconds(partial(_by_torch, problem), SETTING.round)
        ratios.append(_seconds(go, SETTING.round) / plain)
    return statistics.median(ratios[1:])


def _seconds(go: Callable[[int], object], steps: int) -> float:
    began = time.perf_counter()
    go(steps)
    return time.perf_counter() - began


__all__ = ["MEASURES", "NAME", "MillionCell", "learn_penalties", "million_cells", "million_problem"]
