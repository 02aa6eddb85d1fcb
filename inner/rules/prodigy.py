"""Prodigy: Adam that estimates the distance to the solution, and with it the learning rate.

Mishchenko & Defazio 2023, arXiv:2306.06101. As the authors' code (konstmish/prodigy): the estimate
d is one number of the whole model that only grows, the step is taken with d before its update and
eps multiplied by d after it, and lr is a factor that stays at 1. Weight decay is decoupled. beta3
stands by itself; in the authors' code it is the root of beta2 unless given. Left out are their
growth_rate and safeguard_warmup, off by default, and coupled decay.

Instead of the first weights we keep the way from them, in float32 at least: the same in exact
arithmetic, but steps of size d0 are lost in bfloat16 weights, and d would stay at d0 for ever.
"""

import torch

from ..core.hyper import Choice, decay, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import Slot, long_zeros, number
from ..numerics.elementwise import at_least_float32, root


def _small(p, values, layout):
    # float16 has no number as small as the square of d0 times a gradient.
    return torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.bfloat16))


def _first_distance(p, values, layout):
    return values["d0"].to(p.device, at_least_float32(p.dtype), copy=True)


@rule(
    "Prodigy",
    over="model",
    slots={
        "m": Slot(_small),
        "v": Slot(_small),
        "way": long_zeros,
        "sum": Slot(_small),
        "numerator": number(),
        "d": Slot(_first_distance),
    },
    lr=learning_rate(1.0, search=(0.01, 10.0)),
    beta1=decay(0.9),
    beta2=decay(0.999),
    beta3=decay(0.999**0.5, finest="shared"),
    eps=positive(1e-8, search=(1e-12, 1e-2)),
    weight_decay=weight_decay(0.0),
    use_bias_correction=Choice(False, (False, True)),
    d0=positive(1e-6, search=(1e-8, 1e-2), finest="shared"),
    d_coef=positive(1.0, search=(0.1, 10.0), finest="shared"),
)
def prodigy(
    p, g, s, t, lr, beta1, beta2, beta3, eps, weight_decay, use_bias_correction, d0, d_coef
):
    before, g = s["d"], g.to(s["m"].dtype)
    rate = before * lr
    if use_bias_correction:
        rate = rate * torch.sqrt(1 - beta2**t) / (1 - beta1**t)
    weight = before / d0
    m = beta1 * s["m"] + before * (1 - beta1) * g
    v = beta2 * s["v"] + before * before * (1 - beta2) * g * g
    summed = beta3 * s["sum"] + weight * rate * g
    along = weight * (rate * g * s["way"]).sum()
    numerator = (beta3 * s["numerator"] + along).to(before.dtype)
    size = summed.abs().sum(dtype=before.dtype)
    # Before the first gradient there is nothing to divide by.
    estimate = d_coef * numerator / torch.where(size > 0, size, 1.0)
    d = torch.maximum(before, estimate.to(before.dtype))
    step = rate * (m / (root(v) + d * eps) + weight_decay * p)
    slots = {"m": m, "v": v, "way": s["way"] + step, "sum": summed, "numerator": numerator, "d": d}
    return (p - step).to(p.dtype), slots
