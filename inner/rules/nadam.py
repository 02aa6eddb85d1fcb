"""NAdam: Adam with Nesterov momentum. Dozat 2016, openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ.

The momentum schedule is that of the paper's section 3.2; m averages with the constant beta1, as in
torch.optim.NAdam.
"""

from ..core.hyper import Choice, decay, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import shared, zeros
from ..numerics.elementwise import root
from .adam import decayed, moments


@rule(
    "NAdam",
    slots={"m": zeros, "v": zeros, "mu_product": shared(1.0)},
    lr=learning_rate(2e-3),
    beta1=decay(0.9),
    beta2=decay(0.999),
    eps=positive(1e-8, search=(1e-12, 1e-2)),
    weight_decay=weight_decay(0.0),
    momentum_decay=positive(4e-3, search=(1e-4, 1.0)),
    decoupled_weight_decay=Choice(False, (False, True)),
)
def nadam(p, g, s, t, lr, beta1, beta2, eps, weight_decay, momentum_decay, decoupled_weight_decay):
    p, g = decayed(p, g, lr, weight_decay, decoupled_weight_decay)
    m, v = moments(g, s, beta1, beta2)
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (k * momentum_decay)) for k in (t, t + 1))
    mu_product = s["mu_product"] * mu
    ahead = (1 - mu) / (1 - mu_product) * g + mu_next / (1 - mu_product * mu_next) * m
    step = ahead / (root(v / (1 - beta2**t)) + eps)
    return p - lr * step, {"m": m, "v": v, "mu_product": mu_product}
