"""Which of the points found is best: they are trained again, under seeds they were not found by.

Every evaluation of a run has a training seed of its own, so the lowest loss seen owes part to luck.
Candidates meet in rounds of successive halving (Karnin, Koren & Somekh 2013; Jamieson & Talwalkar
2016, arXiv:1502.07943): all under the same new seeds, twice as many each round, the better half
stays. Where there is time for few trainings, few candidates meet: one seed each would decide by
luck. The winner's loss is then measured under seeds that took no part in choosing it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .space import Point

# Of candidates, and of the seeds under which the winner is reported.
CANDIDATES, REPORTED = 16, 8
# Rounds that there should be time for, each as long as the first.
_ROUNDS = 3
# Seeds of the report are counted from here, far from those of the rounds.
_APART = 1000


def confirm(
    candidates: list[Point],
    train: Callable[[Point, int], float],
    time_left: Callable[[], float],
) -> tuple[list[float], Point]:
    """(held-out losses of the winner under fresh seeds, the winner).

    candidates: the likeliest first; it wins if there is no time to compare. train(point, k): the
    held-out loss under the k-th seed. time_left(): the share left of the time for this, from 1 to
    0 and below; half is for the rounds. One training of the winner is always made.
    """
    pool, seeds, done = candidates[:CANDIDATES], 1, 0
    losses: list[list[float]] = [[] for _ in pool]
    standing = list(range(len(pool)))
    if len(pool) > 1 and (before := time_left()) > 0.5:
        losses[0].append(train(pool[0], 0))
        cost = max(before - time_left(), 1e-9)
        standing = standing[: max(2, int((before - 0.5) / cost / _ROUNDS))]
    while len(standing) > 1 and time_left() > 0.5:
        for k in range(done, done + seeds):
            for i in standing:
                if len(losses[i]) > k:
                    continue  # The one whose time was taken.
                if time_left() <= 0.5:
                    break
                losses[i].append(train(pool[i], k))
        compared = min(len(losses[i]) for i in standing)
        if compared > done:
            standing.sort(key=lambda i: standing_of(losses[i][:compared]))
            standing = standing[: (len(standing) + 1) // 2]
        done, seeds = done + seeds, 2 * seeds
    winner = pool[standing[0]]
    report = [train(winner, _APART)]
    while len(report) < REPORTED and time_left() > 0:
        report.append(train(winner, _APART + len(report)))
    return report, winner


def standing_of(losses: list[float]) -> tuple[int, float]:
    """Sorts points by how often they diverged, then by the mean of what did not."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return len(losses) - len(finite), sum(finite) / max(len(finite), 1)
