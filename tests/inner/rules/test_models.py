"""Rules that use the loss or its graph: the lengths of their steps, and their limits."""

import pytest
import torch

from hyperdescent.inner.core.flat import flat_step, initial_slots
from hyperdescent.inner.core.layout import Layout
from hyperdescent.inner.registry import RULES

F64 = torch.float64


def number(x):
    return torch.tensor(x, dtype=F64)


def noise(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def first(rule, g, loss=None, **given):
    """The first step from 0."""
    values = rule.values(given)
    p = torch.zeros_like(g)
    s = rule.init(p, values)
    return rule(p, g, s, number(1.0), values, loss=loss and number(loss))[0]


@pytest.mark.parametrize("xi", [0.0, 0.25, 4.0])
def test_the_metrics_step_peaks_and_then_shrinks(xi):
    for length in (0.1, 1.0, 10.0):
        g = number([3.0, -4.0]) / 5 * length
        step = first(RULES["inducedmetric"], g, lr=1.0, xi=xi)
        torch.testing.assert_close(step, -g / (1 + xi * length**2), rtol=1e-12, atol=0)
    peak = first(RULES["inducedmetric"], number([2.0]), lr=1.0, xi=0.25).abs()
    for length in (1.9, 2.1):
        assert first(RULES["inducedmetric"], number([length]), lr=1.0, xi=0.25).abs() < peak


def test_the_metric_is_the_inverse_of_that_of_the_graph():
    g, xi = noise(0, (5,)), 0.7
    metric = torch.eye(5, dtype=F64) + xi * torch.outer(g, g)
    step = first(RULES["inducedmetric"], g, lr=1.0, xi=xi)
    torch.testing.assert_close(-step, torch.linalg.solve(metric, g), rtol=1e-12, atol=0)
    # Over the metric a = |g| + eps of one step of RMSprop.
    eps = 0.1
    ambient = (g.abs() + eps).diag() + xi * torch.outer(g, g)
    rms = RULES["inducedmetric"].choose(form="rms")
    step = first(rms, g, lr=1.0, xi=xi, eps=eps)
    torch.testing.assert_close(-step, torch.linalg.solve(ambient, g), rtol=1e-12, atol=0)


def test_the_log_metric_descends_log_loss_in_its_graph():
    g, loss, xi = noise(0, (5,)), 2.5, 0.7
    metric = torch.eye(5, dtype=F64) + xi * torch.outer(g / loss, g / loss)
    step = first(RULES["loginducedmetric"], g, loss, lr=1.0, xi=xi)
    torch.testing.assert_close(-step, torch.linalg.solve(metric, g / loss), rtol=1e-12, atol=0)


def walk(rule, given, factor=1.0, steps=8):
    """The weights and slots after steps on |p - drift|^2 / 2 + 1, times a factor."""
    layout = Layout.of({"a": torch.zeros(2, 3), "b": torch.zeros(2)})
    values = rule.values(given)
    p = noise(0, (8,))
    s = initial_slots(rule, layout, p, values)
    for step in range(1, steps + 1):
        d = p - noise(step, (8,))
        t, loss = number(float(step)), factor * ((d * d).sum() / 2 + 1)
        p, s = flat_step(rule, layout, p, factor * d, s, t, values, loss=loss)
    return p, s


def test_the_unit_of_the_loss_is_nothing_to_the_log_metric():
    given = {"lr": 1.0, "xi": 0.5}
    one, _ = walk(RULES["loginducedmetric"], given)
    torch.testing.assert_close(
        walk(RULES["loginducedmetric"], given, factor=1e4)[0], one, rtol=1e-12, atol=1e-14
    )


def test_a_loss_of_zero_leaves_the_log_metric_where_it_is():
    g = torch.zeros(3, dtype=F64).requires_grad_()
    loss = number(0.0).requires_grad_()
    rule = RULES["loginducedmetric"]
    values = rule.values()
    p = torch.ones(3, dtype=F64)
    end, _ = rule(p, g, rule.init(p, values), number(1.0), values, loss=loss)
    assert torch.equal(end, p)
    assert all(x.isfinite().all() for x in torch.autograd.grad(end.sum(), (g, loss)))


def test_without_xi_the_plain_metric_is_an_unbiased_average():
    end, s = walk(RULES["inducedmetric"], {"lr": 0.1, "momentum": 0.8, "xi": 0.0})
    p, m = noise(0, (8,)), torch.zeros(8, dtype=F64)
    for step in range(1, 9):
        m = 0.8 * m + 0.2 * (p - noise(step, (8,)))
        p = p - 0.1 * m / (1 - 0.8**step)
    torch.testing.assert_close(end, p, rtol=1e-12, atol=0)
    assert s["metric"].shape == () and s["metric"] == 0


@pytest.mark.parametrize("lr", [1e-3, 1.0, 1e3])
def test_the_truncated_step_minimises_the_truncated_model(lr):
    g, loss, floor = number([2.0, -1.0]), 3.0, 0.5
    step = first(RULES["truncatedmodel"], g, loss, lr=lr, floor=floor)
    rate = min(lr, (loss - floor) / 5)
    torch.testing.assert_close(step, -rate * g, rtol=1e-12, atol=0)

    def model(d):
        return (loss + d @ g).clamp(min=floor) + (d * d).sum(-1) / (2 * lr)

    around = step + 0.1 * step.norm() * noise(0, (1000, 2))
    assert (model(around) >= model(step[None]) - 1e-12).all()


def test_below_its_floor_the_truncated_model_rests():
    for name in ("truncatedmodel", "truncatedadagrad"):
        assert (first(RULES[name], number([2.0, -1.0]), 0.3, floor=0.5) == 0).all()


def test_far_too_large_rates_solve_an_interpolated_problem():
    # On |a p|^2 / 2 a capped Polyak step contracts the distance whatever the rate; SGD diverges.
    ends = []
    for lr in (1e1, 1e4):
        p, rule = number([1.0, 1.0]), RULES["truncatedmodel"]
        values = rule.values({"lr": lr})
        before = p.norm()
        for _ in range(60):
            scale = number([1.0, 2.0])
            p, _ = rule(p, scale**2 * p, {}, number(1.0), values, loss=((scale * p) ** 2).sum() / 2)
            assert p.norm() < before
            before = p.norm()
        ends.append(p)
    torch.testing.assert_close(*ends, rtol=1e-9, atol=0)
    assert ends[0].norm() < 1e-6


def test_a_rate_per_element_is_a_metric_of_the_model():
    rule, g = RULES["truncatedmodel"], number([2.0, -1.0])
    for loss in (1.0, 100.0):
        rates = number([0.5, 2.0])
        p, s = torch.zeros(2, dtype=F64), {}
        values = {"lr": rates, "floor": number(0.0)}
        step, _ = rule(p, g, s, number(1.0), values, loss=number(loss))
        share = min(1.0, loss / float((rates * g * g).sum()))
        torch.testing.assert_close(step, -share * rates * g, rtol=1e-12, atol=0)


def test_truncated_adagrad_is_adagrad_far_from_the_floor_and_ends_on_it():
    g, eps = noise(0, (6,)), {"eps": 1e-10}
    far = first(RULES["truncatedadagrad"], g, 1e9, lr=0.1, **eps)
    torch.testing.assert_close(far, first(RULES["adagrad"], g, lr=0.1, **eps), rtol=1e-12, atol=0)
    near = first(RULES["truncatedadagrad"], g, 0.01, lr=0.1, **eps)
    torch.testing.assert_close(0.01 + g @ near, number(0.0), rtol=0, atol=1e-14)
    torch.testing.assert_close(near / near.norm(), far / far.norm(), rtol=1e-12, atol=0)
