"""What past slopes say of a gradient before it is measured: a control variate that costs nothing.

Kernel regression on the nearest of them, after the nearest-neighbour gradients of Ausset, Clemencon
& Portier 2021, arXiv:2006.15043.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class GuessState(NamedTuple):
    """Slopes that were measured: at z, along a direction of length 1, each of shape (count, n) and
    (count,).
    """

    z: Tensor
    directions: Tensor
    slopes: Tensor


@dataclass(frozen=True)
class Guess:
    """The gradient c at z with the least sum of weight (slope - <c, direction>)^2 + ridge |c|^2.

    The weight of a slope falls with its distance from z as exp(-(distance / length)^2 / 2), in
    unconstrained coordinates.

    Args:
        nearest: as many slopes enter.
        length: the distance at which a slope counts 0.6.
        ridge: the weight of the guess's own size.
        kept: so many slopes are remembered, the latest.
    """

    nearest: int = 64
    length: float = 1.0
    ridge: float = 0.03
    kept: int = 256

    def __post_init__(self) -> None:
        for name in ("nearest", "kept"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} leaves no slope; give at least 1")
        for name in ("length", "ridge"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name):g} must be positive and finite")

    def at(self, z: Tensor, past: GuessState | None) -> Tensor:
        """The guess at z, 0 without a past."""
        if past is None:
            return torch.zeros_like(z)
        if past.z.shape[1] != len(z):
            raise ValueError(
                f"{len(z)} learned numbers go on from slopes in {past.z.shape[1]}; begin with "
                "carry=None"
            )
        distance = (past.z - z).norm(dim=1) / self.length
        near = distance.argsort()[: self.nearest]
        rows, slopes = past.directions[near], past.slopes[near]
        # The dual form: a system of as many slopes, however many numbers the gradient has.
        system = rows @ rows.T
        far = (distance[near].square() / 2).clamp(max=30)  # exp(30) is as good as never.
        system.diagonal().add_(self.ridge * far.exp())
        guess: Tensor = rows.T @ torch.linalg.solve(system, slopes)
        return guess

    def add(self, past: GuessState | None, z: Tensor, moves: Tensor, changes: Tensor) -> GuessState:
        """The past with what the loss changes by at z along moves of any length but 0."""
        length = moves.norm(dim=1)
        good = (length > 0) & changes.isfinite()
        moves, changes, length = moves[good], changes[good], length[good]
        new = GuessState(z.expand_as(moves), moves / length[:, None], changes / length)
        if past:
            new = GuessState(*(torch.cat([old, x]) for old, x in zip(past, new, strict=True)))
        return GuessState(*(x[-self.kept :] for x in new))


__all__ = ["Guess", "GuessState"]
