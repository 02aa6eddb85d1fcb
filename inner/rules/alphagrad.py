"""AlphaGrad: each tensor's gradient, normalised and squashed by tanh. Sane 2025, arXiv:2504.16020.

As the author's code (Soham4001A/CleanRLfork, cleanrl/optim/sgd.py, 228578b3), which departs from
the paper twice: weight decay is added after tanh and so enters the momentum buffer, and the
learning rate multiplies after the buffer, not inside it.

An entry of a tensor of n elements reaches tanh as about alpha / sqrt(n): alpha far below sqrt(n)
is a normalised step of length lr * alpha, far above it a step of lr * sign(g). DynAG, its
successor, sets alpha itself from the share of entries beyond a threshold.
"""

import torch

from ..core.hyper import Choice, decay, fraction, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import zeros
from ..numerics.elementwise import root
from .sgd import heavy_ball, nesterov_needs_momentum


@rule(
    "AlphaGrad",
    over="tensor",
    slots={"momentum_buffer": zeros},
    check=nesterov_needs_momentum,
    lr=learning_rate(1e-3),
    alpha=positive(1.0, search=(0.1, 1e4), size_power=0.5),
    eps=positive(1e-8, search=(1e-12, 1e-2)),
    momentum=decay(0.0, start=0.5),
    dampening=fraction(0.0, search=(0.0, 0.9), when=("nesterov", False)),
    weight_decay=weight_decay(0.0),
    nesterov=Choice(False, (False, True)),
)
def alphagrad(p, g, s, t, lr, alpha, eps, momentum, dampening, weight_decay, nesterov):
    # root, not norm(): where a tensor has no gradient, norm's second derivative is NaN.
    squashed = torch.tanh(alpha * g / (root((g * g).sum()) + eps))
    d, s = heavy_ball(squashed + weight_decay * p, s, t, momentum, dampening, nesterov)
    return p - lr * d, s
