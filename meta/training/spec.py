"""A training as users name it: rules, schedules and hypers by text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from ...inner.core.hyper import Granularity
from ...inner.core.rule import Rule
from ...inner.registry import find_rule
from ...inner.schedules.schedule import find_schedule
from ...inner.schedules.shapes import Schedule
from ..problems.problem import Problem
from .training import Training


def make_training(
    problem: Problem,
    rule: str | Rule,
    steps: int,
    schedules: Mapping[str, str | Schedule] | None,
    granularity: Mapping[str, Granularity] | None,
    values: Mapping[str, float | Tensor] | None,
) -> Training:
    """A Training from names and specs, as every public function takes them."""
    found = {name: find_schedule(spec) for name, spec in (schedules or {}).items()}
    return Training(
        problem, find_rule(rule), steps, found, dict(granularity or {}), dict(values or {})
    )


def split_names(learn: str | Iterable[str]) -> tuple[str, ...]:
    """("lr", "beta1") from "lr,beta1" or from any iterable of names."""
    if isinstance(learn, str):
        return tuple(name for part in learn.split(",") if (name := part.strip()))
    return tuple(learn)
