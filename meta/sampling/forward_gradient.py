"""Forward gradients: an unbiased gradient from a few directional derivatives.

Baydin, Pearlmutter, Syme, Wood & Torr 2022, arXiv:2202.08587.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from ...inner.core.hyper import Tensors
from ..forward.forward import Forward
from ..problems.seeding import fold_in
from ..training.coordinates import Coordinates
from ..training.estimate import Estimate, Estimator, finished
from ..training.training import Training
from .control_variate import Guess, GuessState


@dataclass(frozen=True)
class ForwardGradient(Estimator):
    """The gradient after training along random directions, each as dear as a number of Forward.

    For more numbers than Forward can carry, at memory that does not depend on the number of steps.
    The directions are orthogonal in unconstrained coordinates; without a guess the squared error of
    the mean is n / directions - 1 times the squared norm of the gradient of n numbers, and with one
    as many times that of gradient minus guess, unbiased whatever the guess is. note.stderr: from
    the spread between directions.

    Args:
        directions: per call.
        guess: of the gradient, made from the slopes of earlier calls, which the carry holds; None
            is a call by itself.
        compile: as for Forward.
    """

    directions: int = 4
    guess: Guess | None = field(default_factory=Guess)
    compile: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.directions < 1:
            raise ValueError(f"directions={self.directions} measures nothing; give at least 1")

    def __call__(
        self, training: Training, point: Tensors, carry: GuessState | None = None, *, seed: int
    ) -> tuple[Estimate, GuessState | None]:
        space = Coordinates({name: training.hypers[name] for name in point})
        z, unflatten = space.free(point), space.layout.unflatten
        count = min(self.directions, len(z))
        draw = torch.Generator().manual_seed(fold_in(seed, 0, 9))
        normal = torch.randn(len(z), count, dtype=z.dtype, generator=draw)
        rows = torch.linalg.qr(normal).Q.T
        ones = {name: torch.ones_like(value) for name, value in point.items()}
        through = space.pull(z, ones)  # Entry by entry: d value / d z.
        along = [unflatten(row * through) for row in rows]
        measured = Forward(compile=self.compile).along(training, point, along, seed=seed)
        if not measured.ok:
            return measured, carry
        slopes = measured.grad["along"].to(z)
        guess = self.guess.at(z, carry) if self.guess else torch.zeros_like(z)
        each = guess + len(z) * (slopes - rows @ guess)[:, None] * rows
        # Drawn without replacement: all of them leave no error.
        left = math.sqrt((1 - count / len(z)) / count)
        spread = each.std(0) * left if count > 1 else torch.full_like(z, math.nan)
        note = replace(
            measured.note,
            how=f"{count} directions of {len(z)}, {measured.note.how}",
            stderr=unflatten(spread / through.abs()),
        )
        grad = unflatten(each.mean(0) / through)
        past = self.guess.add(carry, z, rows, slopes) if self.guess else None
        return finished(torch.tensor(measured.loss, dtype=torch.float64), grad, note), past


__all__ = ["ForwardGradient"]
