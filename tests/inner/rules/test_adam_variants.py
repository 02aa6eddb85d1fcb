"""AdaBelief, Adan, AdamSSM, OptAMSGrad, AdEMAMix and AdaMomentum: what is special in each."""

import numpy as np
import pytest
import torch
from walks import F64, noise, number, walk

from hyperdescent.inner.registry import RULES
from hyperdescent.inner.rules import ademamix
from hyperdescent.inner.torch_form.optimizer import torch_form

GRADIENTS = noise(12, 3)


def weights(name, gradients=GRADIENTS, values=None, **options):
    return torch.stack([p for p, _ in walk(name, gradients, values, **options)])


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


class TestAdaBelief:
    def test_eps_adds_up_in_the_variance(self):
        given = {"beta2": 0.5, "eps": 1e-4}
        (_, s) = walk("adabelief", torch.zeros(60, 1, dtype=F64), given)[-1]
        assert_same(s["variance"], number([1e-4 / (1 - 0.5)]))

    def test_belief_is_in_what_the_new_average_leaves(self):
        (_, s), *_ = walk("adabelief", number([[2.0]]), {"eps": 0.0})
        assert_same(s["variance"], number([0.001 * (0.9 * 2.0) ** 2]))

    def test_rectified_it_begins_with_momentum(self):
        given = {"lr": 0.1}
        first = weights("adabelief", values=given, rectify=True)[0]
        assert_same(first, 1 - 0.1 * GRADIENTS[0])


class TestAdan:
    def test_without_differences_is_adamw(self):
        given = {"lr": 0.1, "beta1": 0.9, "weight_decay": 0.1}
        ours = weights("adan", values=given | {"beta2": 0.0, "beta3": 0.99}, no_prox=True)
        assert_same(ours, weights("adamw", values=given | {"beta2": 0.99}))

    def test_decay_divides_after_the_step(self):
        given = {"lr": 0.1, "weight_decay": 0.5}
        ours = weights("adan", values=given)[0]
        assert_same(ours, weights("adan", values=given | {"weight_decay": 0.0})[0] / 1.05)

    def test_the_first_gradient_has_no_difference(self):
        (_, s), *_ = walk("adan", GRADIENTS)
        assert not s["difference"].any()


class TestAdamSSM:
    def test_a_zero_on_the_pole_is_adam(self):
        ours = weights("adamssm", values={"pole": 0.7, "zero": 0.7, "weight_decay": 0.1})
        assert_same(ours, weights("adam", values={"weight_decay": 0.1}))

    def test_a_zero_at_beta2_leaves_the_pole(self):
        ours = weights("adamssm", values={"pole": 0.8, "beta2": 0.95, "zero": 0.95})
        assert_same(ours, weights("adam", values={"beta2": 0.8}))

    def test_a_constant_gradient_makes_steps_of_lr(self):
        constant = number([[3.0, -0.5]]).expand(20, 2)
        ours = weights("adamssm", constant, {"lr": 0.1, "eps": 0.0})
        steps = torch.arange(1, 21, dtype=F64)[:, None] * number([0.1, -0.1])
        assert_same(ours, 1 - steps)

    @pytest.mark.parametrize(("zero", "stays"), [(0.9, True), (0.91, False)])
    def test_the_second_moment_stays_positive_in_the_domain_and_only_there(self, zero, stays):
        impulse = torch.zeros(100, 1, dtype=F64)
        impulse[0] = 1
        given = {"beta2": 0.9, "pole": 0.3, "zero": zero}
        lowest = min(float(s["v"].min()) for _, s in walk("adamssm", impulse, given))
        assert (lowest >= 0) == stays
        problem = RULES["adamssm"].check(given)
        assert (problem is None) == stays

    def test_the_domain_is_checked_of_hypers_per_tensor(self):
        legal = {"beta2": number(0.9), "pole": number([0.5, 0.6]), "zero": number([0.9, 0.1])}
        check = RULES["adamssm"].check
        assert check(legal) is None
        assert check(legal | {"beta2": number([0.95, 0.8])}) is not None

    def test_refuses_what_can_become_negative(self):
        p = [torch.nn.Parameter(torch.ones(1))]
        with pytest.raises(ValueError, match="zero must be <= max"):
            torch_form(RULES["adamssm"])(p, beta2=0.9, pole=0.5, zero=0.95)


class TestOptAMSGrad:
    def test_is_optimistic_descent_where_the_scale_stands(self):
        g = number([[1.0], [0.9], [1.1], [1.0], [0.95]])  # v_max is that of the first step.
        given = {"lr": 0.1, "beta1": 0.0, "beta2": 0.9, "eps": 0.0}
        ours = weights("optamsgrad", g, given)
        rate, before = 0.1 / 0.1**0.5, torch.cat([torch.zeros(1, 1, dtype=F64), g[:-1]])
        expected = 1 - (rate * (2 * g - before)).cumsum(0)
        assert_same(ours, expected)

    def test_guesses_the_average(self):
        (_, s) = walk("optamsgrad", GRADIENTS, guess="momentum")[-1]
        assert torch.equal(s["guessed"], s["m"])


class TestAdEMAMix:
    def test_without_the_slow_average_is_adamw(self):
        given = {"lr": 0.1, "weight_decay": 0.1}
        assert_same(
            weights("ademamix", values=given | {"alpha": 0.0}), weights("adamw", values=given)
        )

    def test_beta3_is_linear_in_its_half_life(self):
        half = [ademamix.half_life(number(b)) for b in (0.9, 0.9999)]
        assert_same(half[1], number(np.log(0.5) / np.log(0.9999)))
        kept = [ademamix.of_half_life((1 - a) * half[0] + a * half[1]) for a in (0, 0.5, 1)]
        torch.testing.assert_close(
            torch.stack(kept), number([0.9, 0.9998, 0.9999]), rtol=0, atol=1e-6
        )

    def test_the_warm_ups_end(self):
        given = {"beta3_warmup": 5.0, "alpha_warmup": 7.0}
        ends = [walk("ademamix", GRADIENTS[:7], values)[-1] for values in (given, {})]
        p, s = ends[0]
        rule, t = RULES["ademamix"], number(8.0)
        after = [rule(p, GRADIENTS[7], s, t, rule.values(v))[0] for v in (given, {})]
        assert_same(*after)
        assert not torch.equal(p, ends[1][0])

    def test_beta1_of_0_has_a_value_and_slopes(self):
        given = {"beta1": 0.0, "beta3": 0.99, "beta3_warmup": 20.0}
        values = {n: number(v).requires_grad_() for n, v in given.items()}
        end = weights("ademamix", values=values)[-1]
        slopes = torch.autograd.grad(end.sum(), values.values())
        assert torch.stack(slopes).isfinite().all()
        near = weights("ademamix", values=given | {"beta1": 1e-300})[-1]
        torch.testing.assert_close(end.detach(), near, rtol=1e-3, atol=0)


class TestAdaMomentum:
    def test_eps_adds_up_in_the_second_moment(self):
        given = {"beta2": 0.5, "eps": 1e-4}
        (_, s) = walk("adamomentum", torch.zeros(60, 1, dtype=F64), given)[-1]
        assert_same(s["v"], number([1e-4 / (1 - 0.5)]))

    def test_the_second_moment_is_of_the_average(self):
        (_, s), *_ = walk("adamomentum", number([[2.0]]), {"eps": 0.0})
        assert_same(s["v"], number([0.001 * 0.2**2]))
