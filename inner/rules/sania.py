"""SANIA: the step to where a quadratic model of the loss is f_star, scaled by a preconditioner.

Abdukhakimov, Xiang, Kamzolov, Gower & Takac 2023, arXiv:2312.17369. With d = g / B and q = g·d the
step is (1 - sqrt(1 - 2 (loss - f_star) / q)) * d, or all of d where the model never comes down to
f_star. B is the average of squared gradients, free of bias, or their sum (form="adagrad"). Where no
root is taken of it (is_sqrt=False), no diagonal rescaling of the weights changes their path. There
is no momentum.

Departures: the root has an infinite slope where 2 (loss - f_star) = q; here its argument bends
towards 0 within a distance of tau, and tau = 0 is the paper's. eps is added to B, as in the
experiments of the authors' code (fxrshed/SANIA); its torch classes take the larger of the two,
which has no slope where eps is that. Its size is that of those classes: at the first step B is g²,
and without eps the least gradient takes the largest step.

A loss below f_star makes the step an ascent to f_star. lr = 1 is the paper's.
"""

import torch

from ..core.hyper import Choice, Hyper, decay, learning_rate, positive
from ..core.rule import rule
from ..core.slots import zeros
from ..numerics.elementwise import at_least_float32, root


def bent(x, tau):
    """(x + sqrt(x² + tau²)) / 2: x far above 0 and 0 far below it."""
    size = torch.where(x > 0, x, -x)
    larger = (root(x * x + tau * tau) + size) / 2
    # Below 0 that form would be a difference of nearly equal numbers.
    return torch.where(x > 0, larger, tau * tau / (4 * larger + (larger == 0)))


@rule(
    "SANIA",
    over="model",
    needs=("loss",),
    slots={"v": zeros},
    lr=learning_rate(1.0, search=(1e-2, 10.0)),
    beta2=decay(0.999, when=("form", "adam")),
    eps=positive(0.1, search=(1e-8, 10.0)),
    f_star=Hyper(0.0, -torch.inf, torch.inf, "linear", search=(0.0, 1.0), finest="shared"),
    tau=positive(1e-3, search=(1e-6, 0.1), finest="shared"),
    form=Choice("adam", ("adam", "adagrad")),
    is_sqrt=Choice(False, (False, True)),
)
def sania(p, g, s, t, loss, lr, beta2, eps, f_star, tau, form, is_sqrt):
    if form == "adam":
        v = beta2 * s["v"] + (1 - beta2) * g * g
        scale = v / (1 - beta2**t) + eps
    else:
        v = s["v"] + g * g
        scale = v + eps
    d = g / root(scale) if is_sqrt else g / scale
    long = at_least_float32(g.dtype)
    q = (g.to(long) * d.to(long)).sum()
    x = 1 - 2 * (loss - f_star) / (q + (q == 0))
    return p - lr * (1 - root(bent(x, tau))) * d, {"v": v}
