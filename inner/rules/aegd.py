"""AEGD: a gradient step times an energy that only falls. Liu & Tian 2020, arXiv:2010.05109.

Each weight has an energy r, sqrt(loss + c) before the first step; loss + c must stay above 0, or
weights are NaN. As the authors' code (txping/AEGD): weight decay joins v and so draws on the
energy, decoupled it shrinks the weights first, which is their AEGDW. The energy is kept in float32
at least: in bfloat16 it would never fall.

The energy never recovers, so that noise drains it and steps die out. The loss must be that of the
batch of the gradient.
"""

import torch

from ..core.hyper import Choice, decay, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import long_zeros, zeros
from .adam import decayed


def slope(g, r, loss, c):
    """That of sqrt(loss + c), and the energy before the step."""
    whole = (loss + c).sqrt()
    # Zero before the first gradient, which may come late; the loss is known only then.
    return g / (2 * whole), torch.where(r == 0, whole, r)


def drawn(r, v, lr):
    """The energy after a step."""
    v = v.to(r.dtype)
    return r / (1 + 2 * lr * v * v)


@rule(
    "AEGD",
    needs=("loss",),
    slots={"r": long_zeros},
    lr=learning_rate(0.1, search=(1e-3, 10.0)),
    c=positive(1.0, search=(1e-2, 1e2), finest="shared"),
    weight_decay=weight_decay(0.0),
    decoupled_weight_decay=Choice(False, (False, True)),
)
def aegd(p, g, s, t, loss, lr, c, weight_decay, decoupled_weight_decay):
    v, r = slope(g, s["r"], loss, c)
    p, v = decayed(p, v, lr, weight_decay, decoupled_weight_decay)
    r = drawn(r, v, lr)
    return p - (2 * lr * r * v).to(p.dtype), {"r": r}


@rule(
    "AEGDM",
    needs=("loss",),
    slots={"r": long_zeros, "momentum_buffer": zeros},
    lr=learning_rate(0.01, search=(1e-4, 1.0)),
    c=positive(1.0, search=(1e-2, 1e2), finest="shared"),
    momentum=decay(0.9),
    weight_decay=weight_decay(0.0),
)
def aegdm(p, g, s, t, loss, lr, c, momentum, weight_decay):
    """AEGD with momentum. Liu & Tian 2022, arXiv:2203.12191.

    As the authors' code (txping/AEGDM): weight decay joins the momentum and draws on no energy.
    """
    v, r = slope(g, s["r"], loss, c)
    r = drawn(r, v, lr)
    b = momentum * s["momentum_buffer"] + v + weight_decay * p
    return p - (2 * lr * r * b).to(p.dtype), {"r": r, "momentum_buffer": b}
