"""AdaBelief: Adam with the variance of the gradient around its average in place of its square.

Zhuang et al. 2020, arXiv:2010.07468. As the authors' package (adabelief-pytorch 0.2.1): eps is
added to the variance at every step, so that it adds up to eps / (1 - beta2), and once more to the
root; it stands for the square of Adam's. rectify, off in the paper and on there, is RAdam's waiting
with a step of momentum meanwhile. Left out are that package's amsgrad, its decay without the
learning rate, and standing still instead of the step of momentum.
"""

from ..core.hyper import Choice, decay, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import zeros
from .adam import decayed, direction
from .radam import rectified


@rule(
    "AdaBelief",
    slots={"m": zeros, "variance": zeros},
    lr=learning_rate(1e-3),
    beta1=decay(0.9),
    beta2=decay(0.999),
    eps=positive(1e-16, search=(1e-20, 1e-4)),
    weight_decay=weight_decay(0.0),
    decoupled_weight_decay=Choice(True, (False, True)),
    rectify=Choice(True, (False, True)),
)
def adabelief(p, g, s, t, lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, rectify):
    p, g = decayed(p, g, lr, weight_decay, decoupled_weight_decay)
    m = beta1 * s["m"] + (1 - beta1) * g
    off = g - m
    variance = beta2 * s["variance"] + (1 - beta2) * off * off + eps
    if rectify:
        p = rectified(p, m, variance, t, lr, beta1, beta2, eps)
    else:
        p = p - lr * direction(m, variance, t, beta1, beta2, eps)
    return p, {"m": m, "variance": variance}
