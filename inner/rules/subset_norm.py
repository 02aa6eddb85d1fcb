"""Subset-Norm and Subspace-Momentum. Nguyen & Nguyen 2024, arXiv:2411.07120 (ICML 2025)."""

from typing import Any

import torch

from ..core.hyper import Choice, Integer, decay, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import Slot, zeros
from ..numerics import counter_rng as noise
from ..numerics.elementwise import at_least_float32, root
from .adam import decayed


def subsets(shape):
    """The shape of a matrix's second moments: of one number per line along its shorter side."""
    if len(shape) < 2:
        return tuple(shape)
    rows, columns = shape[0], shape[1:].numel()
    return (rows, 1) if rows >= columns else (1, columns)


def _subset_moments(p, values, layout):
    # So short that they may be exact: in bfloat16 an average with beta2 = 0.999 stands still.
    return p.new_zeros(subsets(p.shape), dtype=at_least_float32(p.dtype))


def averaged(v, squares, beta2, second_moment):
    return v + squares if second_moment == "sum" else beta2 * v + (1 - beta2) * squares


def subset_scale(g, s, beta2, eps, second_moment):
    """(what to divide by, in the shape of the weights; the second moments)"""
    squares = (g * g).to(s["v"].dtype)
    if g.ndim > 1:
        dim = 1 if s["v"].shape[1] == 1 else 0
        squares = squares.flatten(1).sum(dim, keepdim=True)
    v = averaged(s["v"], squares, beta2, second_moment)
    wide = root(v)
    if g.ndim > 1:
        wide = wide.expand(g.shape[0], g.shape[1:].numel()).reshape(g.shape)
    return wide + eps, v.to(s["v"].dtype)


def basis(size, rank, change, seed):
    """Orthonormal rows of a random basis, functions of the number of the change: those of a Hartley
    transform, which is orthogonal in every size, behind random signs.
    """
    # Streams apart: which rows and which signs.
    rows = noise.uniform(change, (size,), seed=seed).argsort()[:rank]
    signs = torch.sign(noise.uniform(change, (size,), seed=seed, stream=1) - 0.5)
    # Whole numbers first, because an angle of many turns has few digits.
    turns = rows[:, None] * torch.arange(size, device=rows.device) % size
    angle = turns.double() * (2 * torch.pi / size)
    return signs * (torch.cos(angle) + torch.sin(angle)) / size**0.5


def _subspace_zeros(p, values, layout):
    """One row per dimension of the subspace, along the longer side."""
    if p.ndim < 2:
        return torch.zeros_like(p)
    sides = p.shape[0], p.shape[1:].numel()
    return p.new_zeros(min(values["rank"], *sides), max(sides))


def subspace_momentum(g, s, t, beta1, rank, update_proj_gap, seed):
    """(momentum in the subspace and the gradient as it is outside, the momentum)"""
    if g.ndim < 2:
        m = beta1 * s["m"] + (1 - beta1) * g
        return m, m
    flat = g.flatten(1).to(at_least_float32(g.dtype))
    tall = flat.shape[0] >= flat.shape[1]
    flat = flat.mT if tall else flat
    change = torch.floor(t / update_proj_gap).to(g.device)
    b = basis(len(flat), min(rank, len(flat)), change, seed).to(flat)
    part = b @ flat
    kept = beta1 * (torch.remainder(t, update_proj_gap) > 0)
    m = kept * s["m"] + (1 - beta1) * part
    flat = flat + b.mT @ (m - part)
    return (flat.mT if tall else flat).reshape(g.shape), m.to(s["m"].dtype)


def _elementwise_moments(p, values, layout):
    return p.new_zeros(0) if values["second_moment"] == "none" else torch.zeros_like(p)


def corrected(t, beta1, beta2, correct_bias, second_moment):
    """What the authors multiply the learning rate by. Sums are free of bias."""
    if not correct_bias:
        return 1
    c2 = root(1 - beta2**t) if second_moment == "ema" else 1
    return c2 / (1 - beta1**t)


def stepped(p, step, lr, weight_decay):
    """Weight decay after the step, as the authors' code has it."""
    return decayed((p - lr * step).to(p.dtype), step, lr, weight_decay, decoupled=True)[0]


_EMA = ("second_moment", "ema")
_ALL: dict[str, Any] = {
    "lr": learning_rate(1e-3),
    "weight_decay": weight_decay(0.0),
    "correct_bias": Choice(True, (True, False)),
}
_SUBSETS: dict[str, Any] = {
    "beta2": decay(0.999, finest="tensor", when=_EMA),
    "eps": positive(1e-6, search=(1e-12, 1e-2)),
    "second_moment": Choice("ema", ("ema", "sum")),
}
_SUBSPACE: dict[str, Any] = {
    "beta1": decay(0.9, finest="tensor"),
    "rank": Integer(128, 1, 2**20, log=True),
    "update_proj_gap": Integer(200, 1, 10**6, log=True),
    "seed": Integer(0, 0, 2**31 - 1),
}


@rule(
    "SubsetNorm",
    over="tensor",
    slots={"m": zeros, "v": Slot(_subset_moments)},
    **_ALL,
    **_SUBSETS,
    beta1=decay(0.9),
)
def subsetnorm(p, g, s, t, lr, beta1, beta2, eps, weight_decay, correct_bias, second_moment):
    """Subset-Norm (AdamW-SN, AdaGrad-SN): one second moment for many weights. Nguyen & Nguyen 2024,
    arXiv:2411.07120 (ICML 2025).

    The subsets of the paper's heuristic: of a matrix the lines along its shorter side, so that it
    has max(rows, columns) second moments; of more than two dimensions, those of the matrix of shape
    (first, all others); a vector has one per entry, which is Adam. Memory: 1 + 1 / min(rows,
    columns) per weight of a matrix. Subsets of another size are left out. A moment is of the sum
    over its subset, not of the mean: steps are shorter than Adam's by the root of the subset's
    size, and the authors take ten times Adam's lr.

    As their code (timmytonga/sn-sm), eps is added before the bias is corrected, and weight decay
    comes after the step. second_moment="sum" is AdaGrad's. The code says that by beta2 = 1, where
    correct_bias makes every step 0; here it then corrects the momentum alone.
    """
    m = beta1 * s["m"] + (1 - beta1) * g
    scale, v = subset_scale(g, s, beta2, eps, second_moment)
    step = corrected(t, beta1, beta2, correct_bias, second_moment) * m / scale
    return stepped(p, step, lr, weight_decay), {"m": m, "v": v}


@rule(
    "SubspaceMomentum",
    over="tensor",
    slots={"m": Slot(_subspace_zeros), "v": Slot(_elementwise_moments)},
    **_ALL,
    **_SUBSPACE,
    beta2=decay(0.999, when=_EMA),
    eps=positive(1e-6, search=(1e-12, 1e-2), when=_EMA),
    second_moment=Choice("ema", ("ema", "none")),
)
def subspacemomentum(
    p,
    g,
    s,
    t,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    correct_bias,
    second_moment,
    rank,
    update_proj_gap,
    seed,
):
    """Subspace-Momentum: momentum in a random subspace of each matrix, the plain gradient outside.
    Nguyen & Nguyen 2024, arXiv:2411.07120 (ICML 2025).

    With Adam's denominator, or none (second_moment="none"), which is SGD. The subspace is one of
    the shorter side (of the matrix of shape (first, all others)) of dimension rank, or all of it
    where it is no longer than that. At every step that update_proj_gap divides it is another one,
    and the momentum begins at 0. Vectors have momentum everywhere.

    It is spanned by rows of a Hartley transform behind random signs: the authors' SRHT, with a
    transform that is orthogonal in every size. Gradients have no say in it, so a path's derivative
    is exact through every change, and nothing is kept of it. Left out: singular vectors of the
    gradient, whose slopes are infinite where two singular values meet, as at a gradient of 0.

    Memory: rank / min(rows, columns) per weight of a matrix for the momentum, and 1 for the
    denominator. rank, second_moment and seed may not change during a training.

    As the authors' code (timmytonga/sn-sm), correct_bias divides by 1 - beta1^t what is no average
    too: outside, the first step is ten times as long for beta1 = 0.9. Momentum that begins anew is
    not corrected. Where there is no denominator the code still multiplies by the root of
    1 - beta2^t; here it does not.
    """
    numerator, m = subspace_momentum(g, s, t, beta1, rank, update_proj_gap, seed)
    scale, v = 1, s["v"]
    if second_moment == "ema":
        v = beta2 * v + (1 - beta2) * g * g
        scale = root(v) + eps
    step = corrected(t, beta1, beta2, correct_bias, second_moment) * numerator / scale
    return stepped(p, step, lr, weight_decay), {"m": m, "v": v}


@rule(
    "SNSM",
    over="tensor",
    slots={"m": Slot(_subspace_zeros), "v": Slot(_subset_moments)},
    **_ALL,
    **_SUBSETS,
    **_SUBSPACE,
)
def snsm(
    p,
    g,
    s,
    t,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    correct_bias,
    second_moment,
    rank,
    update_proj_gap,
    seed,
):
    """Subset-Norm with Subspace-Momentum (AdamW-SNSM, AdaGrad-SNSM). Nguyen & Nguyen 2024,
    arXiv:2411.07120 (ICML 2025).

    The numerator of `subspacemomentum` over the denominator of `subsetnorm`, and what is said of
    them there. Memory: (rank + 1) / min(rows, columns) per weight of a matrix.
    """
    numerator, m = subspace_momentum(g, s, t, beta1, rank, update_proj_gap, seed)
    scale, v = subset_scale(g, s, beta2, eps, second_moment)
    step = corrected(t, beta1, beta2, correct_bias, second_moment) * numerator / scale
    return stepped(p, step, lr, weight_decay), {"m": m, "v": v}
