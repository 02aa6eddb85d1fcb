"""Fixed points of whole update rules against closed forms, replay and converged training."""

import pytest
import torch
from toys import Toy, descent, following, vector

from hyperdescent.inner.registry import find_rule
from hyperdescent.inner.schedules.schedule import find_schedule
from hyperdescent.meta.hypergradient import hypergradient
from hyperdescent.meta.implicit.fixed_point import FixedPoint, OnePass
from hyperdescent.meta.implicit.implicit import Unconverged
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.training.loop import run_training
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training

SCALE, RATE = vector(1.0, 0.5), 0.1
AIM, X = vector(3.0, -1.0), vector(1.0, 2.0)


def quadratic():
    return Toy(following(SCALE), lambda w, h: ((w - AIM) ** 2).sum() / 2, vector(0.0, 0.0), x=(2,))


def decayed(rule, steps, **given):
    return Training(quadratic(), find_rule(rule), steps, values={"lr": RATE} | given)


class TestGradientDescent:
    """Where w = x is reached, so that dF/dx = w - aim."""

    @pytest.mark.parametrize("terms", [0, 1, 5, 50])
    def test_is_the_series_and_its_residual(self, terms):
        run = descent(quadratic(), 2000, RATE)
        estimate, carry = FixedPoint(terms, tolerance=1.0)(run, {"x": X}, seed=0)
        step, slope = 1 - RATE * SCALE, X - AIM
        expected = (1 - step ** (terms + 1)) * slope
        torch.testing.assert_close(estimate.grad["x"], expected, rtol=1e-12, atol=1e-13)
        left = float((step ** (terms + 1) * slope).norm() / slope.norm())
        assert estimate.note.residual == pytest.approx(left, rel=1e-9)
        assert carry is None

    def test_equals_truncated_replay_of_a_converged_training(self):
        run = descent(quadratic(), 2000, RATE)
        estimate, _ = FixedPoint(6, tolerance=1.0)(run, {"x": X}, seed=0)
        cut, _ = Replay(window=7)(run, {"x": X}, seed=0)
        torch.testing.assert_close(estimate.grad["x"], cut.grad["x"], rtol=1e-12, atol=1e-13)

    def test_the_gap_is_what_is_left_of_the_loss(self):
        run = descent(quadratic(), 60, RATE)
        estimate, _ = FixedPoint(600)(run, {"x": X}, seed=0)
        short = (1 - RATE * SCALE) ** 60 * -X  # w - x after 60 steps from 0
        assert estimate.note.gap == pytest.approx(-float((X + short - AIM) @ short), rel=1e-9)


class TestOtherMaps:
    @pytest.mark.parametrize(
        ("rule", "given"),
        [
            ("sgd", {"momentum": 0.9}),
            ("sgd", {"momentum": 0.9, "weight_decay": 0.3}),
            ("sgd", {"weight_decay": 0.3}),
        ],
    )
    def test_momentum_and_coupled_decay_by_replay_to_the_end(self, rule, given):
        run = decayed(rule, 3000, **given)
        point = {"x": X} | {n: vector(v).squeeze() for n, v in given.items() if "decay" in n}
        estimate, _ = FixedPoint(3000)(run, point, seed=0)
        exact, _ = Replay()(run, point, seed=0)
        for name in point:
            torch.testing.assert_close(estimate.grad[name], exact.grad[name], rtol=1e-10, atol=0)
        assert estimate.note.residual < 1e-12

    def test_decoupled_decay_through_an_adaptive_rule(self):
        """AdamW, its eps so large that its map contracts, in closed form: the step is 0 where
        gradient / (|gradient| + eps) = -decay w, each weight by itself."""
        eps, decay = 0.5, 0.2
        run = decayed("adamw", 6000, eps=eps, weight_decay=decay, beta2=0.9)
        point = {"x": X, "weight_decay": vector(decay).squeeze()}
        estimate, _ = FixedPoint(3000)(run, point, seed=0)

        w, x, d = (
            z.clone().requires_grad_()
            for z in (run_training(run, run.resolve(point), 0).state.p, X, vector(decay))
        )
        g = SCALE * (w - x)
        still = g / (g.abs() + eps) + d * w
        assert float(still.detach().abs().max()) < 1e-8
        jac = torch.autograd.grad(still.sum(), w, retain_graph=True)[0]
        bars = -(w.detach() - AIM) / jac
        dx, dd = torch.autograd.grad(still, [x, d], bars)
        torch.testing.assert_close(estimate.grad["x"], dx, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(
            estimate.grad["weight_decay"], dd.squeeze(), rtol=1e-6, atol=1e-9
        )

    def test_a_map_that_does_not_contract_is_noisy(self):
        run = decayed("adam", 3000, eps=1e-8)
        estimate, _ = FixedPoint(40)(run, {"x": X}, seed=0)
        assert estimate.note.outcome is Outcome.NOISY and estimate.grad == {}
        assert estimate.note.residual > 0.1


class TestOnePass:
    def test_is_the_series_of_one_step_in_every_hyper_of_it(self):
        """Clarke et al. 2022: - d <u, p> / d hypers, u the update at the last weights."""
        rate, momentum, terms = 0.1, 0.8, 5
        run = descent(quadratic(), 10, rate, values={"momentum": momentum})
        point = {
            "x": X,
            "lr": vector(rate).squeeze(),
            "momentum": vector(momentum).squeeze(),
        }
        estimate, carry = OnePass(terms)(run, point, seed=0)
        w, velocity = carry.state.p, carry.state.slots["momentum_buffer"]
        gradient = SCALE * (w - X)
        slope = w - AIM
        total = sum((1 - rate * SCALE) ** k * slope for k in range(terms + 1))
        update = momentum * velocity + gradient
        torch.testing.assert_close(estimate.grad["x"], rate * SCALE * total)
        assert float(estimate.grad["lr"]) == pytest.approx(-float(update @ total), rel=1e-12)
        expected = -rate * float(velocity @ total)
        assert float(estimate.grad["momentum"]) == pytest.approx(expected, rel=1e-12)
        assert carry.steps == 10

    def test_goes_on_where_it_was(self):
        run, point = descent(quadratic(), 10, RATE), {"x": X}
        _, once = OnePass()(run, point, seed=0)
        _, twice = OnePass()(run, point, once, seed=0)
        whole = descent(quadratic(), 20, RATE)
        assert twice.steps == 20
        assert torch.equal(twice.state.p, run_training(whole, whole.resolve(point), 0).state.p)

    def test_refuses_a_schedule(self):
        run = Training(quadratic(), find_rule("sgd"), 10, schedules={"lr": find_schedule("cosine")})
        with pytest.raises(ValueError, match="lr has a schedule, which would begin anew"):
            OnePass()(run, {"x": X}, seed=0)


class TestRefusals:
    @pytest.mark.parametrize("name", ["lr", "momentum"])
    def test_a_hyper_that_does_not_move_the_fixed_point(self, name):
        run = descent(quadratic(), 10, RATE)
        with pytest.raises(ValueError, match=rf"{name} is a hyperparameter of sgd") as e:
            FixedPoint()(run, {name: vector(0.1).squeeze()}, seed=0)
        assert "learn only x, weight_decay" in str(e.value)

    @pytest.mark.parametrize("estimator", [FixedPoint, OnePass])
    def test_negative_terms(self, estimator):
        with pytest.raises(ValueError, match="terms=-1 is negative"):
            estimator(terms=-1)

    def test_an_unconverged_training_warns(self):
        with pytest.warns(Unconverged, match=r"has not converged after 5 steps.*replay"):
            FixedPoint(300)(descent(quadratic(), 5, RATE), {"x": X}, seed=0)

    def test_divergence_is_an_outcome(self):
        run = descent(quadratic(), 3000, 1e3)
        for estimator in (FixedPoint(), OnePass()):
            estimate, carry = estimator(run, {"x": X}, seed=0)
            assert estimate.note.outcome is Outcome.DIVERGED and carry is None


@pytest.mark.parametrize("method", ["fixed-point", "one-pass"])
def test_by_name(method):
    estimate = hypergradient(
        quadratic(), "sgd", learn="x", steps=300, values={"lr": 0.5}, method=method
    )
    assert estimate.ok and estimate.note.residual < 0.1
