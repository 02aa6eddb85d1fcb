"""DynAG: AlphaGrad that finds its alpha. Sane 2025, github.com/Soham4001A/DynamicAlphaGrad.

The successor of `alphagrad` by its author; there is no paper, so this is his code (classes
DynamicAlphaGrad and DAG of optim/sgd.py, with the constants of the latter). Each tensor's alpha
goes towards what would put the share p_star of the entries of a normal gradient beyond tau, times
(p_star / the share that was beyond it)^saturation_power.

A rule over tensors sees one at a time, so the number of all weights, by which alpha is multiplied
by (n / model_size)^(1/3), has to be given: with 0 that factor is 1, as for a model of one tensor.

shrink=True is DAG: after warmup_steps tanh becomes steeper and lower, by one factor s, as far as
updates have become smaller than shrink_ratio times what they were in the warm-up. It is off unless
asked for, because s is each tensor's own here and the whole model's there. Decided where his
versions differ: the share is of |alpha g / |g|| > tau, before s and at every step; the size of an
update is that of the direction, so that a falling learning rate shrinks nothing; the first
direction enters the momentum buffer undamped, as in `alphagrad`.
"""

import torch

from ..core.hyper import Choice, Integer, decay, fraction, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import number, zeros
from ..numerics.elementwise import root
from .sgd import heavy_ball, nesterov_needs_momentum

_SHRINK = ("shrink", True)


def shrinking(s, t, warmup_steps, shrink_ratio, shrink_min):
    """The factor s: 1 as long as updates have the size that they had in the warm-up."""
    first = torch.where(s["rms_start"] == 0, 1.0, s["rms_start"])
    share = (s["rms"] / (shrink_ratio * first)).clamp(max=1)
    begun = t > warmup_steps + 1
    return 1 - begun * (1 - shrink_min) * (1 - share)


def measured(d, s, t, warmup_steps, shrink_decay):
    """The sizes of updates, lately and in the warm-up."""
    # Their averages begin at the first value: no bias to correct.
    kept = shrink_decay * (t > 1)
    rms = kept * s["rms"] + (1 - kept) * root((d * d).to(s["rms"].dtype).mean())
    fresh = (1 - kept) * (t <= warmup_steps)
    return {"rms": rms, "rms_start": s["rms_start"] + fresh * (rms - s["rms_start"])}


@rule(
    "DynAG",
    over="tensor",
    slots={
        "momentum_buffer": zeros,
        "alpha": number(1.0),
        "saturation": number(),
        "rms": number(),
        "rms_start": number(),
    },
    check=nesterov_needs_momentum,
    lr=learning_rate(1e-3),
    momentum=decay(0.0, start=0.5),
    dampening=fraction(0.0, search=(0.0, 0.9), when=("nesterov", False)),
    weight_decay=weight_decay(0.0),
    k=positive(2.0, search=(0.1, 10.0)),
    tau=positive(
        1.25,
        search=(0.1, 10.0),
        finest="tensor",
        rough="part of its effect is through a count of the entries beyond it",
    ),
    p_star=decay(0.1, search=(0.01, 0.5), finest="tensor"),
    saturation_power=positive(0.3, search=(0.03, 1.0), finest="tensor"),
    alpha_decay=decay(0.9, finest="tensor"),
    eps=positive(1e-5, search=(1e-8, 1e-1), finest="tensor"),
    shrink_ratio=positive(0.3, search=(0.03, 3.0), when=_SHRINK, finest="tensor"),
    shrink_min=fraction(0.1, when=_SHRINK, finest="tensor"),
    shrink_decay=decay(0.98, when=_SHRINK, finest="tensor"),
    nesterov=Choice(False, (False, True)),
    shrink=Choice(False, (False, True)),
    warmup_steps=Integer(500, 1, 10**6, log=True, when=_SHRINK),
    model_size=Integer(0, 0, 2**48),
)
def dynag(
    p,
    g,
    s,
    t,
    lr,
    momentum,
    dampening,
    weight_decay,
    k,
    nesterov,
    tau,
    p_star,
    saturation_power,
    alpha_decay,
    eps,
    shrink_ratio,
    shrink_min,
    shrink_decay,
    shrink,
    warmup_steps,
    model_size,
):
    n, real = g.numel(), s["alpha"].dtype
    lower = shrinking(s, t, warmup_steps, shrink_ratio, shrink_min) if shrink else 1
    # In the precision of the numbers, which for bfloat16 weights is a higher one.
    length = root((g * g).to(real).sum())
    goal = lower * tau / torch.special.ndtri(1 - p_star / 2)
    goal = goal * (length + eps) / (length / n**0.5 + eps)
    goal = goal * (n / (model_size or n)) ** (1 / 3)
    goal = goal * (p_star / (s["saturation"] + eps)) ** saturation_power
    alpha = (alpha_decay * s["alpha"] + (1 - alpha_decay) * goal).clamp(1e-12, 1e12)
    steep = alpha * g / (length + eps)
    saturation = (steep.abs() > tau).to(real).mean()
    d = k * lower * torch.tanh(steep / lower) + weight_decay * p
    d, buffer = heavy_ball(d, s, t, momentum, dampening, nesterov)
    sizes = measured(d, s, t, warmup_steps, shrink_decay) if shrink else {}
    after = {**s, **buffer, **sizes, "alpha": alpha, "saturation": saturation}
    return p - lr * d, {name: x.to(s[name].dtype) for name, x in after.items()}
