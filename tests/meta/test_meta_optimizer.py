"""The meta-optimizer on a stub estimator: a quadratic in coordinates whose minimum is known."""

import math

import pytest
import torch

from hyperdescent.inner.core.flat import flat_step, initial_slots
from hyperdescent.inner.core.hyper import decay, learning_rate
from hyperdescent.inner.registry import RULES, find_rule
from hyperdescent.meta.meta_optimizer import MetaOptimizer
from hyperdescent.meta.training.coordinates import Coordinates
from hyperdescent.meta.training.estimate import Estimate, Estimator, Note
from hyperdescent.meta.training.outcome import Outcome

COORDINATES = Coordinates({"lr": learning_rate(1e-3), "lr.knots": learning_rate(1e-3).shaped(2)})
START = {"lr": torch.tensor(1e-3), "lr.knots": torch.tensor([1e-3, 1e-2])}
MINIMUM = torch.tensor([1e-2, 1e-2, 1e-3], dtype=torch.float64).log()


def quadratic(point, minimum=MINIMUM, scale=1.0):
    """The estimate of scale * (1 + |z - minimum|**2) at a point."""
    leaves = {name: value.detach().requires_grad_() for name, value in point.items()}
    loss = scale * (1 + (COORDINATES.free(leaves) - minimum).square().sum())
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return Estimate(float(loss.detach()), dict(zip(leaves, grads, strict=True)))


class Stub(Estimator):
    """An estimator that asks `judge` at every coordinates, counting from call 0."""

    def __init__(self, judge=lambda call, point: quadratic(point)):
        self.judge, self.calls, self.seeds = judge, 0, []

    def __call__(self, training, point, carry=None, *, seed):
        self.calls += 1
        self.seeds.append(seed)
        return self.judge(self.calls - 1, point), (carry or 0) + 1


def descend(meta, steps, *, progress=lambda k, steps: k / steps):
    """(descent, coordinates before every step, estimates)."""
    descent, path, estimates = meta.begin(COORDINATES, START), [], []
    for k in range(steps):
        path.append(descent.z)
        estimates.append(meta.step(None, COORDINATES, descent, seed=k, progress=progress(k, steps)))
    return descent, path, estimates


def failing(outcome=Outcome.DIVERGED, reason="the stub says so"):
    return Estimate(float("inf"), {}, Note(outcome, reason))


def test_it_converges_to_the_minimum():
    descent, _, estimates = descend(MetaOptimizer(Stub()), 150)
    assert descent.outcome is Outcome.OK
    # 0.05 in a logarithm is 5 % of a learning rate.
    torch.testing.assert_close(descent.z, MINIMUM, rtol=0, atol=0.05)
    assert estimates[-1].loss < 1.01 < estimates[0].loss


def test_the_first_estimate_is_at_the_start():
    _, path, _ = descend(MetaOptimizer(Stub()), 1)
    torch.testing.assert_close(path[0], COORDINATES.free(START), rtol=0, atol=0)


def test_it_passes_the_seed_and_the_carry_on():
    stub = Stub()
    descent, _, _ = descend(MetaOptimizer(stub), 4)
    assert stub.seeds == [0, 1, 2, 3]
    assert descent.carry == 4


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_path_does_not_depend_on_the_unit_of_the_loss(scale):
    stubs = [Stub(), Stub(lambda call, point: quadratic(point, scale=scale))]
    ends = [descend(MetaOptimizer(stub), 20)[0].z for stub in stubs]
    torch.testing.assert_close(*ends, rtol=1e-9, atol=0)


@pytest.mark.parametrize("rest", [0.0, -1.0])
def test_a_loss_that_reaches_or_crosses_zero_is_descended_too(rest):
    def judge(call, point):
        estimate = quadratic(point)
        return Estimate(estimate.loss - 1 + rest, estimate.grad)

    descent, _, _ = descend(MetaOptimizer(Stub(judge)), 150)
    assert descent.outcome is Outcome.OK
    torch.testing.assert_close(descent.z, MINIMUM, rtol=0, atol=0.1)


@pytest.mark.parametrize("bound", [0.01, 0.5])
@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_no_coordinate_moves_more_than_the_bound(rule, bound):
    # A return to a better place is no step; TestDrift looks at those.
    meta = MetaOptimizer(Stub(), rule=rule, rate=1e3, bound=bound, jump=math.inf, drift=math.inf)
    _, path, _ = descend(meta, 20)
    moves = torch.stack(path).diff(dim=0).abs()
    assert moves.max() <= bound * (1 + 1e-12)
    assert moves.max() >= bound * (1 - 1e-12)  # The rate asks for far more.


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_a_move_is_a_step_of_the_meta_rule(rule):
    """On the relative gradient over its largest entry, cut to the bound and kept inside."""
    meta = MetaOptimizer(Stub(), rule=rule)
    _, path, estimates = descend(meta, 2, progress=lambda k, steps: 0.0)
    z, grad = path[0], COORDINATES.pull(path[0], estimates[0].grad)
    own = {"lr": meta.rate, "beta1": meta.beta1, "beta2": meta.beta2, "eps": meta.eps}
    roles = {name: hyper.role or name for name, hyper in rule.hypers.items()}
    values = rule.values({n: own[role] for n, role in roles.items() if role in own})
    slots = initial_slots(rule, COORDINATES.layout, z, values)
    unit, t = grad.abs().max(), torch.ones((), dtype=torch.float64)
    loss = torch.tensor(estimates[0].loss, dtype=torch.float64) / unit
    moved, _ = flat_step(rule, COORDINATES.layout, z, grad / unit, slots, t, values, loss=loss)
    expected = COORDINATES.inside(z + (moved - z).clamp(-meta.bound, meta.bound))
    # The unit is a product of quotients in one, a quotient in the other.
    torch.testing.assert_close(path[1], expected, rtol=1e-12, atol=1e-12)


def test_the_rate_falls_to_nothing_with_the_budget():
    meta = MetaOptimizer(Stub())
    for progress in (1.0, 1.7):
        _, path, _ = descend(meta, 2, progress=lambda k, steps, progress=progress: progress)
        torch.testing.assert_close(path[1], path[0], rtol=0, atol=0)


def test_it_stays_inside_the_search_range():
    outside = torch.full((3,), 5.0, dtype=torch.float64)
    stub = Stub(lambda call, point: quadratic(point, minimum=outside))
    _, path, _ = descend(MetaOptimizer(stub), 200)
    for z in path:
        torch.testing.assert_close(z, COORDINATES.inside(z), rtol=0, atol=0)
    # The edge itself is reached: log of 1, the highest learning rate.
    torch.testing.assert_close(path[-1], torch.zeros(3, dtype=torch.float64))


def test_a_start_outside_the_search_range_begins_at_its_edge():
    coordinates = Coordinates({"beta1": decay(0.9)})
    descent = MetaOptimizer(Stub()).begin(coordinates, {"beta1": torch.tensor(0.0)})
    assert coordinates.point(descent.z)["beta1"].item() == pytest.approx(0.05)


class TestDivergence:
    def test_it_goes_halfway_back_to_the_anchor_and_cuts_the_step(self):
        stub = Stub(lambda call, point: failing() if call in (3, 4) else quadratic(point))
        descent, path, _ = descend(MetaOptimizer(stub), 5)
        away = [z - descent.anchor for z in (path[3], path[4], descent.z)]
        torch.testing.assert_close(away[1], away[0] / 2)
        torch.testing.assert_close(away[2], away[0] / 4)
        assert descent.failures == 2
        assert descent.scale == pytest.approx(0.7**2)
        assert descent.outcome is Outcome.OK

    def test_the_anchor_lies_among_the_trusted_points(self):
        descent, path, _ = descend(MetaOptimizer(Stub()), 10)
        trusted = torch.stack(path)
        assert (descent.anchor >= trusted.amin(0)).all()
        assert (descent.anchor <= trusted.amax(0)).all()

    def test_a_success_forgives_and_the_step_grows_back(self):
        stub = Stub(lambda call, point: failing() if call == 3 else quadratic(point))
        descent, _, _ = descend(MetaOptimizer(stub), 5)
        assert descent.failures == 0
        assert 0.7 < descent.scale < 1
        stub.calls = 0
        descent, _, _ = descend(MetaOptimizer(stub), 30)
        assert descent.scale == 1

    def test_a_cut_step_is_shorter(self):
        lengths = {}
        for failed in (False, True):
            # Four failures, so that what Adam remembers of the fifth gradient matters less.
            stub = Stub(
                lambda call, point, failed=failed: (
                    failing() if failed and 1 <= call < 5 else quadratic(point)
                )
            )
            _, path, _ = descend(MetaOptimizer(stub), 7, progress=lambda k, steps: 0.0)
            lengths[failed] = (path[6] - path[5]).norm()
        assert lengths[True] < 0.5 * lengths[False]

    def test_patience_ends_with_the_reason(self):
        for steps, ended in ((3, Outcome.OK), (4, Outcome.DIVERGED)):
            stub = Stub(lambda call, point: failing() if call else quadratic(point))
            descent, _, _ = descend(MetaOptimizer(stub, patience=3), steps)
            assert descent.outcome is ended
        assert descent.reason == "the stub says so"

    def test_a_failure_without_a_reason_is_a_failure(self):
        stub = Stub(lambda call, point: failing(reason="") if call else quadratic(point))
        descent, _, _ = descend(MetaOptimizer(stub), 2)
        assert descent.failures == 1

    def test_without_a_trusted_point_there_is_no_way_back(self):
        descent, path, _ = descend(MetaOptimizer(Stub(lambda call, point: failing())), 1)
        assert descent.outcome is Outcome.DIVERGED
        torch.testing.assert_close(descent.z, path[0], rtol=0, atol=0)

    def test_but_to_a_refuge(self):
        meta = MetaOptimizer(Stub(lambda call, point: failing() if call < 2 else quadratic(point)))
        refuge = {"lr": torch.tensor(1e-4), "lr.knots": torch.tensor([1e-4, 1e-4])}
        safe, descent = COORDINATES.free(refuge), meta.begin(COORDINATES, START, refuge)
        first, met = descent.z, []
        for k in range(3):
            met.append(descent.z)
            meta.step(None, COORDINATES, descent, seed=k, progress=k / 100)
        for z, share in zip(met, (1, 1 / 2, 1 / 4), strict=True):
            torch.testing.assert_close(z, safe + share * (first - safe))
        assert descent.outcome is Outcome.OK
        torch.testing.assert_close(descent.anchor, met[2], rtol=0, atol=0)

    def test_a_wall_is_approached_not_crossed_for_long(self):
        # Training diverges where the first learning rate is above 0.1; the loss falls towards it.
        wall, beyond = torch.tensor(0.1).log(), torch.tensor([0.0, -5, -5], dtype=torch.float64)

        def judge(call, point):
            past = COORDINATES.free(point)[0] > wall
            return failing() if past else quadratic(point, minimum=beyond)

        descent, _, estimates = descend(MetaOptimizer(Stub(judge)), 200)
        assert descent.outcome is Outcome.OK
        assert descent.anchor[0] > wall - 0.5
        assert sum(not estimate.ok for estimate in estimates) < 100


class TestBlowUp:
    def blown(self, factor):
        note = Note(adjoint=torch.tensor([factor, 3.0, 1.0]))

        def judge(call, point):
            estimate = quadratic(point)
            return Estimate(estimate.loss, estimate.grad, note) if call else estimate

        return Stub(judge)

    def test_a_blown_up_adjoint_is_a_failure(self):
        descent, path, _ = descend(MetaOptimizer(self.blown(1e7)), 2)
        assert descent.failures == 1
        torch.testing.assert_close(descent.anchor, path[0], rtol=0, atol=0)

    def test_and_ends_as_noise_with_a_reason(self):
        descent, _, _ = descend(MetaOptimizer(self.blown(1e7), patience=2), 3)
        assert descent.outcome is Outcome.NOISY
        assert "adjoint" in descent.reason

    def test_the_limit_is_the_users(self):
        descent, _, _ = descend(MetaOptimizer(self.blown(1e7), blow_up=1e8), 4)
        assert (descent.failures, len(descent.losses)) == (0, 4)

    def test_growth_below_it_is_a_direction(self):
        descent, _, _ = descend(MetaOptimizer(self.blown(1e5)), 4)
        assert (descent.failures, len(descent.losses)) == (0, 4)


class TestDrift:
    def rising(self, since=15, slope=0.02):
        """A loss that creeps up from a call on, whatever the gradient says."""

        def judge(call, point):
            loss = 1 + slope * max(0, call - since)
            return Estimate(loss, quadratic(point, minimum=torch.full((3,), -99.0)).grad)

        return Stub(judge)

    def test_it_goes_back_to_where_the_recent_losses_were_lowest(self):
        descent, path, _ = descend(MetaOptimizer(self.rising()), 60)
        jumps = torch.stack(path).diff(dim=0).abs().amax(1)
        back = int(jumps.argmax())
        # Not by one high loss: the median of the last eleven must have risen by a share.
        assert back > 15 + 5
        torch.testing.assert_close(path[back + 1], descent.best, rtol=0, atol=0)
        assert path[back + 1][0] > path[back][0]

    def test_and_goes_on_with_a_shorter_step(self):
        returned, _, _ = descend(MetaOptimizer(self.rising()), 60)
        free, _, _ = descend(MetaOptimizer(self.rising(), drift=math.inf), 60)
        assert returned.scale < free.scale == 1

    def test_a_rise_within_the_share_is_left_alone(self):
        descent, _, _ = descend(MetaOptimizer(self.rising(slope=0.002)), 60)
        assert descent.scale == 1 and descent.since == 60

    def test_one_high_loss_is_not_a_drift(self):
        def judge(call, point):
            return Estimate(1.4 if call % 5 == 4 else 1.0, quadratic(point).grad)

        descent, _, _ = descend(MetaOptimizer(Stub(judge)), 60)
        assert descent.since == 60

    def test_losses_below_zero_fall_further(self):
        def judge(call, point):
            estimate = quadratic(point)
            return Estimate(estimate.loss - 100, estimate.grad)

        descent, _, estimates = descend(MetaOptimizer(Stub(judge)), 150)
        assert estimates[-1].loss < -98.5 and descent.outcome is Outcome.OK


class TestJump:
    def jumping(self, factor, noise=0.0, at=10):
        """A flat, noisy loss around 1 that is factor once."""

        def judge(call, point):
            wave = noise * (-1.0) ** call
            return Estimate(factor if call == at else 1 + wave, quadratic(point).grad)

        return Stub(judge)

    def test_a_loss_far_above_the_recent_ones_is_not_trusted(self):
        descent, _, _ = descend(MetaOptimizer(self.jumping(3.0)), 11)
        assert descent.failures == 1
        assert max(descent.losses) == 1

    def test_a_small_rise_is(self):
        descent, _, _ = descend(MetaOptimizer(self.jumping(1.4)), 11)
        assert descent.failures == 0

    def test_so_is_a_large_one_where_the_loss_is_as_noisy_as_that(self):
        descent, _, _ = descend(MetaOptimizer(self.jumping(3.0, noise=0.6)), 11)
        assert descent.failures == 0

    def test_nothing_is_recent_at_the_start(self):
        descent, _, _ = descend(MetaOptimizer(self.jumping(30.0, at=2)), 3)
        assert descent.failures == 0


def test_the_units_of_the_loss_do_not_matter():
    ends = []
    for unit in (1.0, 1e-6, -3.0):
        # A negative unit turns the loss around, and its gradient is turned back.
        def judge(call, point, unit=unit):
            estimate = quadratic(point)
            grad = {name: abs(unit) * g for name, g in estimate.grad.items()}
            return Estimate(unit * estimate.loss, grad)

        ends.append(descend(MetaOptimizer(Stub(judge), jump=1e9), 5)[0].z)
    torch.testing.assert_close(ends[1], ends[0])
    torch.testing.assert_close(ends[2], ends[0])


def test_a_zero_metagradient_stalls():
    flat = Stub(
        lambda call, point: Estimate(1.0, {n: torch.zeros_like(v) for n, v in point.items()})
    )
    descent, path, _ = descend(MetaOptimizer(flat), 1)
    assert descent.outcome is Outcome.STALLED
    assert "zero" in descent.reason
    torch.testing.assert_close(descent.z, path[0], rtol=0, atol=0)


def test_a_loss_without_a_graph_ends_at_once():
    stub = Stub(lambda call, point: failing(Outcome.NOT_DIFFERENTIABLE, "no graph"))
    descent, _, _ = descend(MetaOptimizer(stub), 1)
    assert (descent.outcome, descent.reason) == (Outcome.NOT_DIFFERENTIABLE, "no graph")


def test_the_options_of_the_meta_rule_are_passed_on():
    # beta1 = 0 forgets the first gradient, so that the paths part at the second step.
    ends = [descend(MetaOptimizer(Stub(), beta1=beta1), 3)[0].z for beta1 in (0.0, 0.9)]
    assert not torch.equal(*ends)
    plain = MetaOptimizer(Stub(), rule=find_rule("sgd"), rate=0.1)
    _, path, estimates = descend(plain, 2, progress=lambda k, steps: 0.0)
    grad = COORDINATES.pull(path[0], estimates[0].grad)
    torch.testing.assert_close(path[1], path[0] - 0.1 * grad / grad.abs().max())


def test_a_coordinate_that_does_not_matter_rests():
    # The first coordinate moves the loss by a share of 1e-4 per unit, far below eps.
    def judge(call, point):
        grad = {name: torch.ones_like(v) / v for name, v in point.items()}
        return Estimate(1.0, grad | {"lr": 1e-4 / point["lr"]})

    _, path, _ = descend(MetaOptimizer(Stub(judge)), 10)
    moved = (path[-1] - path[0]).abs()
    assert moved[0] < 0.01 * moved[1:].min()
