"""Values of hypers at which each of them tells, for contracts and tests of any rule."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..inner.core.hyper import Granularity, Hyper
from ..inner.core.rule import Rule

GRANULARITIES: tuple[Granularity, ...] = ("shared", "tensor", "element")


def applies(rule: Rule, hyper: Hyper) -> bool:
    """Whether a hyper means anything under a rule's options."""
    return hyper.when is None or rule.options()[hyper.when[0]] == hyper.when[1]


def middle(hyper: Hyper, share: float = 0.5) -> float:
    """The value at a share of the search range, in its coordinate."""
    low, high = hyper.box()
    return float(hyper.value(torch.tensor(low + share * (high - low), dtype=torch.float64)))


def allowed(hyper: Hyper, granularity: Granularity) -> Granularity:
    """A granularity, or the finest that a hyper has."""
    return min(granularity, hyper.finest, key=GRANULARITIES.index)


def telling(rule: Rule, common: Mapping[str, float]) -> dict[str, float]:
    """A number for every hyper that means anything: the common one of its name or role, or the
    middle of its search range.
    """
    return {
        name: common.get(name, common.get(hyper.role or name, middle(hyper)))
        for name, hyper in rule.hypers.items()
        if applies(rule, hyper)
    }


def sloped(rule: Rule) -> list[str]:
    """The hypers that mean anything and whose derivative says what they do."""
    return [n for n, h in rule.hypers.items() if applies(rule, h) and n not in rule.rough()]


__all__ = ["GRANULARITIES", "allowed", "applies", "middle", "sloped", "telling"]
