"""Tune the hyperparameters of a training run by their own gradient.

    import hyperdescent as hd

    result = hd.tune(problem, "adamw", learn="lr,beta1", schedules={"lr": "piecewise:16"})
    optimizer = result.optimizer(model)
    scheduler = result.scheduler(optimizer)

At the front is what a user types first. What rules, spaces and methods are made of has names of its
own: `hd.optim`, `hd.rules`, `hd.wrappers`, `hd.schedules`, `hd.hypers`, `hd.slots`, `hd.numerics`,
`hd.estimators`, `hd.solvers`; and in `hd.testing` is what those of your own must hold.
"""

import sys
from importlib import import_module

from .inner import numerics, wrappers
from .inner.compose.wrapper import wrapper
from .inner.core import hyper as hypers
from .inner.core import slots
from .inner.core.rule import Rule, rule
from .inner.registry import RULES as rules
from .inner.schedules.schedule import SCHEDULES as schedules
from .inner.torch_form import optimizer as optim
from .meta import estimators
from .meta.hypergradient import hypergradient, train
from .meta.implicit import linear_solvers as solvers
from .meta.meta_optimizer import MetaOptimizer
from .meta.online import train_online
from .meta.problems.module_problem import problem_from_module
from .meta.problems.problem import Problem
from .meta.training.outcome import Outcome
from .search.result import Result
from .search.tune import tune
from .studies.problems import load_problem

# So that `from hyperdescent.optim import AdamW` reads like torch's.
for _name in ("optim", "wrappers", "hypers", "slots", "numerics", "estimators", "solvers"):
    sys.modules[f"{__name__}.{_name}"] = globals()[_name]

# Studies bring pydantic and YAML along, which nobody who only tunes should wait for.
_STUDIES = {"Study": "study", "read_study": "study", "run_study": "run"}

__all__ = [
    "MetaOptimizer",
    "Outcome",
    "Problem",
    "Result",
    "Rule",
    "Study",
    "estimators",
    "hypergradient",
    "hypers",
    "load_problem",
    "numerics",
    "optim",
    "problem_from_module",
    "read_study",
    "rule",
    "rules",
    "run_study",
    "schedules",
    "slots",
    "solvers",
    "testing",
    "train",
    "train_online",
    "tune",
    "wrapper",
    "wrappers",
]


def __getattr__(name: str) -> object:
    if name == "testing":
        return import_module(".testing", __name__)
    if name not in _STUDIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".studies.engine.{_STUDIES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
