"""RAdam: Adam whose adaptive step waits for a trustworthy variance. Liu et al., arXiv:1908.03265.

As torch.optim.RAdam: the adaptive step begins at length 5 of the average (4 in the paper), and eps
is added to the root of the biased second moment.
"""

import torch

from ..core.hyper import Choice, decay, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import zeros
from ..numerics.elementwise import root
from .adam import decayed, moments


def rectified(p, m, v, t, lr, beta1, beta2, eps):
    """The weights after a step along m, free of its bias, over the root of v once that can be
    trusted.
    """
    c2 = 1 - beta2**t
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / c2
    adaptive = length > 5
    # A branch not taken still has a slope, and 0 * inf is NaN: both get harmless arguments there.
    n, k = torch.where(adaptive, length, 6.0), torch.where(adaptive, longest, 6.0)
    scale = torch.sqrt((n - 4) * (n - 2) * k / ((k - 4) * (k - 2) * n) * c2)
    scale = torch.where(adaptive, scale, 1.0)
    # adaptive as a factor and not a branch: t may be a number on another device than the weights.
    spread = adaptive * (root(v) + eps) + ~adaptive
    return p - lr * scale / (1 - beta1**t) * (m / spread)


@rule(
    "RAdam",
    slots={"m": zeros, "v": zeros},
    lr=learning_rate(1e-3),
    beta1=decay(0.9),
    beta2=decay(0.999),
    eps=positive(1e-8, search=(1e-12, 1e-2)),
    weight_decay=weight_decay(0.0),
    decoupled_weight_decay=Choice(False, (False, True)),
)
def radam(p, g, s, t, lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay):
    p, g = decayed(p, g, lr, weight_decay, decoupled_weight_decay)
    m, v = moments(g, s, beta1, beta2)
    return rectified(p, m, v, t, lr, beta1, beta2, eps), {"m": m, "v": v}
