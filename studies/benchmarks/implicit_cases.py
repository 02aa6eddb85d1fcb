"""What implicit hypergradients are measured on: models on digits, trained to an optimum."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from torch import nn

from ...inner.core.messages import unknown
from .workloads import perceptron


@dataclass(frozen=True, eq=False)
class Case:
    """A model on digits, trained until little moves.

    penalty: that of every weight. iterations: of L-BFGS. small: what errors are measured on, a
    model of the same kind; None to measure none.
    """

    name: str
    what: str
    model: Callable[[], nn.Module]
    small: Callable[[], nn.Module] | None
    penalty: float
    iterations: int
    products: int = 20


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            "softmax",
            "softmax regression, 64-10, 650 weights",
            partial(nn.Linear, 64, 10),
            partial(nn.Linear, 64, 10),
            1e-2,
            200,
        ),
        Case(
            "mlp",
            "MLP 64-128-128-10, tanh, 26,122 weights; errors on 64-24-24-10",
            partial(perceptron, 128),
            partial(perceptron, 24),
            2e-2,
            1000,
        ),
        Case(
            "mlp-1m",
            "MLP 64-960-960-10, tanh, 994,570 weights",
            partial(perceptron, 960),
            None,
            2e-2,
            100,
        ),
    )
}


def find_cases(names: Iterable[str]) -> list[Case]:
    """By name, in the order given; all of them for no names."""
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in CASES:
            raise ValueError(unknown("there is no case", name, CASES))
    return [CASES[name] for name in names or CASES]
