"""One training that tunes itself: AdamW's learning rate and weight decay from random starts.

Each start is drawn log-uniformly. With it: train as it is ("random"); learn both on the way by the
one-pass implicit gradient (Clarke, Oldewage & Hernandez-Lobato 2022, arXiv:2110.10461); learn the
rate by plain hypergradient descent on the training loss (Baydin et al. 2018, arXiv:1703.04782); or
let Optuna's TPE use three trainings, the first from the same start. What counts is the held-out
loss that training ends with, in the mean over starts and in the median.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch

from ...meta.hypergradient import train
from ...meta.implicit.hypergradient_descent import HypergradientDescent
from ...meta.online import train_online
from ...meta.problems.problem import Problem
from ...meta.training.estimate import Estimator
from ...meta.training.trained import Trained
from ...search.provenance import provenance
from ..engine.record import Json, Measures, Record, plain
from ..problems import load_problem

NAME, STARTS = "one-pass", 20
PROBLEMS = ("digits-mlp", "digits-cnn", "diabetes-mlp")
_RULE, _TRIALS = "adamw", 3
Values = Mapping[str, float]


@dataclass(frozen=True)
class OnePassSetting:
    """steps: of a training. every, rate: steps between two moves, and their length in logarithms.
    lr, weight_decay: ranges that starts are drawn from and Optuna searches.
    """

    steps: int = 1000
    every: int = 10
    rate: float = 0.1
    lr: tuple[float, float] = (1e-5, 0.1)
    weight_decay: tuple[float, float] = (1e-6, 10.0)


SETTING = OnePassSetting()


@dataclass(frozen=True)
class OnePassCell:
    """One method from one start on one problem."""

    problem: str
    method: str
    seed: int
    study: str = NAME

    @property
    def inputs(self) -> dict[str, Json]:
        return {
            "study": self.study,
            "problem": {"name": self.problem, "setting": plain(asdict(SETTING))},
            "arm": {"name": self.method},
            "seed": self.seed,
        }


def one_pass_cells() -> tuple[list[OnePassCell], list[str]]:
    """(the cells of the study, nothing that is left out)."""
    cells = [
        OnePassCell(problem, method, start)
        for problem in PROBLEMS
        for method in METHODS
        for start in range(STARTS)
    ]
    return cells, []


def train_from_start(cell: OnePassCell) -> Record:
    """Train by the cell's method from its start, and measure what that ends with."""
    torch.set_num_threads(1)
    problem, start = load_problem(cell.problem), start_of(cell.seed)
    began = time.perf_counter()
    trained = METHODS[cell.method](problem, start, cell.seed)
    seconds = time.perf_counter() - began
    measures: Measures = {split: dict(told) for split, told in trained.measures.items()}
    return Record(
        study=cell.study,
        inputs=cell.inputs,
        outcome=trained.outcome,
        measures=measures,
        seconds=seconds,
        provenance=provenance(),
    )


def start_of(seed: int) -> dict[str, float]:
    """The values that a start draws."""
    draw = torch.Generator().manual_seed(seed)
    return {name: _log_uniform(edges, draw) for name, edges in _ranges().items()}


def _ranges() -> dict[str, tuple[float, float]]:
    return {"lr": SETTING.lr, "weight_decay": SETTING.weight_decay}


def _log_uniform(edges: tuple[float, float], draw: torch.Generator) -> float:
    low, high = map(math.log, edges)
    share = float(torch.rand((), generator=draw, dtype=torch.float64))
    return math.exp(low + share * (high - low))


def _as_it_is(problem: Problem, start: Values, seed: int) -> Trained:
    return train(problem, _RULE, steps=SETTING.steps, values=start, seed=seed)


def _online(
    problem: Problem, start: Values, seed: int, *, learn: str, method: str | Estimator
) -> Trained:
    return train_online(
        problem,
        _RULE,
        learn=learn,
        steps=SETTING.steps,
        every=SETTING.every,
        rate=SETTING.rate,
        method=method,
        values=start,
        seed=seed,
    ).trained


def _by_optuna(problem: Problem, start: Values, seed: int) -> Trained:
    """The best of so many trainings."""
    import optuna  # Here, because the other methods have no use for it.

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found: list[Trained] = []

    def objective(trial: optuna.Trial) -> float:
        given = {n: trial.suggest_float(n, *edges, log=True) for n, edges in _ranges().items()}
        trained = _as_it_is(problem, given, seed)
        found.append(trained)
        if not trained.ok:
            raise optuna.TrialPruned
        return _loss(trained)

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial(dict(start))
    study.optimize(objective, n_trials=_TRIALS)
    return min(found, key=_loss)


def _loss(trained: Trained) -> float:
    return trained.measures["valid"]["loss"] if trained.ok else math.inf


METHODS: Mapping[str, Callable[[Problem, Values, int], Trained]] = {
    "random": _as_it_is,
    "one-pass": partial(_online, learn="lr,weight_decay", method="one-pass"),
    "hypergradient descent": partial(_online, learn="lr", method=HypergradientDescent()),
    "Optuna, 3 trainings": _by_optuna,
}
MEASURES = ("valid loss", "median valid loss", "test loss", "median test loss", "seconds")

__all__ = ["MEASURES", "NAME", "OnePassCell", "one_pass_cells", "start_of", "train_from_start"]
