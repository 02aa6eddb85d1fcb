"""ASGO and DASGO: one-sided preconditioning. An et al. 2025, arXiv:2503.20762."""

import torch

from ..core.hyper import Integer, decay, positive, weight_decay
from ..core.slots import Slot
from ..numerics.elementwise import at_least_float32, root
from ..numerics.newton_schulz import inverse_root
from .matrices import as_matrix, averaged, with_adam


def _square(p, values, layout):
    side = min(as_matrix(p).shape)
    return p.new_zeros((side, side), dtype=at_least_float32(p.dtype))


def _row(p, values, layout):
    return p.new_zeros(as_matrix(p).shape[1], dtype=at_least_float32(p.dtype))


def sized_like_adam(u):
    """A matrix scaled to a root mean square of 0.2; zero stays zero."""
    norm = root((u * u).sum())
    return u * (0.2 * u.numel() ** 0.5 / torch.where(norm == 0, 1.0, norm))


def asgo_matrix(p, g, s, t, lr, momentum, beta2, weight_decay, matalg_steps):
    """ASGO: Shampoo of the smaller side alone. An et al. 2025, arXiv:2503.20762.

    An average of gradients times the inverse square root of an average of g g' (g' g where the
    matrix is tall or square), scaled to a root mean square of 0.2, AdamW's. As the authors' code
    (infinity-stars/ASGO): averages where the paper's algorithm sums, the root from coupled
    Newton-Schulz steps with the coefficients of Polar Express. Its eps of 1e-10 only keeps the
    norm there from 0 and is no hyper. Two departures: where rounding gives it NaN, it takes the
    identity for the root; here eigenvalues are raised by ten roundings, which leaves no NaN and
    gives rank deficient averages a root in float32 (slopes through it are right to some 1e-3). And
    what is all zero stays, where it divides 0 by 0. No bias correction: the scaling cancels it.

    Convolutions are matrices of outputs x rest (the authors refuse them). What is no matrix is
    Adam's, with hypers that begin with aux_, and so should embeddings be: see Muon.
    """
    m, kept = averaged(g, s, momentum, nesterov=False)
    long = at_least_float32(p.dtype)
    # A copy, because the last bits of a product depend on how its factors lie in memory.
    x, u = as_matrix(g).to(long, copy=True), as_matrix(m).to(long)
    wide = x.shape[0] < x.shape[1]
    v = beta2 * s["v"] + (1 - beta2) * (x @ x.mT if wide else x.mT @ x)
    half = inverse_root(v, matalg_steps)
    u = sized_like_adam(half @ u if wide else u @ half).view_as(p).to(p.dtype)
    return (1 - lr * weight_decay) * p - lr * u, {**kept, "v": v}


asgo = with_adam(
    "ASGO",
    asgo_matrix,
    slots={"v": Slot(_square)},
    lr=positive(1e-2, search=(1e-4, 1.0)),
    momentum=decay(0.9),
    beta2=decay(0.8, finest="tensor"),
    weight_decay=weight_decay(0.1),
    matalg_steps=Integer(10, 5, 20),
)


def dasgo_matrix(p, g, s, t, lr, momentum, beta2, eps, weight_decay):
    """DASGO: ASGO's diagonal, one number per column. An et al. 2025, arXiv:2503.20762.

    An average of gradients over the root of an average of each column's squared norm, scaled to a
    root mean square of 0.2, as the authors' code (infinity-stars/ASGO); it averages columns, the
    inputs of a layer, whichever side is smaller. lr is that of its class; its configuration file
    has 1e-2. What is all zero stays, and what is no matrix is Adam's, as in ASGO.
    """
    m, kept = averaged(g, s, momentum, nesterov=False)
    long = at_least_float32(p.dtype)
    x, u = as_matrix(g).to(long), as_matrix(m).to(long)
    v = beta2 * s["v"] + (1 - beta2) * (x * x).sum(0)
    u = sized_like_adam(u * (v + eps).rsqrt()).view_as(p).to(p.dtype)
    return (1 - lr * weight_decay) * p - lr * u, {**kept, "v": v}


dasgo = with_adam(
    "DASGO",
    dasgo_matrix,
    slots={"v": Slot(_row)},
    lr=positive(1e-3, search=(1e-4, 1.0)),
    momentum=decay(0.9),
    beta2=decay(0.95, finest="tensor"),
    eps=positive(1e-8, search=(1e-12, 1e-2), finest="tensor"),
    weight_decay=weight_decay(0.1),
)
