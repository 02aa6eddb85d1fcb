"""Solvers for A x = b that only need products with A, for the linear system of implicit methods.

A solver never raises on slow or failed convergence: whoever asked reads the residual.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

Matvec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solved:
    """x: the last iterate. residual: |b - A x| / |b| computed from x itself, inf where x means
    nothing. steps: products with A, the one for the residual not counted.
    """

    x: Tensor
    residual: float
    steps: int


class Solve(Protocol):
    """(matvec, b) -> Solved, for a vector b and a symmetric A."""

    def __call__(self, matvec: Matvec, b: Tensor) -> Solved: ...


def conjugate_gradient(steps: int = 20, tol: float = 1e-10, damping: float = 0.0) -> Solve:
    """A solver of A x = b for symmetric positive definite A, by at most `steps` products with A.

    It stops where |b - A x| falls to tol |b|. damping solves (A + damping I) x = b instead; what
    that costs is in the residual, which is always A's. A direction of no positive curvature shows
    that A is not positive definite: the residual is then inf, because the iterate means nothing.
    That the directions met were positive does not prove that all are.
    Hestenes & Stiefel 1952, doi:10.6028/jres.049.044.
    """
    _check_steps(steps)
    if tol < 0 or damping < 0:
        raise ValueError(f"tol={tol:g} and damping={damping:g} must not be negative")
    return partial(_conjugate_gradient, steps=steps, tol=tol, damping=damping)


def _conjugate_gradient(
    matvec: Matvec, b: Tensor, *, steps: int, tol: float, damping: float
) -> Solved:
    x, r, p = torch.zeros_like(b), b, b
    rr = r @ r
    enough = tol**2 * rr
    done = 0
    while done < steps and not bool(rr <= enough):
        product = matvec(p) + damping * p
        done += 1
        curvature = p @ product
        if not bool(curvature > 0):  # NaN included
            return Solved(x, math.inf, done)
        length = rr / curvature
        x = x + length * p
        r = r - length * product
        before, rr = rr, r @ r
        p = r + (rr / before) * p
    return Solved(x, _residual(matvec, b, x), done)


def neumann(step_size: float, steps: int = 20) -> Solve:
    """A solver by the series x = step_size * sum over k <= steps of (I - step_size A)^k b.

    For A with eigenvalues in [mu, L] and step_size < 2 / L the relative error is at most
    max(|1 - step_size mu|, |1 - step_size L|) ** (steps + 1). A term longer than the one before it
    shows that A or step_size is not so: the series diverges and the residual is inf.
    Lorraine, Vicol & Duvenaud 2020, arXiv:1911.02590, Algorithm 3.
    """
    _check_steps(steps)
    if not step_size > 0:
        raise ValueError(f"step_size={step_size:g} must be positive and below 2 / L")
    return partial(_neumann, steps=steps, step_size=step_size)


# Rounding alone lets a term that should keep its length grow by a few of float32's 1e-7.
_LONGER = 1 + 1e-5


def _neumann(matvec: Matvec, b: Tensor, *, steps: int, step_size: float) -> Solved:
    total, term = b, b
    length = term.norm()
    for done in range(1, steps + 1):
        term = term - step_size * matvec(term)
        total = total + term
        before, length = length, term.norm()
        if not bool(length <= before * _LONGER):  # NaN included
            return Solved(step_size * total, math.inf, done)
    x = step_size * total
    return Solved(x, _residual(matvec, b, x), steps)


def _residual(matvec: Matvec, b: Tensor, x: Tensor) -> float:
    size = float(b.norm())
    if size == 0:
        return 0.0
    residual = float((b - matvec(x)).norm()) / size
    return residual if math.isfinite(residual) else math.inf


def _check_steps(steps: int) -> None:
    if steps < 0:
        raise ValueError(f"steps={steps} is negative; it is the number of products with A")


__all__ = ["Matvec", "Solve", "Solved", "conjugate_gradient", "neumann"]
