"""Small problems, and a clock that advances by a hundredth of a second each time it is read."""

from itertools import count
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from hyperdescent.inner.core.hyper import Choice, Integer
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.search import budget


def _examples(dtype, spread):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(5, 3, generator=generator, dtype=torch.float64)).argmax(1)
    return [(spread * x[a:b].to(dtype), y[a:b]) for a, b in ((0, 40), (40, 60))]


def _model(dtype, width, activation):
    between = {"tanh": nn.Tanh, "gelu": nn.GELU}[activation]()
    return nn.Sequential(nn.Linear(5, width), between, nn.Linear(width, 3)).to(dtype)


@pytest.fixture
def make_problem():
    """A classifier of 60 points with one hidden layer, as small or as broken as asked for."""

    def make(loss_fn=functional.cross_entropy, *, dtype=torch.float32, spread=1.0, **more):
        train, valid = _examples(dtype, spread)
        return problem_from_module(
            lambda width, activation: _model(dtype, width, activation),
            loss_fn,
            **{"train": train, "valid": valid, "batch_size": 20, "name": "toy", **more},
            choices={
                "width": Integer(4, 2, 8, log=True),
                "activation": Choice("tanh", ("tanh", "gelu")),
            },
        )

    return make


@pytest.fixture
def problem(make_problem):
    return make_problem()


@pytest.fixture
def ticking(monkeypatch):
    """Budgets count readings of the clock, so that a run is the same on any machine."""
    ticks = count()
    clock = SimpleNamespace(monotonic=lambda: next(ticks) / 100)
    monkeypatch.setattr(budget, "time", clock)
