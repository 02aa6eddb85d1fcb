"""Whether compiling or tracing pays: the seconds it would save against the seconds it takes.

Where the seconds to come are not known, the policy is to compile once those spent by autograd have
reached the price: whoever rents until the rent has come to the price of a house, and buys then,
never pays more than twice the best (Karlin et al. 1988, doi:10.1007/BF01762111).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from ...inner.core.hyper import Tensors
from ..problems.problem import Problem
from ..training.cache import cache_of
from ..training.state import State
from ..training.training import Training


class Mode(NamedTuple):
    """A kind of compiled step. saved: the share of seconds without a compiler that it saves."""

    name: str
    saved: float


# Reverse steps are traced where they are not compiled, and tracing, which is cheap, has saved most.
REVERSE, FORWARD = Mode("reverse", 0.15), Mode("forward", 0.5)
# A price never seen, in seconds; what is left of it once inductor's cache on disk holds the code;
# plain steps in one step of a metagradient.
_NEW, _AGAIN, _STEPS = 20.0, 0.3, 3.5
# Seconds that tracing a product with the Hessian takes, and the share of a product that it saves.
_TRACE_PRODUCT, _OF_PRODUCT = 2.5, 0.25
# Tracing takes a few seconds and saves the Python of autograd's steps, about 2 ms each.
_TRACE_STEPS = 1000
# A cache that cannot be read or written is no reason to stop: there is no home, it is full, a file
# in it is torn.
_NO_CACHE = OSError, ValueError, RuntimeError


def why_not_compile(
    training: Training,
    learned: Sequence[str],
    state: State,
    values: Tensors,
    seed: int,
    expect: float | None,
    kind: Mode = REVERSE,
) -> str:
    """Why compiling would not pay, or is not wanted; empty if it is worth it.

    expect: seconds of metagradients still to come, if known; at the least the one that is about to
    be made, for which a few steps are timed.
    """
    if _switched_off():
        return "TORCH_COMPILE_DISABLE=1 is set"
    ahead = _ahead(training, state, values, seed, expect) * _step(training, state, values, seed)
    known = _remembered(_key(training, learned, state, kind))
    price = _NEW if known is None else known * _AGAIN
    if kind.saved * ahead >= price:
        return ""
    return f"{ahead:.2g} s of steps are too few to pay for about {price:.2g} s of compiling"


def worth_tracing(
    training: Training, state: State, values: Tensors, seed: int, expect: float | None
) -> bool:
    """Whether tracing pays where compiling does not."""
    if _switched_off():
        return training.steps >= _TRACE_STEPS
    return _ahead(training, state, values, seed, expect) >= _STEPS * _TRACE_STEPS


def _ahead(
    training: Training, state: State, values: Tensors, seed: int, expect: float | None
) -> float:
    """Plain steps that would take as long as the metagradients up to the next, or to the last."""
    seconds = cache_of(training.problem).get(("seconds spent", _rule(training)), 0.0)
    step = _step(training, state, values, seed)
    return float(max(seconds / step + _STEPS * training.steps, (expect or 0.0) / step))


def _switched_off() -> bool:
    """Whether compiling is: then nothing is decided by the clock, and bits never depend on it."""
    return os.environ.get("TORCH_COMPILE_DISABLE") == "1"


def spend(training: Training, seconds: float) -> None:
    """Add to the seconds spent on a problem by a rule without a compiler."""
    kept, key = cache_of(training.problem), ("seconds spent", _rule(training))
    kept[key] = kept.get(key, 0.0) + seconds


def spend_on_products(problem: Problem, seconds: float) -> None:
    """Add to the seconds spent on a problem's products with the Hessian by autograd."""
    kept = cache_of(problem)
    kept["seconds of products"] = kept.get("seconds of products", 0.0) + seconds


def worth_tracing_products(problem: Problem) -> bool:
    """Whether traced ones would have saved by now what they take to make."""
    if _switched_off():
        return False
    spent = float(cache_of(problem).get("seconds of products", 0.0))
    return spent * _OF_PRODUCT >= _TRACE_PRODUCT


def remember(
    training: Training, learned: Sequence[str], state: State, seconds: float, kind: Mode = REVERSE
) -> None:
    """Keep the price of a training's compiled steps for other processes.

    The highest seen: later ones were paid with that code at hand.
    """
    key = _key(training, learned, state, kind)
    with suppress(*_NO_CACHE):
        file = _folder() / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{max(seconds, _remembered(key) or 0.0):.3g}\n")


def _remembered(key: str) -> float | None:
    with suppress(*_NO_CACHE):
        return float((_folder() / key).read_text())
    return None


def _folder() -> Path:
    """Of files with a number of seconds each. Not beside inductor's code, which says only once it
    is loaded where that is.
    """
    return Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hyperdescent/compiling"
    )


def _key(training: Training, learned: Sequence[str], state: State, kind: Mode) -> str:
    shapes = [tuple(shape) for shape in training.layout.shapes]
    options = sorted(training.rule.options().items())
    where = state.p.dtype, state.p.device.type, torch.__version__
    said = repr((kind.name, training.label, options, shapes, tuple(learned), where))
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _rule(training: Training) -> str:
    """One rule's steps may take a hundred times another's, and its code is its own."""
    return f"{training.rule.name} {sorted(training.rule.options().items())}"


def _step(training: Training, state: State, values: Tensors, seed: int) -> float:
    """Seconds of a plain step, measured once per problem and rule."""
    kept, key = cache_of(training.problem), ("seconds of a step", _rule(training))
    if key not in kept:
        # The first step pays for what is loaded and allocated once. The same step every time: what
        # follows may diverge.
        float(training.step(state, values, 0, seed).p[0])  # A GPU has only queued it by now.
        began = time.monotonic()
        for _ in range(2):
            after = training.step(state, values, 0, seed)
        float(after.p[0])
        kept[key] = (time.monotonic() - began) / 2
    return kept[key]  # type: ignore[no-any-return]  # kept holds anything
