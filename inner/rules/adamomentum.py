"""AdaMomentum: Adam with the second moment of the averaged gradient. Wang et al., arXiv:2106.11514.

"Rethinking Adam: A Twofold Exponential Moving Average Approach", 2021. eps is added to the second
moment at every step and not to the root: it adds up to eps / (1 - beta2), whose root at the
defaults is 3e-3, so that weights with smaller gradients take steps of momentum, not of Adam. Read
in an independent implementation (lavish619/AdaMomentum-Optimizer-Experiments), as the authors' code
was not to be found; weight decay is that one's, added to the gradient, or decoupled by choice.
"""

from ..core.hyper import Choice, decay, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import zeros
from ..numerics.elementwise import root
from .adam import decayed


@rule(
    "AdaMomentum",
    slots={"m": zeros, "v": zeros},
    lr=learning_rate(1e-3),
    beta1=decay(0.9),
    beta2=decay(0.999),
    eps=positive(1e-8, search=(1e-12, 1e-2)),
    weight_decay=weight_decay(0.0),
    decoupled_weight_decay=Choice(False, (False, True)),
)
def adamomentum(p, g, s, t, lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay):
    p, g = decayed(p, g, lr, weight_decay, decoupled_weight_decay)
    m = beta1 * s["m"] + (1 - beta1) * g
    v = beta2 * s["v"] + (1 - beta2) * m * m + eps
    step = m / (1 - beta1**t) / root(v / (1 - beta2**t))
    return p - lr * step, {"m": m, "v": v}
