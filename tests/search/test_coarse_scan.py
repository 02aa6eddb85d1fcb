"""The scan: which way a rate goes, how far, and what is left alone."""

import math
from dataclasses import replace

import pytest
import torch

from hyperdescent.inner.registry import find_rule
from hyperdescent.inner.schedules.schedule import find_schedule
from hyperdescent.meta.training.training import Training
from hyperdescent.search.coarse_scan import scan
from hyperdescent.search.space import Space


@pytest.fixture
def make_space(problem):
    def make(learn, rule="adamw", **more):
        return Space(Training(problem, find_rule(rule), 4, **more), tuple(learn))

    return make


class Losses:
    """A loss as a function of the point, and which points were asked for."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def __call__(self, point):
        self.asked.append({name: v.tolist() for name, v in point.smooth.items()})
        return self.function(point.smooth)


def valley(**lowest):
    """A loss that is lowest where each value is as given."""
    return lambda at: 1 + sum(float(at[n].log() - math.log(v)) ** 2 for n, v in lowest.items())


def forever():
    return True


def test_a_rate_goes_up_as_long_as_the_loss_falls(make_space):
    space, losses = make_space(["lr"]), Losses(valley(lr=0.05))
    best = scan(space, space.start(), losses, forever)
    asked = [point["lr"] for point in losses.asked]
    assert asked == pytest.approx([1e-3, 4e-3, 1.6e-2, 6.4e-2, 0.256, 0.128, 3.2e-2])
    assert best.smooth["lr"] == pytest.approx(6.4e-2)


@pytest.mark.parametrize(("lowest", "half"), [(0.1, 2.0), (0.04, 0.5)])
def test_then_half_a_move_on_or_back(make_space, lowest, half):
    space, losses = make_space(["lr"]), Losses(valley(lr=lowest))
    best = scan(space, space.start(), losses, forever)
    assert best.smooth["lr"] == pytest.approx(6.4e-2 * half)


def test_or_else_down(make_space):
    space, losses = make_space(["lr"]), Losses(valley(lr=1e-4))
    best = scan(space, space.start(), losses, forever)
    asked = [point["lr"] for point in losses.asked]
    assert asked == pytest.approx([1e-3, 4e-3, 2.5e-4, 6.25e-5, 1.5625e-5, 1.25e-4])
    assert best.smooth["lr"] == pytest.approx(1.25e-4)


def test_where_the_loss_is_lowest_already_nothing_moves(make_space):
    space, losses = make_space(["lr"]), Losses(valley(lr=1e-3))
    start = space.start()
    assert scan(space, start, losses, forever) is start
    assert len(losses.asked) == 3


def test_rounding_is_no_reason_to_move(make_space):
    space = make_space(["lr"])
    start = space.start()
    assert (
        scan(space, start, lambda point: 2.3 - 1e-5 * float(point.smooth["lr"]), forever) is start
    )


def test_one_hyper_after_the_other_from_the_best_so_far(make_space):
    space = make_space(["weight_decay", "beta1", "lr"])
    losses = Losses(valley(lr=4e-3, weight_decay=0.16))
    best = scan(space, space.start(), losses, forever)
    found = {name: float(value) for name, value in best.smooth.items()}
    # beta1 is no factor of anything.
    assert found == pytest.approx({"weight_decay": 0.16, "beta1": 0.9, "lr": 4e-3})
    assert [p["lr"] for p in losses.asked[:4]] == pytest.approx([1e-3] * 4)


@pytest.mark.parametrize(
    ("more", "name", "count"),
    [
        ({"schedules": {"lr": find_schedule("piecewise:3")}}, "lr.knots", 3),
        ({"granularity": {"lr": "tensor"}}, "lr", 4),
    ],
)
def test_what_is_one_hyper_moves_as_one(make_space, more, name, count):
    space = make_space(["lr"], **more)
    losses = Losses(lambda at: valley(x=0.05)({"x": at[name].log().mean().exp()}))
    best = scan(space, space.start(), losses, forever)
    ratios = best.smooth[name] / space.start().smooth[name]
    assert ratios.tolist() == pytest.approx([64.0] * count)


def test_of_a_schedule_only_what_is_a_rate_moves(make_space):
    space = make_space(["lr"], schedules={"lr": find_schedule("polynomial")})
    start, losses = space.start(), Losses(lambda at: valley(x=0.05)({"x": at["lr.peak"]}))
    best = scan(space, start, losses, forever)
    assert best.smooth["lr.peak"] == pytest.approx(6.4e-2)
    assert best.smooth["lr.power"] == start.smooth["lr.power"]


def test_a_start_that_diverges_is_left_downwards(make_space):
    space = make_space(["lr"], values={"lr": 1.0})
    losses = Losses(lambda at: math.inf if at["lr"] > 0.02 else valley(lr=0.01)(at))
    best = scan(space, space.start(), losses, forever)
    asked = [point["lr"] for point in losses.asked]
    assert asked == pytest.approx([1.0, 0.25, 0.0625, 2**-6, 2**-8, 2**-5, 2**-7])
    assert best.smooth["lr"] == pytest.approx(2**-7)


def test_where_everything_diverges_it_ends_where_it_began(make_space):
    space, losses = make_space(["lr"]), Losses(lambda at: math.inf)
    start = space.start()
    assert scan(space, start, losses, forever) is start
    low, high = space.smooth["lr"].search
    asked = [point["lr"] for point in losses.asked]
    assert all(low <= lr <= high for lr in asked)
    assert min(asked) < 4 * low and max(asked) > high / 4


def test_values_stay_in_their_range(make_space):
    space, losses = make_space(["lr"]), Losses(lambda at: -float(at["lr"].log()))
    best = scan(space, space.start(), losses, forever)
    high = space.smooth["lr"].search[1]
    assert high / 2 < best.smooth["lr"] <= high


def test_it_ends_with_the_time(make_space):
    space, losses = make_space(["lr"]), Losses(valley(lr=0.05))
    best = scan(space, space.start(), losses, lambda: len(losses.asked) < 3)
    assert len(losses.asked) == 3
    assert best.smooth["lr"] == pytest.approx(1.6e-2)


def test_options_are_kept(make_space):
    space = make_space(["lr"])
    start = replace(space.start(), discrete={"width": 4})
    best = scan(space, start, Losses(valley(lr=0.05)), forever)
    assert best.discrete == {"width": 4} and torch.is_tensor(best.smooth["lr"])
