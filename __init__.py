"""Tune the hyperparameters of a training run by their own gradient.

import hyperdescent as hd

result = hd.tune(problem, "adamw", learn="lr,beta1", schedules={"lr": "piecewise:16"})
optimizer = result.optimizer(model)
scheduler = result.scheduler(optimizer)
"""

import sys
from importlib import import_module

from .inner import wrappers
from .inner.compose.partition import partition
from .inner.compose.wrapper import wrapper
from .inner.core.hyper import (
    Choice,
    Hyper,
    Integer,
    decay,
    fraction,
    learning_rate,
    positive,
    temperature,
    weight_decay,
)
from .inner.core.rule import Rule, rule
from .inner.core.slots import Slot, filled_with, number, shared, weights, with_shape, zeros
from .inner.numerics import counter_rng as noise
from .inner.numerics.elementwise import mask, root, sign
from .inner.registry import RULES as rules
from .inner.schedules.schedule import SCHEDULES as schedules
from .inner.schedules.schedule import Schedule
from .inner.torch_form import optimizer as optim
from .meta.bilevel.bamm import BAMM
from .meta.bilevel.bda import BDA
from .meta.bilevel.meha import MEHA
from .meta.bilevel.penalty import Penalty
from .meta.bilevel.sama import SAMA
from .meta.forward.forward import Forward
from .meta.hypergradient import hypergradient, train
from .meta.implicit import linear_solvers as linear
from .meta.implicit.fixed_point import FixedPoint, OnePass
from .meta.implicit.implicit import Implicit
from .meta.meta_optimizer import MetaOptimizer
from .meta.online import HypergradientDescent, train_online
from .meta.problems.problem import Problem, problem_from_module
from .meta.reverse.replay import Replay
from .meta.sampling.control_variate import Guess
from .meta.sampling.evolution_strategies import ES, PES
from .meta.sampling.forward_gradient import ForwardGradient
from .meta.sampling.population import Population
from .meta.training.outcome import Outcome
from .meta.training.training import Training
from .search.result import Result
from .search.tune import tune
from .studies.problems import find_problem as problem

# So that `from hyperdescent.optim import AdamW` reads like torch's.
sys.modules[f"{__name__}.optim"] = optim
sys.modules[f"{__name__}.wrappers"] = wrappers

# Studies bring pydantic and YAML along, which nobody who only tunes should wait for.
_STUDIES = {"Study": "study", "read_study": "study", "run": "run"}

__all__ = [
    "BAMM",
    "BDA",
    "ES",
    "MEHA",
    "PES",
    "SAMA",
    "Choice",
    "FixedPoint",
    "Forward",
    "ForwardGradient",
    "Guess",
    "Hyper",
    "HypergradientDescent",
    "Implicit",
    "Integer",
    "MetaOptimizer",
    "OnePass",
    "Outcome",
    "Penalty",
    "Population",
    "Problem",
    "Replay",
    "Result",
    "Rule",
    "Schedule",
    "Slot",
    "Study",
    "Training",
    "decay",
    "filled_with",
    "fraction",
    "hypergradient",
    "learning_rate",
    "linear",
    "mask",
    "noise",
    "number",
    "optim",
    "partition",
    "positive",
    "problem",
    "problem_from_module",
    "read_study",
    "root",
    "rule",
    "rules",
    "run",
    "schedules",
    "shared",
    "sign",
    "temperature",
    "train",
    "train_online",
    "tune",
    "weight_decay",
    "weights",
    "with_shape",
    "wrapper",
    "wrappers",
    "zeros",
]


def __getattr__(name: str) -> object:
    if name not in _STUDIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".studies.{_STUDIES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
