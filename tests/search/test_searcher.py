"""The searcher's contract: ask and tell, seeds, what it knows, and the journal."""

import optuna
import pytest
import torch

from hyperdescent.inner.registry import find_rule
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training
from hyperdescent.search.searcher import OptunaSearcher
from hyperdescent.search.space import Point, Space


@pytest.fixture
def space(problem):
    return Space(Training(problem, find_rule("adamw"), 5), ("lr", "beta1"))


def at(lr, beta1):
    values = {"lr": lr, "beta1": beta1}
    return Point({name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()})


def quadratic(point):
    """Lowest at lr = 0.03, beta1 = 0.8, in the coordinates of either."""
    lr, beta1 = point.smooth["lr"], point.smooth["beta1"]
    best = at(0.03, 0.8).smooth
    away = (lr / best["lr"]).log(), beta1.logit() - best["beta1"].logit()
    return sum(float(x**2) for x in away)


def asked(searcher, count, judge=quadratic):
    points = []
    for _ in range(count):
        points.append(searcher.ask())
        searcher.tell(judge(points[-1]))
    return points


def rates(points):
    return [point.smooth["lr"].item() for point in points]


def test_the_same_seed_asks_the_same_points(space):
    one, two = (rates(asked(OptunaSearcher(space, space.start(), seed=3), 15)) for _ in range(2))
    assert one == two


def test_another_seed_asks_others(space):
    one, two = (rates(asked(OptunaSearcher(space, space.start(), seed=s), 5)) for s in (3, 4))
    assert one[0] == two[0]
    assert not set(one[1:]) & set(two[1:])


def test_the_start_is_asked_first(space):
    point = OptunaSearcher(space, at(0.02, 0.7), seed=0).ask()
    assert point.smooth["lr"].item() == pytest.approx(0.02)
    assert point.smooth["beta1"].item() == pytest.approx(0.7)


def test_it_finds_the_minimum_of_a_quadratic(space):
    searcher = OptunaSearcher(space, space.start(), seed=0)
    points = asked(searcher, 60)
    losses = [quadratic(point) for point in points]
    assert losses[0] > 10
    assert min(losses) < 0.2
    # It learns: the later half is better than the first, which was drawn at random in part.
    assert sorted(losses[30:])[15] < sorted(losses[:30])[15]


def test_what_is_known_is_learned_from(space):
    known = [(at(0.03 * 2.0**i, 0.8), abs(i) + 0.0) for i in range(-10, 6)]
    searcher = OptunaSearcher(space, at(0.03, 0.8), seed=0, known=known)
    assert len(searcher._study.trials) == len(known) + 1
    assert searcher._study.best_value == 0
    informed = rates(asked(searcher, 8))[1:]
    # Without what is known the first ten are drawn at random from five decades.
    assert sum(0.003 < lr < 0.3 for lr in informed) >= 5


def diverging(limit):
    return lambda point: Outcome.DIVERGED if point.smooth["lr"] > limit else quadratic(point)


def test_divergence_is_told_as_worse_than_anything(space):
    # Three of the five decades diverge, and the finite losses fall towards them.
    runs = [
        rates(asked(OptunaSearcher(space, space.start(), seed=seed), 50, diverging(1e-3)))
        for seed in range(6)
    ]
    random = [lr > 1e-3 for run in runs for lr in run[1:10]]
    learned = [lr > 1e-3 for run in runs for lr in run[20:]]
    assert sum(learned) / len(learned) < 0.7 * sum(random) / len(random)


@pytest.mark.parametrize("told", [Outcome.DIVERGED, float("nan"), float("inf")])
def test_failures_are_no_best(space, told):
    searcher = OptunaSearcher(space, space.start(), seed=0)
    searcher.ask()
    searcher.tell(told)
    searcher.ask()
    searcher.tell(5.0)
    assert searcher._study.best_value == 5
    states = [trial.state for trial in searcher._study.trials]
    assert states == [optuna.trial.TrialState.PRUNED, optuna.trial.TrialState.COMPLETE]


def test_telling_before_asking_says_what_to_do(space):
    searcher = OptunaSearcher(space, space.start(), seed=0)
    with pytest.raises(RuntimeError, match=r"call ask\(\) first"):
        searcher.tell(1.0)
    searcher.ask()
    searcher.tell(1.0)
    with pytest.raises(RuntimeError, match=r"call ask\(\) first"):
        searcher.tell(1.0)


def test_torchs_random_numbers_are_left_alone(space):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    asked(OptunaSearcher(space, space.start(), seed=0), 3)
    assert torch.equal(before, torch.get_rng_state())


class TestJournal:
    @pytest.fixture
    def searcher(self, space, tmp_path):
        def make(known=None):
            return OptunaSearcher(
                space, at(0.02, 0.7), seed=0, known=known, journal=tmp_path / "trials.log"
            )

        return make

    def test_numbering_goes_on_and_no_draw_is_repeated(self, searcher):
        first = rates(asked(searcher(), 6))
        again = searcher()
        second = rates(asked(again, 6))
        assert [trial.number for trial in again._study.trials] == list(range(12))
        assert not set(first) & set(second)

    def test_what_was_found_is_still_there(self, searcher):
        points = asked(searcher(), 6)
        assert searcher()._study.best_value == min(map(quadratic, points))

    def test_what_is_known_is_added_once(self, searcher):
        known = [(at(0.1, 0.8), 1.0)]
        for _ in range(3):
            assert len(searcher(known)._study.trials) == 2

    def test_a_start_asked_for_but_never_told_is_asked_again(self, searcher):
        searcher().ask()
        assert searcher().ask().smooth["lr"].item() == pytest.approx(0.02)

    def test_a_start_never_asked_for_is_asked_first(self, searcher):
        searcher()
        assert searcher().ask().smooth["lr"].item() == pytest.approx(0.02)

    def test_a_trial_that_was_interrupted_does_not_stop_the_next(self, searcher):
        asked(searcher(), 3)
        searcher().ask()
        assert len(asked(searcher(), 3)) == 3
