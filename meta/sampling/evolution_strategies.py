"""Evolution strategies: gradients of a smoothed loss from losses alone, for training whose held-out
loss is rough or has no derivative.

Full ES: Rechenberg 1973; Salimans et al. 2017, arXiv:1703.03864. PES: Vicol, Metz &
Sohl-Dickstein 2021, arXiv:2112.13835. ES-Single: Vicol, Kolter & Swersky 2023, arXiv:2304.11153.
Guided ES: Maheswaranathan et al. 2019, arXiv:1806.10230.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...inner.core.hyper import Tensors
from ..problems.seeding import fold_in
from ..training.coordinates import Coordinates
from ..training.estimate import Estimate, Estimator, Note, finished
from ..training.training import Training
from .control_variate import Guess, GuessState
from .crowd import Crowd, together

# Guided ES's step along its estimate, such that with a share of 1/2 a guide that is exact is right.
_BETA = 2.0


@dataclass(frozen=True)
class ES(Estimator):
    """The gradient of the held-out loss after training, smoothed by normal noise on the hypers.

    It is too small where noise had to be cut to keep a hyper on a linear scale legal. note.stderr:
    the standard error of every number, from the spread between pairs. A pair that diverged is left
    out.

    Args:
        pairs: of trainings at plus and minus the same noise, all under the same seed, and one
            without noise, whose loss is returned.
        sigma: the noise's standard deviation in unconstrained coordinates, so relative for hypers
            on a log scale; the gradient is that of the loss averaged over it.
        guess: what earlier calls tell of the gradient, as a control variate: of what noise does to
            the loss only the part that was not expected is left to average. Slopes go on in the
            carry.
        guide: a cheap estimator along whose gradient a part of the noise is. What comes out is no
            longer the gradient but a mixture with the part along the guide, with less noise where
            the guide knows something.
        share: of the noise's variance that is isotropic where there is a guide.
        compile: do all trainings at once, by generated code.
    """

    pairs: int = 8
    sigma: float = 0.1
    guess: Guess | None = None
    guide: Estimator | None = None
    share: float = 0.5
    compile: bool = False

    def __post_init__(self) -> None:
        _check(self.pairs, self.sigma)
        if self.guess and self.guide:
            raise ValueError("give a guess or a guide: a guide's noise is not that of a gradient")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share:g} must be between 0 and 1")

    def __call__(
        self, training: Training, point: Tensors, carry: GuessState | None = None, *, seed: int
    ) -> tuple[Estimate, GuessState | None]:
        space = _Space(training, point)
        noise = space.noise(self.pairs, fold_in(seed, 0, 8), self.sigma)
        factor, said = 1.0, "ES"
        if self.guide:
            known, _ = self.guide(training, point, None, seed=seed)
            said = "guided ES" if known.ok else f"ES, its guide failed: {known.note.reason}"
            if known.ok:
                noise, factor = self._guided(space, noise, known.grad, seed), _BETA

        def attempt(crowd: Crowd) -> list[float]:
            return crowd.losses(crowd.run(crowd.start(), 0, training.steps))

        points = space.around(noise)
        (base, *losses), how = together(attempt, training, points, seed, self.compile)
        guess = self.guess.at(space.z, carry) if self.guess else None
        slopes = _slopes(losses, noise, self.sigma, guess) * factor
        past = self.guess.add(carry, space.z, noise, _changes(losses)) if self.guess else None
        return space.estimate(base, slopes, training.steps, f"{said}, {how}"), past

    def _guided(self, space: _Space, noise: Tensor, grad: Tensors, seed: int) -> Tensor:
        along = space.coordinates.pull(space.z, grad)
        along = along / along.norm().clamp(min=1e-300)
        draw = torch.Generator().manual_seed(fold_in(seed, 1, 8))
        much = torch.randn(self.pairs, 1, dtype=torch.float64, generator=draw) * self.sigma
        isotropic = noise * math.sqrt(self.share / len(space.z))
        return space.legal(isotropic + much * along * math.sqrt(1 - self.share))


class PESState(NamedTuple):
    """Where the trainings of a persistent strategy are.

    states: of all, the one without noise first. summed: the noise of each pair up to here, shape
    (pairs, hypers). losses: their last held-out losses. step: done in the present training. seed:
    of that training. calls: how many windows there were. ended: the held-out loss that the last
    whole training ended with.
    """

    states: object
    summed: Tensor
    losses: list[float]
    step: int
    seed: int
    calls: int
    ended: float | None = None


@dataclass(frozen=True)
class PES(Estimator):
    """The gradient of the smoothed held-out loss from a window of training at a time.

    Each call does a window of the same trainings, from the states that the last one left, and
    begins new ones when training.steps are done: the mean over a training's windows is unbiased,
    though no call sees more than one. Hypers that moved between the calls leave trainings behind
    that began under older ones. The loss returned is what the last whole training ended with, once
    there is one: those on the way are not to be compared. note.stderr: as for ES.

    Args:
        every: steps of a call, the window.
        pairs: as for ES.
        sigma: as for ES.
        kind: "pes" draws new noise in every window and remembers the sum; "single" (ES-Single)
            draws once per training, for a variance that does not grow with the number of windows;
            "truncated" starts every window from the training without noise and forgets what was
            before, which is biased, even in sign, and there to be compared with.
        objective: the "final" loss after training, as a sum of what each window adds to it, or the
            "mean" of the losses at the ends of the windows.
        compile: as for ES.
    """

    every: int = 10
    pairs: int = 8
    sigma: float = 0.1
    kind: Literal["pes", "single", "truncated"] = "pes"
    objective: Literal["final", "mean"] = "final"
    compile: bool = False

    def __post_init__(self) -> None:
        _check(self.pairs, self.sigma)
        if self.every < 1:
            raise ValueError(f"every={self.every} does no step; give at least 1")
        if self.kind not in ("pes", "single", "truncated"):
            raise ValueError(f"kind={self.kind!r} is none of 'pes', 'single' and 'truncated'")
        if self.objective not in ("final", "mean"):
            raise ValueError(f"objective={self.objective!r} is neither 'final' nor 'mean'")

    def __call__(
        self, training: Training, point: Tensors, carry: PESState | None = None, *, seed: int
    ) -> tuple[Estimate, PESState]:
        space = _Space(training, point)
        if carry is None or carry.step >= training.steps:
            begun = carry.calls if carry else 0
            ended = carry.ended if carry else None
            none = torch.zeros(self.pairs, len(space.z))
            carry = PESState(None, none, [], 0, seed, begun, ended)
        seed, first = carry.seed, carry.step
        last = min(first + self.every, training.steps)
        fresh = self.kind != "single" or first == 0
        draw = space.noise(self.pairs, fold_in(seed, carry.calls, 8), self.sigma)
        noise = draw if fresh else carry.summed
        summed = carry.summed + noise if self.kind == "pes" else noise

        def attempt(crowd: Crowd) -> tuple[Any, list[float], list[float]]:
            states = crowd.start() if first == 0 else crowd.taken_over(carry.states)
            if self.kind == "truncated" and first:
                states = crowd.repeat_first(states)
            # What the first window adds is all of the loss: hypers that enter it count throughout.
            before = carry.losses or [0.0] * (2 * self.pairs + 1)
            if self.objective == "final" and self.kind == "truncated":
                before = crowd.losses(states)
            states = crowd.run(states, first, last)
            return states, before, crowd.losses(states)

        points = space.around(noise)
        (states, before, after), how = together(attempt, training, points, seed, self.compile)
        base, *losses = after
        if self.objective == "final":
            losses = [x - y for x, y in zip(losses, before[1:], strict=True)]
        slopes = _slopes(losses, summed, self.sigma)
        windows = math.ceil(training.steps / self.every)
        if self.objective == "final":
            slopes = slopes * windows
        how = f"{self.kind}, steps {first} to {last}, {how}"
        ended = base if last == training.steps else carry.ended
        loss = base if ended is None or not math.isfinite(base) else ended
        estimate = space.estimate(loss, slopes, last - first, how)
        return estimate, PESState(states, summed, after, last, seed, carry.calls + 1, ended)


class _Space:
    """A point in unconstrained coordinates, and the way back for gradients."""

    def __init__(self, training: Training, point: Tensors) -> None:
        self.coordinates = Coordinates({name: training.hypers[name] for name in point})
        self.z = self.coordinates.free(point)

    def noise(self, pairs: int, seed: int, sigma: float) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        noise = sigma * torch.randn(pairs, len(self.z), dtype=torch.float64, generator=draw)
        return self.legal(noise)

    def legal(self, noise: Tensor) -> Tensor:
        """Noise cut to what leaves both sides legal: on a linear scale not every number is."""
        room = torch.cat(
            [
                torch.minimum(part - hyper.low, hyper.high - part).clamp(min=0).flatten()
                if hyper.scale == "linear"
                else torch.full((part.numel(),), math.inf, dtype=torch.float64)
                for part, hyper in zip(
                    self.coordinates.layout.unflatten(self.z).values(),
                    self.coordinates.hypers.values(),
                    strict=True,
                )
            ]
        )
        return noise.clamp(-room, room)

    def around(self, noise: Tensor) -> list[Tensors]:
        """The point itself, and the points at plus and minus each row of the noise, in turns."""
        moves = torch.stack([noise, -noise], 1).flatten(0, 1)
        return [self.coordinates.point(z) for z in (self.z, *(self.z + moves))]

    def estimate(self, loss: float, slopes: Tensor, steps: int, how: str) -> Estimate:
        """An estimate from one gradient in the coordinates per pair, NaN where it diverged."""
        good = slopes[slopes.isfinite().all(1)]
        count = len(good)
        if not count:
            return Estimate.diverged(steps, "every pair of trainings diverged", loss)
        # Entry by entry: d value / d z.
        ones = {name: torch.ones(h.shape) for name, h in self.coordinates.hypers.items()}
        through = self.coordinates.pull(self.z, ones)
        unflatten = self.coordinates.layout.unflatten
        spread = good.std(0) / math.sqrt(count) if count > 1 else torch.full_like(self.z, math.nan)
        how = f"{how}, {count} of {len(slopes)} pairs"
        note = Note(steps=steps, how=how, stderr=unflatten(spread / through.abs()))
        grad = unflatten(good.mean(0) / through)
        return finished(torch.tensor(loss, dtype=torch.float64), grad, note)


def _changes(losses: Sequence[float]) -> Tensor:
    """(loss at plus - loss at minus) / 2 for every pair."""
    plus, minus = torch.tensor(losses, dtype=torch.float64).view(-1, 2).unbind(1)
    return (plus - minus) / 2


def _slopes(
    losses: Sequence[float], noise: Tensor, sigma: float, guess: Tensor | None = None
) -> Tensor:
    """noise change / sigma^2 for every pair, with the part of the change that a guess expects
    replaced by what it is in the mean.
    """
    changes = _changes(losses)
    if guess is None:
        return noise * changes[:, None] / sigma**2
    return guess + noise * (changes - noise @ guess)[:, None] / sigma**2


def _check(pairs: int, sigma: float) -> None:
    if pairs < 1:
        raise ValueError(f"pairs={pairs} trains nothing; give at least 1")
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma={sigma:g} must be positive and finite")


__all__ = ["ES", "PES"]
