"""What rules for matrices have in common, and Adam for whatever else a model is made of."""

from dataclasses import replace

from ..compose.partition import partition
from ..core.hyper import decay, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import zeros
from .adam import decayed, direction, moments


def as_matrix(x):
    """Outputs x inputs; the kernel of a convolution is a matrix with the rest in its rows."""
    return x.reshape(len(x), -1)


def averaged(g, s, momentum, nesterov=True):
    """The average of gradients, or the next one's guess by Nesterov: (direction, slots)."""
    m = momentum * s["momentum_buffer"] + (1 - momentum) * g
    return momentum * m + (1 - momentum) * g if nesterov else m, {"momentum_buffer": m}


def shape_factor(p, scale="keller"):
    """The length of a step by the shape of the matrix."""
    m, n = as_matrix(p).shape
    return {"keller": max(1, m / n), "moonlight": 0.04 * max(m, n), "spectral": m / n}[scale] ** 0.5


def adam_for_the_rest(p, g, s, t, aux_lr, aux_beta1, aux_beta2, aux_eps, aux_weight_decay):
    p, g = decayed(p, g, aux_lr, aux_weight_decay, decoupled=True)
    m, v = moments(g, {"m": s["aux_m"], "v": s["aux_v"]}, aux_beta1, aux_beta2)
    step = direction(m, v, t, aux_beta1, aux_beta2, aux_eps)
    return p - aux_lr * step, {"aux_m": m, "aux_v": v}


def with_adam(title, matrix, *, slots=None, **declared):
    """The rule for the matrices of a model, which have momentum, and Jordan's Adam for the rest.

    All that is Adam's begins with aux_, so that no beta of one comes to stand beside one of the
    other in a pair of betas.
    """
    kept = {"momentum_buffer": zeros, **(slots or {})}
    one = rule(title, over="tensor", slots=kept, **declared)(matrix)
    rest = rule(
        "AdamForTheRest",
        slots={"aux_m": zeros, "aux_v": zeros},
        aux_lr=replace(learning_rate(3e-4), role="lr"),
        aux_beta1=replace(decay(0.9), role="beta1"),
        aux_beta2=replace(decay(0.95), role="beta2"),
        aux_eps=replace(positive(1e-10, search=(1e-12, 1e-2)), role="eps"),
        aux_weight_decay=replace(weight_decay(0.0), role="weight_decay"),
    )(adam_for_the_rest)
    return replace(partition(one, rest), name=title.lower(), title=title, doc=one.doc)
