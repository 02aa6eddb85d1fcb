"""Hypers that move during their one training: each estimator's formula, and the loop around it."""

from dataclasses import replace

import pytest
import torch
from toys import DOUBLE, Toy, descent, following, vector

import hyperdescent as hd
from hyperdescent.inner.registry import find_rule
from hyperdescent.meta.forward.forward import Forward
from hyperdescent.meta.implicit.fixed_point import OnePass
from hyperdescent.meta.implicit.hypergradient_descent import HypergradientDescent
from hyperdescent.meta.implicit.implicit import Implicit
from hyperdescent.meta.online import train_online
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.training.estimate import Estimate
from hyperdescent.meta.training.loop import run_training
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training

SCALE, AIM, X = vector(1.0, 0.5), vector(3.0, -1.0), vector(1.0, 2.0)


def quadratic():
    return Toy(following(SCALE), lambda w, h: ((w - AIM) ** 2).sum() / 2, vector(0.0, 0.0), x=(2,))


def one(value):
    return torch.tensor(value, dtype=DOUBLE)


class TestHypergradientDescent:
    def test_is_minus_the_product_of_two_gradients_in_a_row(self):
        """Baydin et al. 2018."""
        method, carry, rate = HypergradientDescent(), None, 0.1
        run = descent(quadratic(), 1, rate)
        point, w = {"lr": one(rate)}, vector(0.0, 0.0)
        for _ in range(4):
            estimate, carry = method(run, point, carry, seed=0)
            # x is 0 where it is not given.
            before, w = SCALE * w, w - rate * SCALE * w
            expected = -float((SCALE * w) @ before)
            assert float(estimate.grad["lr"]) == pytest.approx(expected, rel=1e-12, abs=1e-15)
            assert torch.equal(carry.state.p, w)

    def test_of_several_steps_it_sees_the_last(self):
        run = descent(quadratic(), 6, 0.1, values={"momentum": 0.8, "x": X})
        point = {"lr": one(0.1), "momentum": one(0.8)}
        estimate, carry = HypergradientDescent()(run, point, seed=0)
        # A held-out loss that is the training loss, at the same weights.
        same = Toy(following(SCALE), following(SCALE), quadratic().w, x=(2,))
        cut, _ = Replay(window=1)(replace(run, problem=same), point, seed=0)
        for name in point:
            torch.testing.assert_close(estimate.grad[name], cut.grad[name])
        assert carry.steps == 6 and torch.equal(
            carry.state.p, run_training(run, run.resolve(point), 0).state.p
        )

    def test_a_hyper_of_the_loss_would_be_switched_off(self):
        with pytest.raises(ValueError, match="x is in the training loss"):
            HypergradientDescent()(descent(quadratic(), 6, 0.1), {"x": X}, seed=0)

    def test_divergence_is_an_outcome(self):
        run = descent(quadratic(), 400, 1e3, values={"x": X})
        estimate, carry = HypergradientDescent()(run, {"lr": one(1e3)}, seed=0)
        assert estimate.note.outcome is Outcome.DIVERGED and carry is None


class TestDiscount:
    @pytest.mark.parametrize("discount", [0.0, 0.6, 1.0])
    def test_is_the_recursion(self, discount):
        """MARTHE: Z = discount (1 - rate scale) Z - gradient, and its product with dF/dw."""
        rate, steps = 0.1, 12
        run = descent(quadratic(), steps, rate, values={"x": X})
        estimate, _ = Forward(discount=discount, compile=False)(run, {"lr": one(rate)}, seed=0)
        w = z = vector(0.0, 0.0)
        for _ in range(steps):
            gradient = SCALE * (w - X)
            z, w = discount * (1 - rate * SCALE) * z - gradient, w - rate * gradient
        assert float(estimate.grad["lr"]) == pytest.approx(float(z @ (w - AIM)), rel=1e-12)

    def test_only_the_last_step_is_replay_of_one(self):
        run = descent(quadratic(), 9, 0.1, values={"x": X})
        point = {"lr": one(0.1), "x": X}
        last, _ = Forward(discount=0.0, compile=False)(run, point, seed=0)
        cut, _ = Replay(window=1)(run, point, seed=0)
        for name in point:
            torch.testing.assert_close(last.grad[name], cut.grad[name], rtol=1e-12, atol=1e-15)

    def test_outside_is_refused(self):
        with pytest.raises(ValueError, match=r"discount=1.5 must be between"):
            Forward(discount=1.5)


class TestLoop:
    def test_is_the_estimator_and_adam_in_turns(self):
        given = {"lr": 0.05, "x": X}
        found = train_online(
            quadratic(), "sgd", learn="lr", steps=25, every=10, rate=0.2, values=given
        )
        z = one(0.05).log().requires_grad_()
        optimizer, carry = torch.optim.Adam([z], lr=0.2, betas=(0.9, 0.99)), None
        for count in (10, 10, 5):
            run = Training(quadratic(), find_rule("sgd"), count, values=given)
            estimate, carry = OnePass()(run, {"lr": z.detach().exp()}, carry, seed=0)
            z.grad = estimate.grad["lr"] * z.detach().exp()
            optimizer.step()
            with torch.no_grad():
                z.clamp_(*run.hypers["lr"].box())
        assert torch.equal(found.trained.params["w"], carry.state.p)
        assert float(found.values["lr"][-1]) == pytest.approx(float(z.detach().exp()), rel=1e-12)
        assert found.values["lr"].shape == (4,) and len(found.losses) == 3
        assert found.outcome is Outcome.OK and not found.skipped

    @pytest.mark.parametrize(
        ("method", "learn"),
        [
            ("one-pass", "lr,weight_decay"),
            (HypergradientDescent(), "lr"),
            (Forward(discount=0.9, compile=False), "lr"),
            (Forward(compile=False), "lr"),
        ],
    )
    def test_a_rate_that_is_far_too_small_grows(self, method, learn):
        problem, given = hd.load_problem("wine-mlp"), {"lr": 1e-5}
        plain = hd.train(problem, "adamw", steps=120, values=given).measures["valid"]["loss"]
        found = train_online(
            problem, "adamw", learn=learn, steps=120, every=5, rate=0.4, method=method, values=given
        )
        assert found.trained.measures["valid"]["loss"] < plain / 2
        assert float(found.values["lr"][-1]) > 1e-4

    def test_hypers_of_the_loss_by_warm_started_implicit_differentiation(self):
        problem = hd.load_problem("breast-cancer-logistic")
        found = train_online(
            problem,
            "sgd",
            learn="l2",
            steps=300,
            every=10,
            rate=0.3,
            method=Implicit(warm_start=True),
            values={"lr": 0.5, "l2": 1.0},
        )
        plain = hd.train(problem, "sgd", steps=300, values={"lr": 0.5, "l2": 1.0})
        assert found.trained.measures["valid"]["loss"] < plain.measures["valid"]["loss"] - 0.02
        assert float(found.values["l2"][-1]) < 0.1

    def test_a_move_not_to_be_trusted_is_left_out_and_training_goes_on(self):
        never = Implicit(warm_start=True, tolerance=0.0)
        found = train_online(
            hd.load_problem("breast-cancer-logistic"),
            "sgd",
            learn="l2",
            steps=20,
            every=10,
            method=never,
            values={"lr": 0.5},
        )
        assert found.trained.ok and list(found.skipped) == [10, 20]
        assert "residual" in found.skipped[10]
        assert len(set(found.values["l2"].tolist())) == 1

    def test_a_gradient_that_overflows_does_not_end_a_healthy_training(self):
        class Overflowing(OnePass):
            def __call__(self, training, point, carry=None, *, seed):
                _, carry = super().__call__(training, point, carry, seed=seed)
                return Estimate.diverged(training.steps, "the metagradient is not finite"), carry

        given = {"lr": 0.1, "x": X}
        found = train_online(quadratic(), "sgd", steps=20, method=Overflowing(), values=given)
        plain = descent(quadratic(), 20, 0.1, values={"x": X})
        assert found.outcome is Outcome.OK and list(found.skipped) == [10, 20]
        assert torch.equal(
            found.trained.params["w"], run_training(plain, plain.resolve({}), 0).state.p
        )

    def test_divergence_keeps_what_there_is(self):
        found = train_online(quadratic(), "sgd", steps=800, every=400, values={"lr": 1e3, "x": X})
        assert found.outcome is Outcome.DIVERGED and not found.trained.params
        assert found.values["lr"].shape == (1,) and "finite" in found.reason

    def test_of_many_numbers_the_last_are_kept(self):
        aim = torch.linspace(-1, 1, 1500, dtype=DOUBLE)
        toy = Toy(
            following(torch.ones_like(aim)), lambda w, h: ((w - aim) ** 2).sum(), 0 * aim, x=(1500,)
        )
        given = {"lr": 0.5}
        found = train_online(toy, "sgd", learn="x", steps=40, every=10, rate=0.1, values=given)
        assert found.values["x"].shape == (1, 1500) and len(found.losses) == 4
        assert found.values["x"].any() and found.losses[-1] < found.losses[0]

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"every": 0}, "every=0 must be from 1"),
            ({"every": 30}, "every=30 must be from 1 to steps=20"),
            ({"rate": 0.0}, "rate=0 must be positive"),
            ({"method": "newton"}, "there is no method 'newton'"),
        ],
    )
    def test_what_cannot_be_meant(self, options, told):
        with pytest.raises(ValueError, match=told):
            train_online(quadratic(), "sgd", learn="lr", **{"steps": 20} | options)

    def test_a_method_that_begins_anew_each_time(self):
        with pytest.raises(TypeError, match="begins anew at every call"):
            train_online(quadratic(), "sgd", learn="lr", steps=20, method="replay")

    def test_a_method_of_several_trainings(self):
        with pytest.raises(TypeError, match="has no single training"):
            train_online(quadratic(), "sgd", learn="x", steps=20, method="meha")
