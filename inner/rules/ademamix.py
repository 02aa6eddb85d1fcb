"""AdEMAMix: AdamW with a second, very slow average of the gradient. Pagliardini et al. 2024.

arXiv:2409.03137, as the authors' torch code (apple/ml-ademamix): the slow average is not corrected
for bias, so it starts small. beta3_warmup and alpha_warmup are the paper's two schedules, in steps,
0 for none: alpha rises from 0, beta3 from beta1, linearly in its half-life. Without them a large
beta3 with a large alpha diverges early.

At beta1 = 0, whose half-life is 0, the authors add 1e-8 inside a logarithm; ours is the exact
limit. They also drop the first average there, which is then the gradient itself.
"""

import torch

from ..core.hyper import decay, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import zeros
from .adam import decayed, direction, moments


def half_life(beta):
    """In steps; of 0, which has no logarithm, 0."""
    some = beta > 0
    return torch.where(some, -1 / torch.log2(torch.where(some, beta, 0.5)), 0.0)


def of_half_life(steps):
    """The inverse of half_life."""
    some = steps > 0
    return torch.where(some, torch.exp2(-1 / torch.where(some, steps, 1.0)), 0.0)


def risen(t, warmup):
    """The share of a linear warm-up that is over at step t."""
    return (t / torch.where(warmup > 0, warmup, 1.0)).clamp(max=1)


@rule(
    "AdEMAMix",
    slots={"m": zeros, "slow": zeros, "v": zeros},
    lr=learning_rate(1e-3),
    beta1=decay(0.9),
    beta2=decay(0.999),
    beta3=decay(0.9999, search=(0.9, 0.99999)),
    alpha=positive(2.0, search=(0.01, 20.0)),
    beta3_warmup=positive(0.0, search=(1.0, 1e5), start=100.0),
    alpha_warmup=positive(0.0, search=(1.0, 1e5), start=100.0),
    eps=positive(1e-8, search=(1e-12, 1e-2)),
    weight_decay=weight_decay(0.0),
)
def ademamix(
    p, g, s, t, lr, beta1, beta2, beta3, alpha, beta3_warmup, alpha_warmup, eps, weight_decay
):
    p, g = decayed(p, g, lr, weight_decay, decoupled=True)
    m, v = moments(g, s, beta1, beta2)
    share = risen(t, beta3_warmup)
    kept = of_half_life((1 - share) * half_life(beta1) + share * half_life(beta3))
    slow = kept * s["slow"] + (1 - kept) * g
    # direction divides what it is given by 1 - beta1**t, from which the slow average is exempt.
    mixed = m + alpha * risen(t, alpha_warmup) * (1 - beta1**t) * slow
    step = direction(mixed, v, t, beta1, beta2, eps)
    return p - lr * step, {"m": m, "slow": slow, "v": v}
