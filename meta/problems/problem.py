"""What is trained: the Problem protocol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ...inner.core.hyper import Discrete, Hyper, Tensors
from .data import Split
from .seeding import fold_in, fork_rng


@runtime_checkable
class Problem(Protocol):
    """A model, its training loss and a held-out loss, as pure functions.

    Subclass it for one of your own, which then has the defaults given here. Every random draw is a
    function of the arguments alone, so that a replay repeats it bit for bit; those of inner_loss
    (dropout) are from torch's global generators, which whoever calls it has seeded with (seed,
    step).

    Attributes:
        name: for messages and records.
        hypers: the loss's own hyperparameters.
        choices: its discrete options.
        chosen: those in force where not the default.
        accumulate: the parts of a batch that inner_loss takes one after the other.
        autocast: the dtype that it computes in, where not the parameters' own.
    """

    name: str
    hypers: Mapping[str, Hyper]
    choices: Mapping[str, Discrete]
    chosen: Mapping[str, object]
    accumulate: int = 1
    autocast: torch.dtype | None = None

    @property
    def splits(self) -> Iterable[Split]:
        """What `measure` can be asked for; "valid" always."""
        ...

    def choose(self, **chosen: object) -> Problem:
        """The same problem with other discrete options."""
        ...

    def start(self, seed: int) -> tuple[Tensors, Tensors]:
        """Fresh (parameters, buffers)."""
        ...

    def batch(self, step: int, seed: int) -> Any:
        """What the training loss reads at a step (from 0): nested tuples, lists, dicts of tensors.

        Where shapes are the same at every step, steps can be compiled.
        """
        ...

    def inner_loss(
        self, params: Tensors, buffers: Tensors, hypers: Tensors, batch: Any
    ) -> tuple[Tensor, Tensors]:
        """The scalar training loss on a batch, and the buffers after it."""
        ...

    def outer_loss(self, params: Tensors, buffers: Tensors, hypers: Tensors) -> Tensor:
        """The scalar held-out loss, deterministic."""
        ...

    def measure(self, params: Tensors, buffers: Tensors, split: Split) -> dict[str, float]:
        """What to report about trained parameters on one split: "loss" and more by name."""
        ...


def loss_at(
    problem: Problem, params: Tensors, buffers: Tensors, hypers: Tensors, step: int, seed: int
) -> tuple[Tensor, Tensors]:
    """The training loss at a step on that step's batch, under that step's random draws."""
    batch = problem.batch(step, seed)
    with draws_of(step, seed, next(iter(params.values())).device):
        return problem.inner_loss(params, buffers, hypers, batch)


def draws_of(step: int, seed: int, device: torch.device) -> AbstractContextManager[None]:
    """The random draws that the training loss makes at a step."""
    return fork_rng(fold_in(seed, step, 2), device)


__all__ = ["Problem", "draws_of", "loss_at"]
