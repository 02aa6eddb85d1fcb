"""How far a metagradient in bfloat16 can be trusted: beside float32, on the same seeds.

Weights, slots and sums over examples stay float32; the products of the model are bfloat16, forth
and back, by torch.autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...inner.registry import find_rule
from ...inner.schedules.schedule import find_schedule
from ...meta.reverse.replay import Replay
from ...meta.training.training import Training
from .workloads import Workload

# What is learned: a rate at so many knots, with Adam.
KNOTS = 5
RATES, STEPS = (1e-3, 1e-2), (20, 100)


@dataclass(frozen=True)
class PrecisionAgreement:
    """One workload, rate and number of steps; an entry per seed.

    cosines: between the two gradients. errors: the norm of their difference in units of
    float32's. Both NaN where a training diverged.
    """

    workload: str
    lr: float
    steps: int
    cosines: Sequence[float]
    errors: Sequence[float]


def bench_bfloat16(
    workloads: Sequence[Workload],
    *,
    rates: Sequence[float] = RATES,
    steps: Sequence[int] = STEPS,
    seeds: int = 3,
    say: Callable[[str], object] = lambda told: None,
) -> Iterator[PrecisionAgreement]:
    """The gradient in both, on every workload at every rate and number of steps."""
    for workload in workloads:
        for lr in rates:
            for count in steps:
                say(f"{workload.name}: {count} steps at lr {lr:g}")
                pairs = [
                    [_knots(workload, lr, count, seed, how) for how in (torch.bfloat16, None)]
                    for seed in range(seeds)
                ]
                yield PrecisionAgreement(
                    workload.name,
                    lr,
                    count,
                    [float(torch.cosine_similarity(low, full, 0)) for low, full in pairs],
                    [float((low - full).norm() / full.norm()) for low, full in pairs],
                )


def _knots(
    workload: Workload, lr: float, steps: int, seed: int, autocast: torch.dtype | None
) -> Tensor:
    problem = workload.problem(torch.float32, autocast)
    run = Training(
        problem,
        find_rule("adam"),
        steps,
        schedules={"lr": find_schedule(f"piecewise:{KNOTS}")},
        values={"lr": lr},
    )
    estimate, _ = Replay(compile=False)(run, run.start(["lr"]), seed=seed)
    grad = estimate.grad.get("lr.knots", torch.full((KNOTS,), torch.nan))
    return grad.double().flatten()


__all__ = ["PrecisionAgreement", "bench_bfloat16"]
