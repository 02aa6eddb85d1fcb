"""Solvers for A x = b that only need products with A, for the linear system of implicit methods.

A solver never raises on slow or failed convergence: whoever asked reads the residual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

Matvec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solved:
    """What a solver answers with.

    Args:
        x: the last iterate.
        residual: |b - A x| / |b| computed from x itself unless the solver was told not to, inf
            where x means nothing.
        steps: products with A, the one for the residual not counted.
    """

    x: Tensor
    residual: float
    steps: int


class Solve(Protocol):
    """(matvec, b) -> Solved, for a vector b and a symmetric A."""

    def __call__(self, matvec: Matvec, b: Tensor) -> Solved: ...


# Columns of A that `dense` will ask for: at 4096 the matrix and its factor take 256 MiB.
_DENSE = 4096


def conjugate_gradient(
    steps: int = 20, tolerance: float = 1e-10, damping: float = 0.0, *, check: bool = True
) -> Solve:
    """A solver of A x = b for symmetric positive definite A.

    A direction of no positive curvature shows that A is not positive definite: the residual is then
    inf, because the iterate means nothing. That the directions met were positive does not prove
    that all are. Hestenes & Stiefel 1952, doi:10.6028/jres.049.044.

    Args:
        steps: products with A at most.
        tolerance: it stops where |b - A x| falls to tolerance |b|.
        damping: solves (A + damping I) x = b instead; what that costs is in the residual, which is
            always A's.
        check: False saves the product that the residual takes: it is then the one that the
            iteration carries along, which may be smaller where products are rounded.
    """
    _check_steps(steps)
    if tolerance < 0 or damping < 0:
        raise ValueError(f"tolerance={tolerance:g} and damping={damping:g} must not be negative")
    return partial(
        _conjugate_gradient, steps=steps, tolerance=tolerance, damping=damping, check=check
    )


def _conjugate_gradient(
    matvec: Matvec, b: Tensor, *, steps: int, tolerance: float, damping: float, check: bool
) -> Solved:
    # In place, because a large vector that is made anew costs more than what is done with it.
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rr = r @ r
    enough = tolerance**2 * rr
    done = 0
    while done < steps and not bool(rr <= enough):
        product = matvec(p)
        if damping:
            product = product + damping * p
        done += 1
        curvature = p @ product
        if not bool(curvature > 0):  # NaN included
            return Solved(x, math.inf, done)
        length = rr / curvature
        x.addcmul_(p, length)
        r.addcmul_(product, -length)
        del product
        before, rr = rr, r @ r
        p.mul_(rr / before).add_(r)
    del p
    if check:
        del r
        return Solved(x, _residual(matvec, b, x), done)
    # r is b - (A + damping) x but for rounding.
    left, size = float(r.add_(x, alpha=damping).norm()), float(b.norm())
    return Solved(x, left / size if size else 0.0, done)


def normal_conjugate_gradient(steps: int = 20, tolerance: float = 1e-10) -> Solve:
    """A solver of A x = b for any A that can be inverted, by conjugate gradients on A'A x = A'b.

    It needs no positive curvature, for which it pays twice: two products with A a step, and a rate
    that goes by the square of the condition number. A is taken for symmetric; where it is not, call
    the solver with transposed=, products with A'. Hestenes & Stiefel 1952,
    doi:10.6028/jres.049.044.

    Args:
        steps: of the iteration at most.
        tolerance: it stops where |A'(b - A x)| falls to tolerance |A'b|.
    """
    _check_steps(steps)
    if tolerance < 0:
        raise ValueError(f"tolerance={tolerance:g} must not be negative")
    return partial(_normal_conjugate_gradient, steps=steps, tolerance=tolerance)


def _normal_conjugate_gradient(
    matvec: Matvec, b: Tensor, *, steps: int, tolerance: float, transposed: Matvec | None = None
) -> Solved:
    back = transposed or matvec
    x, r = torch.zeros_like(b), b
    p = s = back(r)
    ss = s @ s
    enough = tolerance**2 * ss
    done = 1
    for _ in range(steps):
        if bool(ss <= enough):
            break
        product = matvec(p)
        length = ss / (product @ product)
        x = x + length * p
        r = r - length * product
        s = back(r)
        done += 2
        before, ss = ss, s @ s
        p = s + (ss / before) * p
    return Solved(x, _residual(matvec, b, x), done)


def neumann(step_size: float | None = None, steps: int = 20, *, check: bool = True) -> Solve:
    """A solver by the series x = step_size * sum over k <= steps of (I - step_size A)^k b.

    For A with eigenvalues in [mu, L] and step_size < 2 / L the relative error is at most max(|1 -
    step_size mu|, |1 - step_size L|) ** (steps + 1). A term longer than the one before it shows
    that A or step_size is not so: the series diverges and the residual is inf. With steps=0 the
    answer is step_size b, as if A were a multiple of the identity (Luketina et al. 2016,
    arXiv:1511.06727). Lorraine, Vicol & Duvenaud 2020, arXiv:1911.02590, Algorithm 3.

    Args:
        step_size: below 2 / L; without one it is 1 / L, L by the power method along b, which takes
            ten more products.
        steps: terms after the first, a product with A each.
        check: False saves the product that the residual takes: it is then that of one term less,
            which is larger where step_size is right.
    """
    _check_steps(steps)
    if step_size is not None and not step_size > 0:
        raise ValueError(f"step_size={step_size:g} must be positive and below 2 / L")
    return partial(_neumann, steps=steps, step_size=step_size, check=check)


# Rounding alone lets a term that should keep its length grow by a few of float32's 1e-7.
_LONGER = 1 + 1e-5
# Products of the power method, and what is added to its answer, which comes from below.
_PROBES, _MARGIN = 10, 1.1


def _neumann(
    matvec: Matvec, b: Tensor, *, steps: int, step_size: float | None, check: bool
) -> Solved:
    probes = 0
    if step_size is None:
        probes, step_size = _PROBES, 1 / (_MARGIN * largest_eigenvalue(matvec, b, _PROBES))
    total, term = b.clone(), b.clone()
    size = length = term.norm()
    for done in range(1, steps + 1):
        term.sub_(matvec(term), alpha=step_size)
        total.add_(term)
        before, length = length, term.norm()
        if not bool(length <= before * _LONGER):  # NaN included
            return Solved(total.mul_(step_size), math.inf, done + probes)
    del term
    x = total.mul_(step_size)
    if check or not bool(size > 0):
        return Solved(x, _residual(matvec, b, x), steps + probes)
    return Solved(x, float(length / size), steps + probes)


def largest_eigenvalue(matvec: Matvec, b: Tensor, steps: int) -> float:
    """The largest eigenvalue of a symmetric A in size, by the power method, from below.

    Args:
        matvec: products with A.
        b: where the iteration begins.
        steps: products.
    """
    x, size = b, 0.0
    for _ in range(steps):
        x = matvec(x / x.norm().clamp(min=torch.finfo(x.dtype).tiny))
        size = float(x.norm())
    return max(size, torch.finfo(b.dtype).tiny)


def nystrom(rank: int = 10, damping: float = 0.1, seed: int = 0) -> Solve:
    """A solver of (A + damping I) x = b with A replaced by what some of its columns tell of it.

    C M^-1 C', where C are columns drawn at random and M their rows of the same numbers: one product
    with A per column, none of which waits for another. What low rank and damping cost is in the
    residual, which is A's. A negative eigenvalue of M shows that A is not positive definite: the
    residual is then inf. Those of M that are only rounding are left out, so that more columns than
    A has directions do no harm. Hataya & Yamada 2023, arXiv:2302.09726.

    Args:
        rank: how many columns.
        damping: added to the diagonal, above 0.
        seed: of the draw of columns.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} asks for no column; give at least 1")
    if not damping > 0:
        raise ValueError(f"damping={damping:g} must be positive: low rank alone has no inverse")
    return partial(_nystrom, rank=rank, damping=damping, seed=seed)


def _nystrom(matvec: Matvec, b: Tensor, *, rank: int, damping: float, seed: int) -> Solved:
    draw = torch.Generator().manual_seed(seed)
    at = torch.randperm(len(b), generator=draw)[:rank].to(b.device)
    columns = torch.stack(list(_columns(matvec, b, at.tolist())), 1).double()
    if not bool(columns.isfinite().all()):
        return Solved(b / damping, math.inf, len(at))
    core = columns[at]
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    least = len(at) * torch.finfo(b.dtype).eps * float(values.abs().max())
    if bool((values < -least).any()):
        return Solved(b / damping, math.inf, len(at))
    kept = values > least
    # A is near factor factor'; the inverse of that plus damping I by Woodbury's identity.
    factor = columns @ (vectors[:, kept] / values[kept].sqrt())
    small = factor.T @ factor
    small.diagonal().add_(damping)
    wide = b.double()
    x = ((wide - factor @ torch.linalg.solve(small, factor.T @ wide)) / damping).to(b)
    return Solved(x, _residual(matvec, b, x), len(at))


def dense() -> Solve:
    """A solver of A x = b for symmetric positive definite A by its whole matrix, exact but for
    rounding: as many products with A as it has rows, and their square in memory.

    For problems of a few thousand unknowns, above all to measure other solvers by. If A is not
    positive definite the residual is inf.
    """
    return _dense


def _dense(matvec: Matvec, b: Tensor) -> Solved:
    if len(b) > _DENSE:
        raise ValueError(
            f"dense() would make a matrix of {len(b):,} by {len(b):,}, and stops at {_DENSE:,}; "
            "use conjugate_gradient()"
        )
    matrix = torch.stack(list(_columns(matvec, b, range(len(b)))), 1).double()
    factor, failed = torch.linalg.cholesky_ex((matrix + matrix.T) / 2)
    if bool(failed) or not bool(factor.isfinite().all()):
        return Solved(torch.zeros_like(b), math.inf, len(b))
    x = torch.cholesky_solve(b.double()[:, None], factor)[:, 0].to(b)
    return Solved(x, _residual(matvec, b, x), len(b))


def _columns(matvec: Matvec, b: Tensor, at: Iterable[int]) -> Iterator[Tensor]:
    for i in at:
        unit = torch.zeros_like(b)
        unit[i] = 1
        yield matvec(unit)


def _residual(matvec: Matvec, b: Tensor, x: Tensor) -> float:
    size = float(b.norm())
    if size == 0:
        return 0.0
    residual = float((b - matvec(x)).norm()) / size
    return residual if math.isfinite(residual) else math.inf


def _check_steps(steps: int) -> None:
    if steps < 0:
        raise ValueError(f"steps={steps} is negative; it is the number of products with A")


__all__ = [
    "Matvec",
    "Solve",
    "Solved",
    "conjugate_gradient",
    "dense",
    "largest_eigenvalue",
    "neumann",
    "normal_conjugate_gradient",
    "nystrom",
]
