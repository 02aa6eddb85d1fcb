"""Clipping with a floor under the shrinkage. Tucat et al. 2025, arXiv:2404.08624.

A step of lr * min(1, max(delta, gamma / norm)) along the gradient: delta = 0 is clipping by norm,
delta = 1 is plain descent, and any delta in between keeps the proof that wide nets train.

As the authors' code (Anirbit-AI/Delta-GClip): the norm is that of the gradient before weight decay
is added, so that decay is clipped along with it. Where the gradient is exactly 0 the code takes no
step; here decay goes on, as it does at any gradient that is merely small. The code has no default
of lr.

The slope in gamma is 0 outside of gamma < norm < gamma / delta, that in delta is 0 below it.
"""

import torch

from ..core.hyper import fraction, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..numerics.elementwise import at_least_float32, root


def clipped(p, g, lr, gamma, delta, weight_decay):
    """The step of one unit, a tensor or the model."""
    long = g.to(at_least_float32(g.dtype))
    norm = root((long * long).sum())
    dead = norm == 0  # Nothing to clip, and gamma / 0 would have no slope.
    factor = torch.maximum(delta, (gamma + dead) / (norm + dead)).clamp(max=1)
    return (p - lr * factor * (g + weight_decay * p)).to(p.dtype)


@rule(
    "DeltaGClip",
    over="model",
    lr=learning_rate(1.0, search=(1e-4, 10.0)),
    gamma=positive(0.1, search=(1e-3, 1e2)),
    delta=fraction(1e-3),
    weight_decay=weight_decay(0.0),
)
def deltagclip(p, g, s, t, lr, gamma, delta, weight_decay):
    return clipped(p, g, lr, gamma, delta, weight_decay), {}


@rule(
    "DeltaGClipC",
    over="tensor",
    lr=learning_rate(0.1, search=(1e-4, 10.0)),
    gamma=positive(0.25, search=(1e-3, 1e2)),
    delta=fraction(1e-3),
    weight_decay=weight_decay(0.0),
)
def deltagclipc(p, g, s, t, lr, gamma, delta, weight_decay):
    """DeltaGClip by the norm of each tensor. Tucat et al. 2025, arXiv:2404.08624, deltaGClip_c of
    the code named there.
    """
    return clipped(p, g, lr, gamma, delta, weight_decay), {}
