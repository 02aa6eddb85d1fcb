"""Grams: Adam's step length with the sign of the current gradient. Cao et al. 2024.

arXiv:2412.17107. As the authors' code (Gunale0926/Grams): weight decay comes first, eps is added to
the root of the biased second moment, and a weight whose gradient is 0 stays. Every hyperparameter
acts on the length, and its derivative is that of the path; what is lost, unless smooth, is that the
path beside it may turn elsewhere.
"""

import torch

from ..core.hyper import Choice, decay, learning_rate, positive, temperature, weight_decay
from ..core.rule import rule
from ..core.slots import zeros
from ..numerics.elementwise import root, sign
from .adam import decayed, moments


@rule(
    "Grams",
    slots={"m": zeros, "v": zeros},
    lr=learning_rate(1e-3),
    beta1=decay(0.9),
    beta2=decay(0.999),
    eps=positive(1e-6, search=(1e-12, 1e-2)),
    weight_decay=weight_decay(0.0),
    smooth=Choice(False, (False, True)),
    temperature=temperature(),
)
def grams(p, g, s, t, lr, beta1, beta2, eps, weight_decay, smooth, temperature):
    p, g = decayed(p, g, lr, weight_decay, decoupled=True)
    m, v = moments(g, s, beta1, beta2)
    length = torch.sqrt(1 - beta2**t) / (1 - beta1**t) * m.abs() / (root(v) + eps)
    return p - lr * length * sign(g, smooth, temperature), {"m": m, "v": v}
