"""What the cosh of AuON comes to: nothing."""

import math

import pytest
import torch

from hyperdescent.inner.registry import RULES

F64 = torch.float64


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def path(rule, shape, steps=5, **given):
    values = rule.values(given)
    p = noise(0, *shape)
    s = rule.init(p, values)
    for t in range(1, steps + 1):
        p, s = rule(p, noise(t, *shape), s, torch.tensor(float(t), dtype=F64), values)
    return p - noise(0, *shape)


def step(rule, g, **given):
    values = rule.values({"lr": 1.0, "momentum": 0.0} | given)
    p = torch.zeros_like(g)
    return -rule(p, g, rule.init(p, values), torch.tensor(1.0, dtype=F64), values)[0]


def divisor_squared(g):
    """From the step of a matrix that is wide, and so without a factor of its shape."""
    return (1 / step(RULES["auon"], g).square().sum()).item()


class TestAuON:
    @pytest.mark.parametrize("shape", [(4, 6), (16, 16), (64, 64)])
    def test_divisor_is_between_its_bounds_which_are_next_to_one(self, shape):
        n = math.prod(shape)
        # All entries alike has the least, a single one the greatest: cosh(1)**2 = 1 + 1.3811.
        alike, single = torch.ones(shape, dtype=F64), torch.zeros(shape, dtype=F64)
        single[0, 0] = 1
        least, most = math.cosh(n**-0.5) ** 2, 1 + math.sinh(1) ** 2 / n
        assert 1 + 1 / n < least and most < 1 + 1.382 / n
        assert divisor_squared(alike) == pytest.approx(least, abs=1e-6)
        assert divisor_squared(single) == pytest.approx(most, abs=1e-6)
        for seed in range(20):
            heavy = noise(seed, *shape) ** 5
            assert least - 1e-6 < divisor_squared(heavy) < most + 1e-6

    def test_is_momentum_of_unit_norm(self):
        shape, total, p = (64, 64), 0, 0
        for t in range(1, 6):
            g = noise(t, *shape)
            total = 0.95 * total + g
            u = 0.95 * total + g
            p = p - 0.02 * u / u.norm()
        found = path(RULES["auon"], shape)
        assert ((found - p).norm() / p.norm()).item() < 1.4e-4  # 1 / (2 N), as it turns out.

    def test_gamma_matters_from_the_root_of_the_size_on(self):
        g = noise(0, 64, 64)
        size = {gamma: step(RULES["auon"], g, gamma=gamma).norm() for gamma in (1.0, 1.5, 64.0)}
        assert size[1.5] / size[1.0] == pytest.approx(1, abs=3e-4)
        assert size[64.0] < 0.5

    def test_is_finite_in_float32_at_the_ends_of_the_range_of_gamma(self):
        single = torch.zeros(3, 4)
        single[0, 0] = 1.0
        for name in ("auon", "hybridauon"):
            for gamma in RULES[name].hypers["gamma"].search:
                assert step(RULES[name], single, gamma=gamma).isfinite().all()


class TestHybrid:
    def test_is_muon_of_as_many_steps(self):
        given = {"momentum": 0.9, "lr": 0.1}
        for steps, bound in ((1, 12 / 4096), (5, 64 / 4096)):
            ours = path(RULES["hybridauon"].choose(ns_steps=steps), (64, 64), **given)
            muon = path(RULES["muon"].choose(ns_steps=steps), (64, 64), **given)
            # The square of the divisor is 1 + |x|**2 / N of what comes out of the steps.
            assert 0 < (muon - ours).norm() / muon.norm() < bound / 2 * 1.3

    def test_one_step_is_steep_at_zero(self):
        s = torch.tensor([1.0, 1e-3, 1e-4], dtype=F64)
        made = torch.linalg.svdvals(step(RULES["hybridauon"], s.diag()))
        # All are divided by one number: of three entries it is not near 1.
        ratio = made[1:] / made[0] * (3.4445 - 4.7750 + 2.0315)
        torch.testing.assert_close(ratio, 3.4445 * s[1:], rtol=1e-4, atol=0)
