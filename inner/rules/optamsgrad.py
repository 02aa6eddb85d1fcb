"""Optimistic AMSGrad: AMSGrad that steps ahead along a guess of the next gradient.

Wang, Li, Karimi & Li 2021, arXiv:1903.01435, proceedings.mlr.press/v157/wang21c. In the paper's
form: no correction of bias, and a second moment of the gradient's distance from its guess, which we
know from the first version of the paper and could not verify in the last. p is the point ahead, at
which gradients are taken, and the slot half what it is ahead of.

The paper leaves the guess open. Here it is the last gradient, or with guess="momentum" the average
of them. The authors' experiments extrapolate from the last iterates instead, at the price of a
second gradient per step; that is left out. eps, which the paper has not, is the implementers'.
"""

import torch

from ..core.hyper import Choice, decay, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import weights, zeros
from ..numerics.elementwise import root


@rule(
    "OptAMSGrad",
    slots={"m": zeros, "v": zeros, "v_max": zeros, "guessed": zeros, "half": weights},
    lr=learning_rate(1e-3),
    beta1=decay(0.9),
    beta2=decay(0.99),
    eps=positive(1e-8, search=(1e-12, 1e-2)),
    weight_decay=weight_decay(0.0),
    guess=Choice("gradient", ("gradient", "momentum")),
)
def optamsgrad(p, g, s, t, lr, beta1, beta2, eps, weight_decay, guess):
    g = g + weight_decay * p
    m = beta1 * s["m"] + (1 - beta1) * g
    surprise = g - s["guessed"]
    v = beta2 * s["v"] + (1 - beta2) * surprise * surprise
    v_max = torch.maximum(s["v_max"], v)
    guessed = g if guess == "gradient" else m
    ahead = beta1 * s["m"] + (1 - beta1) * guessed
    rate = lr / (root(v_max) + eps)
    half = s["half"] - rate * m
    slots = {"m": m, "v": v, "v_max": v_max, "guessed": guessed, "half": half}
    return half - rate * ahead, slots
