"""SAMA against the formula it stands for, and against what the rule does to a gradient."""

import pytest
import torch
from toys import DOUBLE, Toy, vector

from hyperdescent.inner.registry import find_rule
from hyperdescent.meta.bilevel.sama import SAMA
from hyperdescent.meta.hypergradient import hypergradient
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training

AIM, X = vector(3.0, -1.0, 0.5), vector(1.0, 2.0, -0.3)


def toy():
    """d2 inner / dx dw is -diag(cosh w), not constant, so that a difference has an error."""

    def inner(w, h):
        return (torch.cosh(w) - h["x"] * torch.sinh(w)).sum()

    return Toy(inner, lambda w, h: ((w - AIM) ** 2).sum() / 2 + h["x"].sum(), X * 0, x=(3,))


@pytest.mark.parametrize("rule", ["sgd", "adam", "adamw", "rmsprop"])
def test_is_the_formula(rule):
    """dF/dx - d2 inner / dx dw' D dF/dw, D from the change of a step by that of its gradient."""
    run = Training(toy(), find_rule(rule), 7, values={"lr": 0.05})
    estimate, carry = SAMA(radius=1e-4, warm_start=True)(run, {"x": X}, seed=0)
    w, values = carry.state.p, run.resolve({"x": X}).constant
    g = torch.sinh(w) - X * torch.cosh(w)
    own = {name: values[name] for name in run.rule.hypers} | run.rule.options()
    t = torch.tensor(8.0, dtype=DOUBLE)

    def step(g):
        return run.rule.update(w, g, carry.state.slots, t, **own)[0]

    h = 1e-6
    diagonal = -(step(g + h) - step(g - h)) / (2 * h)
    expected = 1 + torch.cosh(w) * diagonal * (w - AIM)
    torch.testing.assert_close(estimate.grad["x"], expected, rtol=1e-6, atol=1e-9)


def test_a_difference_of_second_order():
    run = Training(toy(), find_rule("sgd"), 7, values={"lr": 0.05})
    fine, coarse, half = (
        SAMA(radius=r)(run, {"x": X}, seed=0)[0].grad["x"] for r in (1e-4, 0.4, 0.2)
    )
    ratio = float((coarse - fine).norm() / (half - fine).norm())
    assert ratio == pytest.approx(4, rel=0.02)


def test_by_name_and_only_for_hypers_of_the_loss():
    assert hypergradient(toy(), "adam", learn="x", steps=5, method="sama").ok
    with pytest.raises(ValueError, match="lr is a hyperparameter of adam"):
        hypergradient(toy(), "adam", learn="lr", steps=5, method="sama")


def test_divergence_is_an_outcome():
    run = Training(toy(), find_rule("sgd"), 500, values={"lr": 1e3})
    assert SAMA()(run, {"x": X}, seed=0)[0].note.outcome is Outcome.DIVERGED


@pytest.mark.parametrize("radius", [0.0, -1.0, float("inf"), float("nan")])
def test_a_radius_that_is_none(radius):
    with pytest.raises(ValueError, match="must be positive"):
        SAMA(radius=radius)
