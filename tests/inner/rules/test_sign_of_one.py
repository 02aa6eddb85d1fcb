"""Grams, Ano and Anolog: the sign of one average with the size of another."""

import pytest
import torch
from walks import F64, noise, number, walk

from hyperdescent.inner.registry import RULES


class TestGrams:
    def test_is_adamw_where_gradients_keep_their_sign(self):
        g = noise(20, 5, 4, 3, 2).abs() + 0.1
        given = {"lr": 0.1, "eps": 0.0, "weight_decay": 0.1}  # Their eps differ in place.
        ours, theirs = (walk(name, g, given)[-1][0] for name in ("grams", "adamw"))
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)

    def test_turns_with_the_gradient_and_rests_where_it_is_0(self):
        g = number([[1.0, 1.0], [-0.1, 0.0]])
        (first, _), (second, _) = walk("grams", g, {"lr": 0.1})
        assert second[0] > first[0], "the momentum is still positive"
        assert second[1] == first[1]

    def test_a_cold_surrogate_is_the_sign(self):
        g = noise(20, 5)
        sharp = walk("grams", g, {"lr": 0.1})[-1][0]
        cold = walk("grams", g, {"lr": 0.1, "temperature": 1e-9}, smooth=True)[-1][0]
        assert torch.equal(cold, sharp)


class TestAno:
    def test_first_step(self):
        g, given = number([[3.0, -1e-3]]), {"lr": 0.1, "eps": 1e-4}
        (p, _), *_ = walk("ano", g, given)
        # v / (1 - beta2) is g * g, and eps is inside the root.
        expected = 1 - 0.1 * g[0] / (g[0] ** 2 + 1e-4).sqrt()
        torch.testing.assert_close(p, expected, rtol=1e-14, atol=0)

    def test_sign_is_of_the_momentum_and_size_of_the_gradient(self):
        g = number([[1.0], [-0.01]])
        (first, _), (second, s) = walk("ano", g, {"lr": 0.1})
        size = 0.1 * 0.01 / (s["v"] / (1 - 0.99**2) + 1e-8).sqrt()
        torch.testing.assert_close(second, first - size, rtol=1e-14, atol=0)

    @pytest.mark.parametrize(("beta2", "stays"), [(0.5, True), (0.4, False)])
    @pytest.mark.parametrize("name", ["ano", "anolog"])
    def test_the_second_moment_stays_positive_from_a_half_on(self, name, beta2, stays):
        rule = RULES[name]
        values, v = rule.values({"beta2": beta2}), number([1.0])
        s = {"m": number([0.0]), "v": v}
        # The worst gradient: just small enough to count against it.
        _, s = rule(v, v.sqrt() * (1 - 1e-9), s, number(9.0), values)
        assert (s["v"] >= 0) == stays
        for given in (beta2, number([0.9, beta2])):
            assert (rule.check({"beta2": given}) is None) == stays


class TestAnolog:
    def test_is_ano_with_a_momentum_that_lengthens(self):
        g = noise(10, 5)
        rules, given = [RULES["anolog"], RULES["ano"]], {"lr": 0.1, "beta2": 0.9}
        beta1 = [0.0, 0.0, 0.0897607, 0.2786525]
        (p, q), s = (torch.ones(5, dtype=F64),) * 2, rules[1].init(g[0], {})
        r = dict(s)
        for step, (kept, each) in enumerate(zip(beta1, g, strict=False), 1):
            t = number(float(step))
            p, s = rules[0](p, each, s, t, rules[0].values(given))
            q, r = rules[1](q, each, r, t, rules[1].values(given | {"beta1": kept}))
            torch.testing.assert_close(s["m"], r["m"], rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(p, q, rtol=1e-14, atol=0)

    def test_the_second_step_forgets_the_first_and_subtracts_nothing(self):
        (_, _), (_, s) = walk("anolog", number([[5.0], [2.0]]))
        assert torch.equal(s["m"], number([2.0]))
