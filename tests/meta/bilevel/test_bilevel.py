"""BDA, F2SA, V-PBGD, sl-BAMM and MEHA on problems whose answer is known, where others fail too."""

import gc
import math
import weakref

import pytest
import torch
from toys import DOUBLE, Toy, descent, following, vector

from hyperdescent.inner.registry import find_rule
from hyperdescent.meta.bilevel.bamm import BAMM
from hyperdescent.meta.bilevel.bda import BDA
from hyperdescent.meta.bilevel.meha import MEHA
from hyperdescent.meta.bilevel.penalty import Penalty
from hyperdescent.meta.estimators import METHODS
from hyperdescent.meta.hypergradient import hypergradient
from hyperdescent.meta.implicit.implicit import Implicit
from hyperdescent.meta.implicit.inner_solution import step_along
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training


def flat(start=0.0):
    """f leaves w[1] free, F does not: x = w[0] = w[1] = 1 (Liu et al. 2020)."""
    return Toy(
        lambda w, h: w[0] ** 2 / 2 - h["x"] * w[0],
        lambda w, h: (h["x"] - w[1]) ** 2 / 2 + (w[0] - 1) ** 2 / 2,
        vector(start, start),
        x=(),
    )


def simple():
    """w = x, and F = w^2 / 2 + (x - 1)^2 / 2, so x = 1 / 2."""
    return Toy(
        lambda w, h: w[0] ** 2 / 2 - h["x"] * w[0],
        lambda w, h: (h["x"] - 1) ** 2 / 2 + w[0] ** 2 / 2,
        vector(0.0),
        x=(),
    )


def at(x):
    return {"x": torch.tensor(x, dtype=DOUBLE)}


def zero(estimator, run):
    """Where an estimator's slope, linear in x here, is 0."""
    left, right = (float(estimator(run, at(x), seed=0)[0].grad["x"]) for x in (0.0, 1.0))
    return -left / (right - left)


def walk(estimator, run, x, calls, rate, low=-math.inf):
    """(x, carry) after so many outer steps x - rate(call) slope, kept above low."""
    x, carry = torch.as_tensor(x, dtype=DOUBLE), None
    for k in range(calls):
        estimate, carry = estimator(run, {"x": x}, carry, seed=0)
        assert estimate.ok, estimate.note.reason
        x = (x - rate(k) * estimate.grad["x"]).clamp(min=low)
    return x, carry


class TestManyMinimisers:
    """The flat toy, which plain metagradients and implicit differentiation get wrong."""

    def test_replay_fails(self):
        run = descent(flat(), 100, 0.5)
        assert zero(Replay(), run) == pytest.approx(0.5, abs=1e-12)

    def test_implicit_fails(self):
        # The Hessian has no inverse where f leaves a weight free.
        estimate, _ = Implicit()(descent(flat(), 100, 0.5), at(1.0), seed=0)
        assert estimate.note.outcome is Outcome.NOISY and estimate.note.residual == math.inf

    # Found for the specification with the rate .1.
    @pytest.mark.parametrize(("weight", "steps", "x"), [(0.5, 100, 0.99991), (0.1, 400, 0.9996)])
    def test_bda(self, weight, steps, x):
        assert zero(BDA(weight), descent(flat(), steps, 0.1)) == pytest.approx(x, abs=1e-5)

    def test_bda_whose_weight_decays_fast_comes_too_late(self):
        assert zero(BDA(decay=0.9), descent(flat(), 100, 0.1)) < 0.9

    def test_f2sa(self):
        assert zero(Penalty(10.0), descent(flat(), 400, 0.5)) == pytest.approx(1, abs=1e-6)

    def test_bamm(self):
        method = BAMM()
        x, _ = walk(
            method,
            descent(flat(0.01), 1, 0.1),
            0.01,
            1000,
            lambda k: 0.1 * (k + 1) ** (-1.5 * method.tau) * method.mu(k) ** 3,
        )
        assert float(x) == pytest.approx(0.926, abs=1e-3)

    def test_meha(self):
        method = MEHA(gamma=5.0, c0=0.6)
        run = descent(flat(), 1, 0.1)
        x, _ = walk(method, run, 0.0, 1000, lambda k: 0.01 / (0.6 * (k + 1) ** 0.25))
        assert float(x) == pytest.approx(0.939, abs=2e-3)


class TestBias:
    @pytest.mark.parametrize("penalty", [1.0, 3.0, 10.0, 100.0])
    def test_f2sa(self, penalty):
        x = zero(Penalty(penalty), descent(simple(), 400, 0.5))
        assert x == pytest.approx(1 / (1 + penalty / (1 + penalty)), rel=1e-12)

    @pytest.mark.parametrize("penalty", [3.0, 10.0, 100.0])
    def test_f2sa_symmetric(self, penalty):
        x = zero(Penalty(penalty, symmetric=True), descent(simple(), 400, 0.5))
        assert x == pytest.approx(1 / (1 + penalty**2 / (penalty**2 - 1)), rel=1e-12)

    def test_f2sa_falls_as_the_penalty_and_symmetric_as_its_square(self):
        def bias(penalty, symmetric):
            run = descent(simple(), 100, 0.5)
            return abs(zero(Penalty(penalty, symmetric=symmetric), run) - 0.5)

        for symmetric, slope in ((False, -1), (True, -2)):
            near, far = bias(1000.0, symmetric), bias(100.0, symmetric)
            assert math.log10(near / far) == pytest.approx(slope, abs=0.01)

    @pytest.mark.parametrize("c", [3.0, 0.6])
    def test_meha_with_a_fixed_c(self, c):
        method, held = MEHA(gamma=5.0, c0=c, power=0.0), 1 / 5.0
        x, carry = walk(method, descent(simple(), 1, 0.1), 0.5, 700, lambda k: 0.03)
        expected = (c + 1 + held) / (2 * c + 1 + held)
        assert float(x) == pytest.approx(expected, abs=1e-6)
        assert float(carry.y.p) == pytest.approx(c * expected / (c + 1 + held), abs=1e-6)

    def test_a_growing_penalty(self):
        method = Penalty(1.0, growth=2.0, limit=4.0, warm_start=True)
        run, carry, said = descent(simple(), 5, 0.5), None, []
        for _ in range(4):
            estimate, carry = method(run, at(0.5), carry, seed=0)
            said.append(estimate.note.how)
        assert said == ["penalty 1", "penalty 3", "penalty 4", "penalty 4"]
        assert carry.above.steps == carry.below.steps == 20


class TestKnownOptima:
    def test_f2sa_on_a_sine(self):
        """w in argmin sin(x + w - 2), F = (x - 2)^2 + (w - 4)^2: x = 3 pi / 4, w = x + 2."""
        x, carry = walk(
            Penalty(1000.0, warm_start=True), descent(sine(), 20, 0.3), 2.0, 60, lambda k: 0.2
        )
        assert float(x) == pytest.approx(3 * math.pi / 4, abs=1e-3)
        assert float(carry.above.state.p) == pytest.approx(3 * math.pi / 4 + 2, abs=1e-3)

    def test_meha_on_a_sine(self):
        method = MEHA(c0=1000.0, power=0.0)
        x, carry = walk(method, descent(sine(), 10, 0.3), 2.0, 200, lambda k: 0.02)
        assert float(x) == pytest.approx(3 * math.pi / 4, abs=1e-3)
        assert float(carry.y.p) == pytest.approx(3 * math.pi / 4 + 2, abs=1e-3)

    def test_meha_on_a_lasso(self):
        """f = |w - a|^2 / 2 + sum x |w|, F = sum w: every x beyond 1/4 in the first half will do,
        and F = -1/2."""
        a = vector(0.25, 0.25, -0.25, -0.25)
        toy = Toy(
            lambda w, h: ((w - a) ** 2).sum() / 2 + (h["x"] * w.abs()).sum(),
            lambda w, h: w.sum(),
            0 * a,
            x=(4,),
        )
        method = MEHA(gamma=10.0, c0=300.0, power=0.0)
        x, carry = walk(method, descent(toy, 20, 0.003), 0 * a + 0.1, 150, lambda k: 0.05, low=0)
        assert bool((x[:2] > 0.25).all()) and x[2:].tolist() == [0, 0]
        torch.testing.assert_close(carry.theta.p, vector(0, 0, -0.25, -0.25), rtol=0, atol=1e-3)

    def test_v_pbgd(self):
        """Shen & Chen 2023: w = -x, and of three minima on [0, 3] the lowest is at x = 1.2151."""
        toy = Toy(
            lambda w, h: ((h["x"] + w) ** 2 + h["x"] * torch.sin(h["x"] + w) ** 2).sum(),
            lambda w, h: (
                torch.cos(4 * w[0] + 2) / (1 + torch.exp(2 - 4 * h["x"]))
                + torch.log((4 * h["x"] - 2) ** 2 + 1) / 2
            ),
            vector(-1.0),
            x=(),
        )
        method = Penalty(0.0, growth=10.0, limit=1000.0, warm_start=True)
        x, _ = walk(method, descent(toy, 5, 0.1), 1.0, 250, lambda k: 0.02, low=0)
        assert float(x) == pytest.approx(1.2151, abs=1e-3)


def sine():
    return Toy(
        lambda w, h: torch.sin(h["x"] + w[0] - 2),
        lambda w, h: (h["x"] - 2) ** 2 + (w[0] - 4) ** 2,
        vector(4.0),
        x=(),
    )


class TestAnyRule:
    def test_a_step_along_the_training_loss_alone_is_the_training_step(self):
        run = Training(flat(), find_rule("adam"), 5)
        values, state = run.resolve(at(0.7)).at(0), run.begin(run.resolve(at(0.7)).at(0), 0)
        one, other = step_along(run, state, values, 3, 0), run.step(state, values, 3, 0)
        assert torch.equal(one.p, other.p) and one.slots.keys() == other.slots.keys()

    def test_bda_is_the_metagradient_of_what_it_says_it_trains(self):
        method = BDA(0.3, decay=0.9, scale=2.0)
        run = Training(flat(0.2), find_rule("adam"), 12, values={"lr": 0.05})
        point = at(0.7) | {"lr": vector(0.05).squeeze()}
        estimate, _ = method(run, point, seed=0)

        def final(x, lr):
            values = run.resolve({"x": x, "lr": lr}).constant
            state = run.begin(values, 0)
            for i in range(12):
                a = 0.3 * 0.9**i
                state = step_along(run, state, values, i, 0, inner=1 - a, outer=2 * a)
            return float(run.outer_loss(state, values))

        for name in point:
            h = 1e-6
            up, down = (point | {name: point[name] + s * h} for s in (1, -1))
            slope = (final(**up) - final(**down)) / (2 * h)
            assert float(estimate.grad[name]) == pytest.approx(slope, rel=1e-7)

    @pytest.mark.parametrize("momentum", [0.0, 0.8])
    @pytest.mark.parametrize("decay", [0.0, 0.5])
    @pytest.mark.parametrize(
        ("method", "error"),
        [
            (Penalty(1000.0), 5e-3),
            (Penalty(1000.0, batches=3), 5e-3),
            (Penalty(300.0, symmetric=True), 1e-4),
            (MEHA(c0=1000.0, power=0.0), 5e-3),
            (MEHA(c0=1000.0, power=0.0, speed=2.0), 5e-3),
        ],
    )
    def test_momentum_and_decay(self, method, error, decay, momentum):
        """w = x / (1 + decay), and F = (w - 3)^2 / 2."""
        toy = Toy(following(vector(1.0)), lambda w, h: (w[0] - 3) ** 2 / 2, vector(0.0), x=())
        given = {"lr": 0.1, "momentum": momentum, "weight_decay": decay}
        run = Training(toy, find_rule("sgd"), 250, values=given)
        estimate, _ = method(run, at(1.0), seed=0)
        expected = (1 / (1 + decay) - 3) / (1 + decay)
        assert float(estimate.grad["x"]) == pytest.approx(expected, rel=error)

    def test_bda_does_not_keep_its_problem_alive(self):
        toy = simple()
        BDA()(descent(toy, 3, 0.1), at(0.5), seed=0)
        gone = weakref.ref(toy)
        del toy
        gc.collect()
        assert gone() is None


class TestOutcomes:
    @pytest.mark.parametrize("method", [Penalty(), MEHA(), BAMM(), BDA()])
    def test_divergence(self, method):
        estimate, carry = method(descent(simple(), 2000, 1e3), at(0.5), seed=0)
        assert estimate.note.outcome is Outcome.DIVERGED and carry is None

    @pytest.mark.parametrize("method", [Penalty(), MEHA(), BAMM(), BDA()])
    def test_a_held_out_loss_without_a_graph(self, method):
        toy = Toy(
            lambda w, h: (w**2).sum() - h["x"] * w[0],
            lambda w, h: (w > 0).double().sum(),
            vector(1.0),
            x=(),
        )
        estimate, _ = method(descent(toy, 5, 0.1), at(0.5), seed=0)
        assert estimate.note.outcome is Outcome.NOT_DIFFERENTIABLE

    @pytest.mark.parametrize("method", [Penalty(), MEHA(), BAMM()])
    def test_a_hyper_of_the_rule(self, method):
        with pytest.raises(ValueError, match="lr is a hyperparameter of sgd"):
            method(descent(simple(), 5, 0.1), {"lr": vector(0.1).squeeze()}, seed=0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Penalty(-1.0), "must not be negative"),
        (lambda: Penalty(5.0, limit=3.0), "limit=3 not below"),
        (lambda: Penalty(1.0, symmetric=True), "penalty above 1"),
        (lambda: Penalty(batches=0), "batches=0 leaves no loss"),
        (lambda: Penalty(growth=1.0), "growth=1 is from call to call"),
        (lambda: MEHA(gamma=0.0), "gamma=0 must be positive"),
        (lambda: MEHA(power=0.5), "power=0.5 must be"),
        (lambda: BAMM(mu0=1.0), "mu0=1 must be between"),
        (lambda: BAMM(rate=0.0), "rate=0 must be positive"),
        (lambda: BAMM(tau=-1.0), "tau=-1 must not be negative"),
        (lambda: BDA(1.0), "weight=1 must be between"),
        (lambda: BDA(decay=0.0), "decay=0 must be above 0"),
        (lambda: BDA(scale=0.0), "scale=0 must be positive"),
    ],
)
def test_options_that_cannot_be_meant(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("method", ["bda", "f2sa", "v-pbgd", "bamm", "meha"])
def test_by_name(method):
    assert method in METHODS
    estimate = hypergradient(flat(1.0), "sgd", learn="x", steps=9, method=method)
    assert estimate.ok and float(estimate.grad["x"]) != 0
