"""AdamW: Adam with decoupled weight decay. Loshchilov & Hutter 2019, arXiv:1711.05101."""

from ..core.hyper import decay, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import zeros
from .adam import decayed, direction, moments


@rule(
    "AdamW",
    slots={"m": zeros, "v": zeros},
    lr=learning_rate(1e-3),
    beta1=decay(0.9),
    beta2=decay(0.999),
    eps=positive(1e-8, search=(1e-12, 1e-2)),
    weight_decay=weight_decay(1e-2),
)
def adamw(p, g, s, t, lr, beta1, beta2, eps, weight_decay):
    p, g = decayed(p, g, lr, weight_decay, decoupled=True)
    m, v = moments(g, s, beta1, beta2)
    return p - lr * direction(m, v, t, beta1, beta2, eps), {"m": m, "v": v}
