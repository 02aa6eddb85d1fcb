"""Adan: Nesterov momentum in Adam's form, with an average of the differences of gradients.

Xie et al. 2022, arXiv:2208.06677. As the authors' code (sail-sg/Adan): betas are what is kept,
which the paper writes as 1 - beta, and weight decay divides after the step, or with no_prox
multiplies before it. Its max_grad_norm is left out: clip_norm("adan", max_norm=...) does that,
without the eps in its division.
"""

from ..core.hyper import Choice, decay, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import zeros
from ..numerics.elementwise import root


@rule(
    "Adan",
    slots={"m": zeros, "difference": zeros, "v": zeros, "last": zeros},
    lr=learning_rate(1e-3),
    beta1=decay(0.98),
    beta2=decay(0.92),
    beta3=decay(0.99),
    eps=positive(1e-8, search=(1e-12, 1e-2)),
    weight_decay=weight_decay(0.0),
    no_prox=Choice(False, (False, True)),
)
def adan(p, g, s, t, lr, beta1, beta2, beta3, eps, weight_decay, no_prox):
    d = (g - s["last"]) * (t > 1)
    ahead = g + beta2 * d
    m = beta1 * s["m"] + (1 - beta1) * g
    difference = beta2 * s["difference"] + (1 - beta2) * d
    v = beta3 * s["v"] + (1 - beta3) * ahead * ahead
    along = m / (1 - beta1**t) + beta2 * difference / (1 - beta2**t)
    step = lr * along / (root(v / (1 - beta3**t)) + eps)
    shrink = lr * weight_decay
    p = (1 - shrink) * p - step if no_prox else (p - step) / (1 + shrink)
    return p, {"m": m, "difference": difference, "v": v, "last": g}
