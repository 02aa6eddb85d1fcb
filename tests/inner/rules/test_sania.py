"""SANIA's step against what it is meant to solve, and its root where that has no slope."""

import pytest
import torch

from hyperdescent.inner.registry import RULES

F64 = torch.float64
SANIA = RULES["sania"].choose(form="adagrad")
FORMS = ["adagrad", "adam"]


def number(x):
    return torch.tensor(x, dtype=F64)


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def first_step(g, loss, rule=SANIA, **given):
    values = rule.values(given)
    p = torch.zeros_like(g)
    return rule(p, g, rule.init(p, values), number(1.0), values, loss=number(loss))[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_sqrt", [False, True])
def test_the_quadratic_model_is_f_star_after_the_step(form, is_sqrt):
    """f + g·u + u·B u / 2 = f_star, where it can be."""
    g, eps = noise(0, 12), 0.3
    rule = SANIA.choose(form=form, is_sqrt=is_sqrt)
    for loss in (0.2, 1.0, 2.5):
        u = first_step(g, loss, rule, eps=eps, f_star=0.1, tau=0.0)
        b = (g * g + eps).sqrt() if is_sqrt else g * g + eps
        assert float(loss + g @ u + u @ (b * u) / 2) == pytest.approx(0.1, abs=1e-12)


def test_the_whole_step_where_the_model_stays_above():
    g = noise(0, 12)
    u = first_step(g, 100.0, eps=0.3, tau=0.0)
    torch.testing.assert_close(u, -g / (g * g + 0.3), rtol=1e-14, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_diagonal_rescaling_of_the_weights_changes_nothing(form):
    """The squared forms, without eps: weights c * p have gradients g / c and steps c * u."""
    rule, scale = SANIA.choose(form=form), noise(5, 8).exp() * 10
    values = rule.values({"eps": 0.0, "beta2": 0.9, "lr": 0.3})
    a = noise(6, 8, 8)
    plain, scaled = noise(7, 8), noise(7, 8) * scale
    s, scaled_s = rule.init(plain, values), rule.init(scaled, values)
    for step in range(1, 11):
        t = number(float(step))
        r, scaled_r = a @ plain, a @ (scaled / scale)
        plain, s = rule(plain, a.T @ r, s, t, values, loss=r @ r / 2)
        scaled, scaled_s = rule(
            scaled, a.T @ scaled_r / scale, scaled_s, t, values, loss=scaled_r @ scaled_r / 2
        )
    torch.testing.assert_close(scaled / scale, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("away", [0.0, 1e-13, -1e-13, 1e-3, -1e-3])
def test_the_slopes_are_those_of_the_bent_root_where_the_model_just_reaches_f_star(away):
    """At 2 (loss - f_star) = q the paper's slope is infinite."""
    g = number([1.0, -2.0])
    q = float((g * g / (g * g + 0.5)).sum())
    tau, rule = 0.01, SANIA
    f_star = number(0.0).requires_grad_()
    values = rule.values({"eps": 0.5, "tau": tau}) | {"f_star": f_star}
    p = torch.zeros_like(g)
    loss = number(q / 2 * (1 - away))
    moved, _ = rule(p, g, rule.init(p, values), number(1.0), values, loss=loss)
    (slope,) = torch.autograd.grad(moved[0], f_star, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, f_star)
    # y = ((x + (x² + tau²)^(1/2)) / 2)^(1/2) of x = away + 2 f_star / q, and d = 1 / 1.5.
    r = (away**2 + tau**2) ** 0.5
    h, h1, h2 = (away + r) / 2, (1 + away / r) / 2, tau**2 / r**3 / 2
    y1 = h1 / (2 * h**0.5)
    y2 = h2 / (2 * h**0.5) - h1**2 / (4 * h**1.5)
    assert float(slope.detach()) == pytest.approx(y1 * 2 / q / 1.5, rel=1e-9)
    assert float(curvature.detach()) == pytest.approx(y2 * (2 / q) ** 2 / 1.5, rel=1e-9)


def test_the_bend_is_narrow():
    g = noise(0, 12)
    for loss in (0.2, 1.0, 2.5, 100.0):
        bent, sharp = (first_step(g, loss, eps=0.3, tau=tau) for tau in (1e-3, 0.0))
        torch.testing.assert_close(bent, sharp, rtol=1e-4, atol=0)


def test_eps_bounds_the_first_step_along_tiny_gradients():
    """Without it the first step is the largest where the gradient is the least."""
    g = number([1.0, 1e-9])
    wild, tame = first_step(g, 0.1, eps=1e-30), first_step(g, 0.1)
    assert float(wild[1].abs()) > 1e7
    assert float(tame[1].abs()) < 1e-8
