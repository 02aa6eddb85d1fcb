"""Contracts of problems, estimators and executors: ours hold them, broken ones are told which."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hyperdescent as hd
from hyperdescent.meta.estimators import METHODS
from hyperdescent.meta.forward.forward import Forward
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.training.estimate import Estimate, Estimator
from hyperdescent.studies.engine.executors import Serial
from hyperdescent.studies.problems import PROBLEMS
from hyperdescent.testing import check_estimator, check_executor, check_problem

# Their gradient is of something else than a hyper of the loss, or they need more trainings.
RATES = {"one-pass": "lr,x", "replay": "lr,x", "forward": "lr,x", "auto": "lr,x"}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_that_come_with_it(name):
    check_problem(hd.load_problem(name))


def problem(**changed):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1) > 0).long()
    given = {"train": (x, y), "valid": (x, y), "batch_size": 5} | changed
    loss = given.pop("loss", F.cross_entropy)
    return hd.problem_from_module(lambda: nn.Linear(3, 2), loss, **given)


def cut(output, target):
    return F.cross_entropy(output, target) + output.detach().square().mean()


def drawn(output, target):
    return F.cross_entropy(output + torch.rand(1), target)


class Wandering:
    """A held-out set that is another one every time."""

    def __init__(self, of):
        self.of, self.count = of, 0

    def __getattr__(self, name):
        return getattr(self.of, name)

    def outer_loss(self, params, buffers, hypers):
        self.count += 1
        return self.of.outer_loss(params, buffers, hypers) * self.count


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: problem(loss=cut), "the training loss changes by .* its gradient says"),
        (lambda: Wandering(problem()), "the held-out loss differs when asked twice"),
        (lambda: object(), "it has no .*inner_loss"),
    ],
)
def test_a_broken_problem_is_told(make, why):
    with pytest.raises(AssertionError, match=f"breaks its contract: .*{why}.*\n.*What to do"):
        check_problem(make())


def test_draws_that_are_seeded_are_fine():
    check_problem(problem(loss=drawn, outer_loss_fn=F.cross_entropy))


@pytest.mark.parametrize("make", [Replay, Forward, lambda: Replay(compile="trace")])
def test_exact_estimators(make):
    # Rounding of differences with h = 1e-3, extrapolated: 1e-12 and eps / h.
    check_estimator(make, "lr,x", tolerance=1e-9)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:.*has not converged")
def test_every_method(name):
    if name == "hypergradient-descent":
        pytest.skip("hypers of the loss are not for it")
    check_estimator(METHODS[name], RATES.get(name, "x"))


@dataclass(frozen=True)
class Halved(Estimator):
    """Half of the right answer."""

    def __call__(self, training, point, carry=None, *, seed):
        found, _ = Replay()(training, point, seed=seed)
        return Estimate(found.loss, {n: g / 2 for n, g in found.grad.items()}, found.note), None


class Restless(Halved):
    def __call__(self, training, point, carry=None, *, seed):
        found, _ = Replay()(training, point, seed=seed + int(torch.randint(100, ())))
        return found, None


class Raising(Halved):
    def __call__(self, training, point, carry=None, *, seed):
        found, _ = Replay()(training, point, seed=seed)
        if not found.ok:
            raise ArithmeticError("it diverged")
        return found, None


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Halved, "it is exact. the derivative in x is"),
        (Restless, "the same seed gives the same"),
        (Raising, "divergence is an outcome. it diverged"),
    ],
)
def test_a_broken_estimator_is_told(make, why):
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match=f"the estimator {make.__name__} breaks .*{why}"):
        check_estimator(make, tolerance=1e-9)


def test_our_executor():
    check_executor(Serial())


class Backwards(Serial):
    def map(self, function, cells, progress=None):
        return super().map(function, cells, progress)[::-1]


class Deaf(Serial):
    def map(self, function, cells, progress=None):
        return super().map(function, cells)


@pytest.mark.parametrize(
    ("make", "why"), [(Backwards, "in the order of cells"), (Deaf, "progress is told")]
)
def test_a_broken_executor_is_told(make, why):
    with pytest.raises(AssertionError, match=f"the executor {make.__name__} breaks .*{why}"):
        check_executor(make())
