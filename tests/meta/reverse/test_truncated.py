"""Truncated reverse mode (K-RMD): Replay with a window, against what theory says it leaves out."""

import pytest
import torch
from toys import Toy, descent, following, vector

from hyperdescent.meta.estimators import METHODS
from hyperdescent.meta.hypergradient import hypergradient
from hyperdescent.meta.reverse.replay import Replay

SCALE, RATE, STEPS = vector(1.0, 0.5), 0.1, 100
AIM = vector(3.0, -1.0)


def quadratic():
    """Shaban et al. 2019, arXiv:1810.10667: f = (w - x)' diag(1, 1/2) (w - x) / 2."""
    return Toy(following(SCALE), lambda w, h: ((w - AIM) ** 2).sum() / 2, vector(0.0, 0.0), x=(2,))


@pytest.mark.parametrize("window", [1, 5, 10, 20, 50, 100])
def test_the_error_is_the_part_of_the_steps_left_out(window):
    run, point = descent(quadratic(), STEPS, RATE), {"x": vector(1.0, 2.0)}
    exact, _ = Replay()(run, point, seed=0)
    cut, _ = Replay(window=window)(run, point, seed=0)
    step = 1 - RATE * SCALE
    # w after so many steps from 0 is (1 - A^T) x.
    slope = (1 - step**STEPS) * point["x"] - AIM
    left = (step**window - step**STEPS) * slope
    torch.testing.assert_close(exact.grad["x"] - cut.grad["x"], left, rtol=1e-12, atol=1e-14)
    bound = float(step.max()) ** window * float(slope.norm())
    assert float(left.norm()) <= bound


def test_only_the_states_of_the_window_are_kept():
    run, point = descent(quadratic(), STEPS, RATE), {"x": vector(1.0, 2.0)}
    cut, _ = Replay(window=7, graphs="recompute")(run, point, seed=0)
    assert cut.note.states == 7 and cut.note.recomputed == 0


@pytest.mark.parametrize(("window", "stops_at", "slope"), [(1, 2.0, 1.0), (None, 1.5, 0.0)])
def test_one_step_stops_where_the_objective_still_falls(window, stops_at, slope):
    """min w^2 / 2 + (x - 3)^2 / 2 where w follows x: the answer is 3 / 2, one step stops at 2."""
    toy = Toy(
        following(vector(1.0)),
        lambda w, h: (w**2).sum() / 2 + (h["x"] - 3) ** 2 / 2,
        vector(0.0),
        x=(),
    )
    run, point = descent(toy, 80, 0.5), {"x": torch.tensor(stops_at, dtype=torch.float64)}
    estimate, _ = Replay(window=window)(run, point, seed=0)
    assert float(estimate.grad["x"]) == pytest.approx(0, abs=1e-12)
    exact, _ = Replay()(run, point, seed=0)
    assert float(exact.grad["x"]) == pytest.approx(slope, abs=1e-12)


def test_by_name():
    assert METHODS["truncated"]().window == 10
    estimate = hypergradient(quadratic(), "sgd", learn="x", steps=30, method="truncated")
    assert estimate.ok and "10" in estimate.note.how
