"""BDA: metagradients through a training that descends on both losses.

Liu et al. 2020, arXiv:2006.04045.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from ...inner.core.hyper import Tensors
from ..problems.problem import Problem
from ..reverse.replay import Replay
from ..training.cache import cache_of
from ..training.estimate import Estimate, Estimator
from ..training.training import Training


class Blend:
    """A problem whose training loss at step i is inner f + outer F, (inner, outer) = weigh(i).

    The two numbers are part of the batch, so that steps that differ only in them are one graph.
    """

    def __init__(self, problem: Problem, weigh: Callable[[int], tuple[float, float]]) -> None:
        # It is kept with the problem, whose life it must not prolong.
        try:
            self._problem: Problem = weakref.proxy(problem)
        except TypeError:
            self._problem = problem
        self._weigh = weigh

    def __getattr__(self, name: str) -> Any:
        return getattr(self._problem, name)

    def batch(self, step: int, seed: int) -> Any:
        return torch.tensor(self._weigh(step), dtype=torch.float64), self._problem.batch(step, seed)

    def inner_loss(
        self, params: Tensors, buffers: Tensors, hypers: Tensors, batch: Any
    ) -> tuple[Tensor, Tensors]:
        (inner, outer), batch = batch
        f, carried = self._problem.inner_loss(params, buffers, hypers, batch)
        return inner.to(f) * f + outer.to(f) * self._problem.outer_loss(
            params, buffers, hypers
        ), carried


@dataclass(frozen=True)
class BDA(Estimator):
    """The exact metagradient of a training whose step t is on (1 - a) f + a scale F, f the training
    loss, F the held-out one and a = weight * decay ** t.

    Where f has many minimisers, plain training ends in one that F had no say in, and neither its
    metagradient nor implicit differentiation leads to the best of them; this does, and is biased
    where f has one. What is differentiated is not what `train` will do: train the result in the
    same way. F is read at every step, and its second derivative on the way back.

    Args:
        weight: F's share at the first step, between 0 and 1.
        decay: of the share per step; below 1, f has the last word, but the effect goes if it is
            fast.
        scale: a factor of F, such as where it is the sum of more examples than f.
        replay: how the training is differentiated.
    """

    weight: float = 0.5
    decay: float = 1.0
    scale: float = 1.0
    replay: Replay = field(default_factory=Replay)

    def __post_init__(self) -> None:
        if not 0 < self.weight < 1:
            raise ValueError(f"weight={self.weight:g} must be between 0 and 1, both excluded")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay={self.decay:g} must be above 0 and at most 1")
        if not self.scale > 0:
            raise ValueError(f"scale={self.scale:g} must be positive")

    def __call__(
        self, training: Training, point: Tensors, carry: None = None, *, seed: int
    ) -> tuple[Estimate, None]:
        return self.replay(self.blended(training), point, seed=seed)

    def blended(self, training: Training) -> Training:
        """The training that is differentiated."""
        kept, key = cache_of(training.problem), ("bda", self.weight, self.decay, self.scale)
        if key not in kept:  # What is compiled for it is kept with it.
            kept[key] = Blend(training.problem, self._weigh)
        return replace(training, problem=cast(Problem, kept[key]))

    def _weigh(self, step: int) -> tuple[float, float]:
        a = self.weight * self.decay**step
        return 1 - a, a * self.scale


__all__ = ["BDA"]
