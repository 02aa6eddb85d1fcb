"""What every problem promises: functions of their arguments alone, and losses with a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import default_convert

from ..inner.core.hyper import Tensors
from ..meta.problems.problem import Problem, loss_at
from .contracts import Check, run_checks

_SEEDS = (0, 1)


def _defaults(problem: Problem) -> Tensors:
    return {
        n: torch.full(h.shape, h.default, dtype=torch.float64) for n, h in problem.hypers.items()
    }


def _same(ours: Tensors, theirs: Tensors) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(x, theirs[n]) for n, x in ours.items())


def _is_complete(problem: Problem) -> None:
    parts = {n for n in (*Problem.__annotations__, *vars(Problem)) if not n.startswith("_")}
    missing = [name for name in parts if not hasattr(problem, name)]
    assert not missing, f"it has no {', '.join(sorted(missing))}"
    assert "valid" in problem.splits, "its splits have no 'valid'"


def _starts_alike(problem: Problem) -> None:
    for seed in _SEEDS:
        torch.manual_seed(seed + 17)
        params, buffers = problem.start(seed)
        torch.rand(3)  # What anyone else draws.
        again, others = problem.start(seed)
        assert params and all(p.is_floating_point() for p in params.values()), "no float weights"
        assert _same(params, again) and _same(buffers, others), (
            f"start({seed}) differs when asked twice"
        )


def _reads_alike(problem: Problem) -> None:
    for step in (0, 3):
        first = _leaves(problem.batch(step, 0))
        torch.rand(3)
        again = _leaves(problem.batch(step, 0))
        assert len(first) == len(again), f"batch({step}, 0) differs when asked twice"
        assert all(map(torch.equal, first, again)), f"batch({step}, 0) differs when asked twice"


def _leaves(batch: object) -> list[Tensor]:
    batch = default_convert(batch)
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, dict):
        return [x for each in batch.values() for x in _leaves(each)]
    if isinstance(batch, tuple | list):
        return [x for each in batch for x in _leaves(each)]
    raise TypeError(f"a batch holds a {type(batch).__name__}; it may hold tensors alone")


def _losses_alike(problem: Problem) -> None:
    params, buffers = problem.start(0)
    hypers = _defaults(problem)
    kept = {n: b.clone() for n, b in buffers.items()}
    loss, after = loss_at(problem, params, buffers, hypers, 0, 0)
    again, _ = loss_at(problem, params, buffers, hypers, 0, 0)
    assert loss.ndim == 0, f"the training loss has shape {tuple(loss.shape)}"
    assert bool(loss.isfinite()), f"the training loss is {float(loss)} at the start"
    assert torch.equal(loss, again), "the training loss differs when asked twice"
    assert after.keys() == buffers.keys(), "the buffers after a step are not those before it"
    assert _same(buffers, kept), "the buffers given were written into"
    held = problem.outer_loss(params, buffers, hypers)
    assert held.ndim == 0, f"the held-out loss has shape {tuple(held.shape)}"
    assert torch.equal(held, problem.outer_loss(params, buffers, hypers)), (
        "the held-out loss differs when asked twice"
    )


def _has_slopes(problem: Problem) -> None:
    """Along a random direction, in the weights' own precision."""
    params, buffers = problem.start(0)
    hypers = _defaults(problem)
    names = list(params)
    leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
    draw = torch.Generator().manual_seed(0)
    ways = {n: torch.randn(p.shape, generator=draw).to(p) for n, p in params.items()}
    eps = max(torch.finfo(p.dtype).eps for p in params.values())
    h = eps ** (1 / 3)

    def inner(params: Tensors) -> Tensor:
        return loss_at(problem, params, buffers, hypers, 0, 0)[0]

    def outer(params: Tensors) -> Tensor:
        return problem.outer_loss(params, buffers, hypers)

    for called, loss_of in (("training", inner), ("held-out", outer)):
        loss = loss_of(leaves)
        assert loss.requires_grad, f"the {called} loss has no graph to the weights"
        slopes = torch.autograd.grad(loss, [leaves[n] for n in names], materialize_grads=True)
        slope = sum(float((g * ways[n]).sum()) for n, g in zip(names, slopes, strict=True))
        wide, near = (_difference(loss_of, params, ways, step) for step in (h, h / 2))
        found = (4 * near - wide) / 3
        # Rounding is eps / h, and kinks may lie on the way; a wrong slope is far off.
        size = max(1.0, abs(float(loss.detach())))
        bound = 0.05 * max(abs(slope), abs(found)) + 20 * eps / h * size
        assert abs(slope - found) <= bound, (
            f"the {called} loss changes by {found:.3g} along a direction, and its gradient says "
            f"{slope:.3g}"
        )


def _difference(
    loss_of: Callable[[Tensors], Tensor], params: Tensors, ways: Tensors, h: float
) -> float:
    """Central, along ways."""
    with torch.no_grad():
        ahead, behind = (
            float(loss_of({n: p + sign * h * ways[n] for n, p in params.items()}))
            for sign in (1, -1)
        )
    return (ahead - behind) / (2 * h)


def _measures(problem: Problem) -> None:
    params, buffers = problem.start(0)
    for split in problem.splits:
        measured = problem.measure(params, buffers, split)
        assert "loss" in measured, f"measure(..., {split!r}) has no 'loss'"
        odd = [n for n, x in measured.items() if not isinstance(x, float)]
        assert not odd, f"measure(..., {split!r}) gives no float for {', '.join(odd)}"


def problem_checks(problem: Problem) -> Iterator[Check]:
    """The contract of a problem, a check per property.

    Args:
        problem: to be checked.
    """
    pure = "draw from generators seeded by the arguments alone, and write into no argument"
    yield Check(
        "it has all of a problem's parts",
        partial(_is_complete, problem),
        "derive it from hyperdescent.Problem",
    )
    yield Check("weights are a function of the seed", partial(_starts_alike, problem), pure)
    yield Check("batches are functions of step and seed", partial(_reads_alike, problem), pure)
    yield Check("losses are functions of their arguments", partial(_losses_alike, problem), pure)
    yield Check(
        "losses have the gradient that they say",
        partial(_has_slopes, problem),
        "compute losses from params by torch operations, without detach, item or no_grad",
    )
    yield Check(
        "every split is measured",
        partial(_measures, problem),
        "return a dict of floats with 'loss'",
    )


def check_problem(problem: Problem) -> None:
    """Raise AssertionError unless a problem holds what every problem promises.

    Args:
        problem: one of your own, or what `problem_from_module` made of your model.
    """
    run_checks(f"the problem {getattr(problem, 'name', problem)}", problem_checks(problem))


__all__ = ["check_problem", "problem_checks"]
