"""Ano and Anolog: the sign of the momentum times the size of the current gradient.

Kegreisz 2025, arXiv:2508.18258.
"""

import torch

from ..core.hyper import Choice, decay, learning_rate, positive, temperature, weight_decay
from ..core.rule import rule
from ..core.slots import zeros
from ..numerics.elementwise import root, sign


def second_moment_stays_positive(values):
    """The condition under which no sequence of gradients makes the second moment negative."""
    if torch.as_tensor(values["beta2"], dtype=torch.float64).min() < 0.5:
        return "beta2 must be >= 0.5, or the second moment can become negative"
    return None


def stepped(p, g, s, t, lr, beta1, beta2, eps, weight_decay, smooth, temperature):
    """One step of either of them."""
    m = beta1 * s["m"] + (1 - beta1) * g
    square = g * g
    # temperature has the unit of a gradient.
    grows = sign(square - s["v"], smooth, temperature**2)
    v = beta2 * s["v"] + (1 - beta2) * grows * square
    size = g.abs() / root(v / (1 - beta2**t) + eps)
    step = size * sign(m, smooth, temperature)
    return (1 - lr * weight_decay) * p - lr * step, {"m": m, "v": v}


@rule(
    "Ano",
    slots={"m": zeros, "v": zeros},
    check=second_moment_stays_positive,
    lr=learning_rate(1e-4),
    beta1=decay(0.92, rough="it enters only through the sign of the momentum"),
    beta2=decay(0.99, search=(0.5, 0.99999)),
    eps=positive(1e-8, search=(1e-12, 1e-2)),
    weight_decay=weight_decay(0.0),
    smooth=Choice(False, (False, True)),
    temperature=temperature(),
)
def ano(p, g, s, t, lr, beta1, beta2, eps, weight_decay, smooth, temperature):
    """Ano: the sign of the momentum times the size of the current gradient. Kegreisz 2025.

    arXiv:2508.18258, as the author's code (Adrienkgz/ano-experiments): the second moment falls by
    sign(g^2 - v) as Yogi's, and decays by beta2 besides, which Yogi's does not; eps is inside its
    root. The paper's theory has a falling learning rate, the code a constant one. Below beta2 = 0.5
    the second moment can become negative, which is checked.
    """
    return stepped(p, g, s, t, lr, beta1, beta2, eps, weight_decay, smooth, temperature)


@rule(
    "Anolog",
    slots={"m": zeros, "v": zeros},
    check=second_moment_stays_positive,
    lr=learning_rate(1e-4),
    beta2=decay(0.99, search=(0.5, 0.99999)),
    eps=positive(1e-8, search=(1e-12, 1e-2)),
    weight_decay=weight_decay(0.0),
    smooth=Choice(False, (False, True)),
    temperature=temperature(),
)
def anolog(p, g, s, t, lr, beta2, eps, weight_decay, smooth, temperature):
    """Anolog: Ano whose momentum lengthens with time, beta1 = 1 - 1 / log(t). Kegreisz 2025.

    arXiv:2508.18258. In the author's code beta1 is -0.44 at the first two steps, so that the second
    subtracts the first gradient; ours is 0 there. beta2 and the correction of the second moment are
    those of the package ano-optimizer; the paper's experiments have 0.999 and no correction.
    """
    beta1 = (1 - 1 / torch.log(t.clamp(min=2))).clamp(min=0)
    return stepped(p, g, s, t, lr, beta1, beta2, eps, weight_decay, smooth, temperature)
