"""Greedy learning rates are too small (Wu et al. 2018, arXiv:1803.02021); metagradients see why.

A quadratic with noisy gradients, followed exactly: w holds the mean squares of its coordinates, h
their curvatures, and a step of rate a makes (1 - a h)^2 w + (a h)^2 sigma^2 of them.
"""

import pytest
import torch
from toys import DOUBLE, Toy

from hyperdescent.inner.core.hyper import positive
from hyperdescent.inner.registry import find_rule
from hyperdescent.inner.schedules.schedule import find_schedule
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.sampling.evolution_strategies import PES
from hyperdescent.meta.training.training import Training

CURVATURES = 1 / torch.arange(1, 1001, dtype=DOUBLE)
NOISE = 1 / CURVATURES


def loss(w):
    return (CURVATURES * w).sum() / 2


def noisy(steps):
    """The rule is plain descent of length 1 on a loss whose slope is what a step takes away."""

    def inner(w, hypers):
        kept = (1 - hypers["rate"] * CURVATURES) ** 2
        added = (hypers["rate"] * CURVATURES) ** 2 * NOISE
        return ((1 - kept) * w**2 / 2 - added * w).sum()

    toy = Toy(inner, lambda w, hypers: loss(w), torch.ones_like(CURVATURES))
    toy.hypers = {"rate": positive(0.5, (1e-3, 2.0))}
    rates = {"rate": find_schedule("free")}
    return Training(toy, find_rule("sgd"), steps, schedules=rates, values={"lr": 1.0})


def greedy(steps):
    """(the rates that make each step's own loss the least, in closed form; the last loss)."""
    w, rates = torch.ones_like(CURVATURES), []
    for _ in range(steps):
        rate = (CURVATURES**2 * w).sum() / (CURVATURES**3 * (w + NOISE)).sum()
        w = (1 - rate * CURVATURES) ** 2 * w + (rate * CURVATURES) ** 2 * NOISE
        rates.append(float(rate))
    return torch.tensor(rates, dtype=DOUBLE), float(loss(w))


def learned(steps, start):
    """The same by descent on the exact metagradient, in the logarithms of the rates."""
    run, replay = noisy(steps), Replay(compile="trace")
    z = start.log().requires_grad_()
    optimizer = torch.optim.LBFGS([z], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        rates = z.detach().exp()
        estimate, _ = replay(run, {"rate.steps": rates}, seed=0)
        z.grad = estimate.grad["rate.steps"] * rates
        return torch.tensor(estimate.loss)

    optimizer.step(closure)
    return z.detach().exp(), float(closure())


# Final losses and rates half way of the specification.
@pytest.mark.parametrize(
    ("steps", "short", "long"), [(10, 2.459, 2.392), (100, 1.715, 1.354), (250, 1.461, 0.956)]
)
def test_the_long_horizon_beats_the_greedy_one(steps, short, long):
    rates, end = greedy(steps)
    assert end == pytest.approx(short, abs=1e-3)
    better, best = learned(steps, rates)
    assert best == pytest.approx(long, abs=1e-3)
    assert float(better[steps // 2]) > 1.5 * float(rates[steps // 2])


def test_rates_and_what_one_step_sees_of_them():
    """Replay of the last step alone is 0 at the greedy rates, and the whole gradient is not."""
    run, (rates, _) = noisy(30), greedy(30)
    one, _ = Replay(window=1)(run, {"rate.steps": rates}, seed=0)
    whole, _ = Replay()(run, {"rate.steps": rates}, seed=0)
    assert float(one.grad["rate.steps"][-1].abs()) < 1e-12
    # Every earlier rate should be larger: greed is behind on all of them.
    assert bool((whole.grad["rate.steps"][:-1] < -1e-4).all())


def test_persistent_evolution_sees_it_too():
    run, (rates, _) = noisy(20), greedy(20)
    whole, _ = Replay()(run, {"rate.steps": rates}, seed=0)
    method, carry, found = PES(every=5, pairs=100, sigma=0.05), None, []
    for _ in range(4):
        estimate, carry = method(run, {"rate.steps": rates}, carry, seed=1)
        found.append(estimate.grad["rate.steps"])
    mean, exact = torch.stack(found).mean(0), whole.grad["rate.steps"]
    assert float(torch.cosine_similarity(mean * rates, exact * rates, 0)) > 0.3
