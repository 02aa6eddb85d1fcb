"""What every estimator promises: an estimate under a seed, and an outcome where there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..inner.core.hyper import Discrete, Hyper, Tensors
from ..inner.registry import find_rule
from ..meta.problems.data import Split
from ..meta.problems.problem import Problem
from ..meta.training.estimate import Estimate, Estimator
from ..meta.training.finite_differences import directional_difference
from ..meta.training.outcome import Outcome
from ..meta.training.training import Training
from .contracts import Check, run_checks

_F64 = torch.float64
# Calls within which weights overflow.
_CALLS = 50


class _Bowl(Problem):
    """A training loss whose minimum follows a hyper x, and another quadratic held out."""

    name = "bowl"
    hypers: Mapping[str, Hyper] = {"x": Hyper(0.5, -10.0, 10.0, "linear", (-2.0, 2.0))}
    choices: Mapping[str, Discrete] = {}
    chosen: Mapping[str, object] = {}
    splits: tuple[Split, ...] = ("valid",)

    def choose(self, **chosen: object) -> Problem:
        return self

    def start(self, seed: int) -> tuple[Tensors, Tensors]:
        draw = torch.Generator().manual_seed(seed)
        return {"w": torch.randn(3, generator=draw, dtype=_F64)}, {}

    def batch(self, step: int, seed: int) -> Any:
        return ()

    def inner_loss(
        self, params: Tensors, buffers: Tensors, hypers: Tensors, batch: Any
    ) -> tuple[Tensor, Tensors]:
        scale = torch.tensor([1.0, 2.0, 3.0], dtype=_F64)
        return (scale * (params["w"] - hypers["x"]) ** 2).sum() / 2, buffers

    def output(
        self, params: Tensors, buffers: Tensors, hypers: Tensors, batch: Any
    ) -> tuple[Tensor, Tensors]:
        return params["w"], buffers

    def loss_of(self, output: Tensor, params: Tensors, hypers: Tensors, batch: Any) -> Tensor:
        return self.inner_loss({"w": output}, {}, hypers, batch)[0]

    def outer_loss(self, params: Tensors, buffers: Tensors, hypers: Tensors) -> Tensor:
        return (params["w"] - 1).square().sum() + 1

    def measure(self, params: Tensors, buffers: Tensors, split: Split) -> dict[str, float]:
        return {"loss": float(self.outer_loss(params, buffers, {}))}


def bowl(steps: int = 20, lr: float = 0.2) -> Training:
    """Gradient descent on a quadratic whose minimum is a hyper of the loss, x."""
    return Training(_Bowl(), find_rule("sgd"), steps, values={"lr": lr})


def _answers(make: Callable[[], Estimator], learn: str) -> None:
    run = bowl()
    point = run.start(learn.split(","))
    estimate, _ = make()(run, point, None, seed=0)
    assert isinstance(estimate, Estimate), f"it returns a {type(estimate).__name__}"
    assert estimate.ok, f"its outcome is {estimate.note.outcome}: {estimate.note.reason}"
    assert math.isfinite(estimate.loss), f"its loss is {estimate.loss}"
    shapes = {n: x.shape for n, x in estimate.grad.items()}
    assert shapes == {n: x.shape for n, x in point.items()}, f"its gradient has shapes {shapes}"


def _repeats(make: Callable[[], Estimator], learn: str) -> None:
    run = bowl()
    point = run.start(learn.split(","))
    (one, _), (other, _) = (make()(run, point, None, seed=3) for _ in range(2))
    assert one.loss == other.loss, f"losses {one.loss} and {other.loss} under one seed"
    for name, x in one.grad.items():
        assert torch.equal(x, other.grad[name]), f"two gradients in {name} under one seed"


def _goes_on(make: Callable[[], Estimator], learn: str) -> None:
    run, estimator = bowl(), make()
    point, carry = run.start(learn.split(",")), None
    for seed in range(3):
        estimate, carry = estimator(run, point, carry, seed=seed)
        assert isinstance(estimate, Estimate), f"call {seed} returns a {type(estimate).__name__}"


def _keeps_the_point(make: Callable[[], Estimator], learn: str) -> None:
    run = bowl()
    point = run.start(learn.split(","))
    before = {n: x.clone() for n, x in point.items()}
    make()(run, point, None, seed=0)
    changed = [n for n, x in point.items() if not torch.equal(x, before[n]) or x.requires_grad]
    assert not changed, f"{', '.join(changed)} of the point was changed"


def _diverges(make: Callable[[], Estimator], learn: str) -> None:
    run, estimator, carry = bowl(steps=400, lr=50.0), make(), None
    point = run.start(learn.split(","))
    for seed in range(_CALLS):  # A call may do only a part of a training.
        estimate, carry = estimator(run, point, carry, seed=seed)
        if not estimate.ok:
            break
    assert not estimate.ok, f"its outcome is {estimate.note.outcome} where weights overflow"
    assert estimate.note.outcome is not Outcome.OK and not estimate.grad, "it has a gradient"
    assert estimate.note.reason, "it gives no reason"


def _is_exact(make: Callable[[], Estimator], learn: str, tolerance: float) -> None:
    run = bowl()
    point = run.start(learn.split(","))
    estimate, _ = make()(run, point, None, seed=0)
    for name in point:
        way = {
            n: torch.ones_like(x) if n == name else torch.zeros_like(x) for n, x in point.items()
        }
        found = directional_difference(run, point, way, seed=0)
        slope = float(estimate.grad[name].sum())
        assert abs(slope - found) <= tolerance * max(1.0, abs(found)), (
            f"the derivative in {name} is {found:.9g} and the estimate {slope:.9g}"
        )


def estimator_checks(
    make: Callable[[], Estimator], learn: str = "x", tolerance: float | None = None
) -> Iterator[Check]:
    """The contract of an estimator, a check per property.

    Args:
        make: returns a new one each time.
        learn: hypers that it differentiates in, of lr (the rule's) and x (the loss's).
        tolerance: relative to 1 or the derivative, of an exact one against finite differences;
            None for one that is not exact for the training as it is.
    """
    shape = "return (Estimate(loss, grad by full name, Note(...)), carry)"
    yield Check("it answers", partial(_answers, make, learn), shape)
    yield Check(
        "the same seed gives the same",
        partial(_repeats, make, learn),
        "draw from generators seeded by the seed alone",
    )
    yield Check("its carry goes back in", partial(_goes_on, make, learn), shape)
    yield Check(
        "it leaves the point alone",
        partial(_keeps_the_point, make, learn),
        "differentiate in detached copies of the values",
    )
    yield Check(
        "divergence is an outcome",
        partial(_diverges, make, learn),
        "return Estimate.diverged(steps, reason) where a loop is not ok",
    )
    if tolerance is not None:
        yield Check(
            "it is exact",
            partial(_is_exact, make, learn, tolerance),
            "look for a detach, or a hyper that is not in the point",
        )


def check_estimator(
    make: Callable[[], Estimator], learn: str = "x", tolerance: float | None = None
) -> None:
    """Raise AssertionError unless an estimator holds what every estimator promises.

    Args:
        make: returns a new one each time, such as its class.
        learn: hypers that it differentiates in, of lr (the rule's) and x (the loss's).
        tolerance: relative to 1 or the derivative, of an exact one against finite differences;
            None for one that is not exact for the training as it is.
    """
    name = getattr(make, "__name__", type(make()).__name__)
    run_checks(f"the estimator {name}", estimator_checks(make, learn, tolerance))


__all__ = ["bowl", "check_estimator", "estimator_checks"]
