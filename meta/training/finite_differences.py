"""Finite differences through whole trainings: the judge of every estimator, never a method."""

from __future__ import annotations

import torch
from torch import Tensor

from ...inner.core.hyper import Tensors
from .loop import run_training
from .training import Training


def held_out_loss(training: Training, point: Tensors, seed: int) -> Tensor:
    """The held-out loss after training at a point; inf where training diverged."""
    resolved = training.resolve(point)
    run = run_training(training, resolved, seed)
    if not run.ok:
        return torch.tensor(float("inf"), dtype=torch.float64)
    with torch.no_grad():
        return training.outer_loss(run.state, resolved.at(training.steps - 1))


def directional_difference(
    training: Training, point: Tensors, direction: Tensors, *, seed: int, h: float = 1e-3
) -> float:
    """d loss / d s at point + s * direction, s = 0, by four trainings.

    Central differences with step h and h/2, extrapolated (Richardson 1911): the error is of order
    h**4 plus rounding / h, so use float64 problems and a direction that changes values by about
    their own size.
    """

    def central(step: float) -> float:
        ahead, behind = (
            {name: v + sign * step * direction[name] for name, v in point.items()}
            for sign in (1, -1)
        )
        return float(
            held_out_loss(training, ahead, seed) - held_out_loss(training, behind, seed)
        ) / (2 * step)

    return (4 * central(h / 2) - central(h)) / 3
