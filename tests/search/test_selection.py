"""Choosing among points whose losses are noisy."""

import math
import random

import pytest
import torch

from hyperdescent.search.selection import CANDIDATES, REPORTED, confirm, standing_of
from hyperdescent.search.space import Point


def points(count):
    return [Point({"lr": torch.tensor(float(i))}) for i in range(count)]


def noisy(means, spread, seed=0):
    """Training a point: its mean and a noise that depends on point and seed only."""

    def train(point, k):
        i = int(point.smooth["lr"])
        return means[i] + spread * random.Random(1000 * seed + 100_000 * i + k).gauss(0, 1)

    return train


class Budget:
    """A share of time left that falls by the same amount with each training."""

    def __init__(self, train, trainings):
        self.train_plain, self.trainings, self.calls = train, trainings, []

    def train(self, point, k):
        self.calls.append((int(point.smooth["lr"]), k))
        return self.train_plain(point, k)

    def left(self):
        return 1 - len(self.calls) / self.trainings


def test_the_best_mean_wins_where_single_losses_would_mislead():
    means = [1.0] * 15 + [0.5]
    wins = 0
    for seed in range(20):
        budget = Budget(noisy(means, 0.5, seed), trainings=200)
        _, winner = confirm(points(16), budget.train, budget.left)
        wins += int(winner.smooth["lr"]) == 15
    # One training each would find it in about half of the cases.
    assert wins >= 16


def test_candidates_of_a_round_meet_under_the_same_seeds():
    budget = Budget(noisy([1.0, 2.0, 3.0, 4.0], 0.0), trainings=100)
    confirm(points(4), budget.train, budget.left)
    rounds = [{i for i, seed in budget.calls if seed == k} for k in range(3)]
    assert rounds == [{0, 1, 2, 3}, {0, 1}, {0, 1}]


def test_the_report_uses_seeds_that_took_no_part_in_choosing():
    budget = Budget(noisy([1.0, 2.0, 3.0, 4.0], 1.0), trainings=1000)
    losses, winner = confirm(points(4), budget.train, budget.left)
    reported = [k for _, k in budget.calls[-REPORTED:]]
    chosen_by = {k for _, k in budget.calls[:-REPORTED]}
    assert len(losses) == REPORTED and not chosen_by & set(reported)
    assert losses == [budget.train_plain(winner, k) for k in reported]


def test_without_time_the_likeliest_wins_and_is_trained_once():
    losses, winner = confirm(points(5), noisy([9, 1, 1, 1, 1], 0.0), lambda: -1.0)
    assert winner.smooth["lr"] == 0
    assert losses == [9]


def test_a_round_cut_short_decides_nothing():
    budget = Budget(noisy([9, 1, 1, 1, 1, 1], 0.0), trainings=1000)

    def slower_and_slower():
        return 1 - len(budget.calls) ** 3 / 200

    _, winner = confirm(points(6), budget.train, slower_and_slower)
    assert {i for i, _ in budget.calls} == {0, 1, 2, 3, 4}
    assert winner.smooth["lr"] == 0


@pytest.mark.parametrize(("trainings", "met"), [(4, 2), (12, 2), (24, 4), (50, 8)])
def test_as_many_meet_as_there_is_time_to_tell_apart(trainings, met):
    budget = Budget(noisy([5, 4, 3, 2, 1, 0, 0, 0], 0.0), trainings)
    _, winner = confirm(points(8), budget.train, budget.left)
    assert {i for i, _ in budget.calls} == set(range(met))
    assert winner.smooth["lr"] == min(met - 1, 5)


def test_no_more_than_so_many_candidates_are_trained():
    budget = Budget(noisy([1.0] * 40, 0.0), trainings=500)
    confirm(points(40), budget.train, budget.left)
    assert {i for i, _ in budget.calls} == set(range(CANDIDATES))


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_point_that_diverges_loses_to_one_that_does_not(broken):
    def train(point, k):
        return broken if point.smooth["lr"] == 0 else 5.0

    losses, winner = confirm(points(2), train, Budget(train, 1000).left)
    assert winner.smooth["lr"] == 1 and set(losses) == {5.0}


def test_standing_counts_divergence_before_the_mean():
    ranked = sorted(
        [[9.0, 9.0], [1.0, math.inf], [0.5, math.nan], [math.inf, math.inf]], key=standing_of
    )
    assert ranked[0] == [9.0, 9.0]
    assert ranked[-1] == [math.inf, math.inf]
