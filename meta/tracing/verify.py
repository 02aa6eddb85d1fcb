"""Whether generated code may be used: only once it has done what autograd does, at an early step.

Not where a training has come to: near a minimum gradients are differences of almost equal numbers,
and two correct programs agree in none of their digits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from ...inner.core.layout import Layout
from ...inner.torch_internals import Refused
from ..problems.problem import Problem
from ..training.cache import cache_of
from ..training.state import State
from ..training.training import Training
from .state_layout import UnevenBatches

# How far a compiled vector may be from autograd's: units of its norm in the last place, and times
# what one such unit in the weights changes in it; in bfloat16, where a unit is 1/128, fewer.
_UNITS, _SPREADS = 200.0, 20.0
_LOW_UNITS, _LOW_SPREADS = 20.0, 5.0
# Steps that are done before the one that is looked at: what a rule remembers is no longer 0.
_STEPS = 2

M = TypeVar("M")


@dataclass(eq=False)
class Verified:
    """Code that may yet be refused. refused: why it was; empty as long as it was not. seconds:
    spent on making it.
    """

    refused: str = field(default="", init=False)
    seconds: float = field(default=0.0, kw_only=True)

    def spend(self, seconds: float) -> None:
        self.seconds += seconds

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Where it is made and looked at: Refused if it was refused once, or is inside."""
        if self.refused:
            raise Refused(self.refused)
        try:
            yield
        except Refused as why:
            self.refused = str(why)
            raise


def early_state(
    step: Callable[[int, State], State], state: State, steps: int, done: int = 0
) -> tuple[int, State]:
    """(one of the first of so many steps, the state before it)."""
    last = min(done + _STEPS, steps - 1)
    for i in range(done, last):
        state = step(i, state)
    return last, state


def directions(like: Sequence[Tensor], *shape: int) -> list[Tensor]:
    """Random tensors, the same ones every time, of these shapes behind `shape`: an adjoint or
    tangents of which no part is 0.
    """
    draw = torch.Generator().manual_seed(0)
    return [torch.randn((*shape, *x.shape), generator=draw).to(x) for x in like]


def check_against_autograd(
    training: Training,
    names: list[str],
    found: Sequence[Tensor],
    by_autograd: Callable[[State], list[Tensor]],
    state: State,
    low: bool = False,
) -> bool:
    """Raise Refused unless compiled results are as near to autograd's as rounding lets them be.

    False if there was nothing to compare, because autograd's are not finite: divergence is not
    the compiler's fault.

    What rounding does is seen by the same once more from weights that are rounded otherwise: some
    numbers are noise through and through, such as the gradient of a bias that batch norm takes
    off again. So flat vectors are compared by parameter tensor. low: whether some of the step is
    computed in bfloat16.
    """
    unit = torch.finfo(torch.bfloat16 if low else state.p.dtype).eps
    units, spreads = (_LOW_UNITS, _LOW_SPREADS) if low else (_UNITS, _SPREADS)
    draw = torch.Generator(state.p.device).manual_seed(0)
    noise = torch.randn(state.p.shape, generator=draw, device=state.p.device)
    expected = by_autograd(state)
    nudged = by_autograd(state._replace(p=state.p * (1 + unit * noise.to(state.p))))
    compared = True
    for name, x, y, near in zip(names, found, expected, nudged, strict=True):
        whole = float(y.double().norm())
        if not whole < float("inf"):
            compared = False
            continue
        differences = near - y, x.to(y.device) - y
        for part, *each in _by_tensor(training.layout, y, *differences):
            size, spread, error = (float(z.double().norm()) for z in each)
            # One unit of the whole beside its own: a part may be 0 but for rounding.
            if not error <= unit * (units * size + whole) + spreads * spread:
                raise Refused(
                    f"the compiled step of {training.label} is wrong: {name} differs from "
                    f"autograd's{part} by {error / max(size, 1e-300):.1e} of its norm"
                )
    return compared


def _by_tensor(layout: Layout, *vectors: Tensor) -> Iterator[tuple[str, *tuple[Tensor, ...]]]:
    """(" at its name", its part of every vector) for each parameter tensor; one part without a name
    where they are no flat vectors of parameters.
    """
    if vectors[0].shape[-1:] != (sum(layout.sizes),):
        yield "", *vectors
        return
    parts = [x.split(layout.sizes, -1) for x in vectors]
    for name, *each in zip(layout.names, *parts, strict=True):
        yield f" at {name}", *each


def with_autograd_fallback(problem: Problem, compile: object, attempt: Callable[[str], M]) -> M:
    """attempt(""), which may use compiled steps; if they are refused, attempt(why) from the start:
    nothing that they have summed up may stay.
    """
    kept = cache_of(problem)
    try:
        # Batches of several shapes are found late, when much of a training is done; once is enough.
        return attempt(kept.get("uneven", "") if compile == "auto" else "")
    except (Refused, UnevenBatches) as why:
        refused = str(why)
        if isinstance(why, UnevenBatches):
            if compile != "auto":
                raise
            kept["uneven"] = refused
    # Behind the exception, which held all states.
    if compile is True:
        warnings.warn(f"{refused}; its steps are done by autograd", stacklevel=3)
    return attempt(refused)
