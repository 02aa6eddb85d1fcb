"""Hypers that are learned during the one training they are for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..inner.core.hyper import Granularity, Tensors
from ..inner.core.rule import Rule
from .estimators import find_estimator
from .problems.problem import Problem
from .training.coordinates import Coordinates
from .training.estimate import Estimator
from .training.outcome import Outcome
from .training.spec import make_training, split_names
from .training.trained import Trained, trained_to

# Numbers of a hyper whose every move is kept.
_FEW = 1000


@dataclass(frozen=True)
class Online:
    """What a training with hypers that move ended with.

    Args:
        trained: its weights and measures, and how it ended.
        values: by full name, shape (moves + 1, *the hyper's), those before each move and the last;
            of hypers of more than a thousand numbers the last alone.
        losses: the held-out loss at each move.
        skipped: the steps at which a move was left out, and why.
    """

    trained: Trained
    values: Tensors
    losses: list[float]
    skipped: Mapping[int, str] = field(default_factory=dict)

    @property
    def outcome(self) -> Outcome:
        return self.trained.outcome

    @property
    def reason(self) -> str:
        return self.trained.reason


def train_online(
    problem: Problem,
    rule: str | Rule = "adamw",
    *,
    learn: str | Iterable[str] = ("lr",),
    steps: int = 1000,
    every: int = 10,
    rate: float = 0.05,
    method: str | Estimator = "one-pass",
    granularity: Mapping[str, Granularity] | None = None,
    values: Mapping[str, float | Tensor] | None = None,
    seed: int = 0,
) -> Online:
    """Train once and learn hypers on the way: every so many steps one move of Adam, `rate` long, in
    unconstrained coordinates and inside the search ranges. A move whose gradient is not to be
    trusted is left out and training goes on.

    Args:
        problem: what is trained, such as `problem_from_module` makes.
        rule: the optimizer, by name ("adamw", "clip_norm(adamw)") or as a Rule.
        learn: names of hypers, "lr,beta1" or any iterable of them.
        steps: training steps.
        every: steps between two moves.
        rate: how far a move goes, a share of a value on a logarithmic scale.
        method: "one-pass" for every hyper of a step (Clarke et al. 2022, arXiv:2110.10461);
            HypergradientDescent() on the training loss; Forward(discount=0.99) for MARTHE, 1 for
            the real-time variant; Implicit(warm_start=True), SAMA(warm_start=True) for hypers of
            the loss.
        granularity: {"alpha": "tensor"} for one value per parameter tensor, "element" per weight.
        values: to start from, and to keep where not learned.
        seed: of initial weights, batches and all other draws.
    """
    found = find_estimator(method)
    names = split_names(learn)
    if every < 1 or every > steps:
        raise ValueError(f"every={every} must be from 1 to steps={steps}")
    if not rate > 0:
        raise ValueError(f"rate={rate:g} must be positive")
    whole = make_training(problem, rule, steps, None, granularity, values)
    space = Coordinates({name: whole.hypers[name] for name in whole.expand(names)})
    z = space.inside(space.free(whole.start(names))).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=rate, betas=(0.9, 0.99))
    carry: Any = None
    done, losses = 0, []
    seen = _Seen()
    # A clone: the optimizer moves z in place, and on a linear scale a value is z itself.
    point = seen.add(space.point(z.detach().clone()))
    skipped: dict[int, str] = {}
    while done < steps:
        count = min(every, steps - done)
        estimate, carry = found.train_on(whole, point, carry, steps=count, seed=seed)
        done += count
        note = estimate.note
        losses.append(estimate.loss)
        if carry is None and note.outcome in (Outcome.DIVERGED, Outcome.NOT_DIFFERENTIABLE):
            ended = Trained(outcome=note.outcome, reason=note.reason)
            return Online(ended, seen.values(), losses, skipped)
        reached = found.state(carry)
        if reached is None:
            why = "begins anew at every call" if carry is None else "has no single training"
            raise TypeError(
                f"{method!r} {why}; give warm_start=True where it has that, or a method for one "
                "training, such as 'one-pass'"
            )
        state = reached
        if estimate.ok:
            z.grad = space.pull(z, estimate.grad)
            del estimate  # With a million numbers, room for the next one.
            optimizer.step()
            z.grad = None
            with torch.no_grad():
                z.copy_(space.inside(z))
        else:
            skipped[done] = note.reason
        point = seen.add(space.point(z.detach().clone()))
    ended = trained_to(whole, state, whole.resolve(point))
    return Online(ended, seen.values(), losses, skipped)


class _Seen:
    """The values that were in force, one after the other; of many numbers the last alone."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Tensor]] = {}

    def add(self, point: Tensors) -> Tensors:
        for name, value in point.items():
            rows = self._rows.setdefault(name, [])
            if value.numel() > _FEW:
                rows.clear()
            rows.append(value)
        return point

    def values(self) -> Tensors:
        return {name: torch.stack(rows) for name, rows in self._rows.items()}


__all__ = ["Online", "train_online"]
