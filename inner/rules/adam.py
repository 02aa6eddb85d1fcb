"""Adam. Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1, with weight decay added to the gradient."""

from ..core.hyper import decay, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import zeros
from ..numerics.elementwise import root


def moments(g, s, beta1, beta2):
    """Exponential averages of the gradient and of its square."""
    return beta1 * s["m"] + (1 - beta1) * g, beta2 * s["v"] + (1 - beta2) * g * g


def direction(m, v, t, beta1, beta2, eps):
    """The first moment over the root of the second, both free of their bias towards zero."""
    # root, not sqrt: a weight that never saw a gradient has v = 0, where sqrt's slope is infinite.
    return (m / (1 - beta1**t)) / (root(v / (1 - beta2**t)) + eps)


def decayed(p, g, lr, weight_decay, decoupled):
    """Weight decay, taken off the weights or added to the gradient: (p, g)."""
    return ((1 - lr * weight_decay) * p, g) if decoupled else (p, g + weight_decay * p)


@rule(
    "Adam",
    slots={"m": zeros, "v": zeros},
    lr=learning_rate(1e-3),
    beta1=decay(0.9),
    beta2=decay(0.999),
    eps=positive(1e-8, search=(1e-12, 1e-2)),
    weight_decay=weight_decay(0.0),
)
def adam(p, g, s, t, lr, beta1, beta2, eps, weight_decay):
    m, v = moments(g + weight_decay * p, s, beta1, beta2)
    return p - lr * direction(m, v, t, beta1, beta2, eps), {"m": m, "v": v}
