"""RMSprop. Tieleman & Hinton 2012, Coursera lecture 6.5; centered form Graves, arXiv:1308.0850.

Without bias correction, and eps added to the root, as in torch.optim.RMSprop.
"""

from ..core.hyper import Choice, decay, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import if_option, zeros
from ..numerics.elementwise import root


@rule(
    "RMSprop",
    slots={
        "square_avg": zeros,
        "grad_avg": if_option("centered", True, zeros),
        "momentum_buffer": zeros,
    },
    lr=learning_rate(1e-2),
    alpha=decay(0.99),
    eps=positive(1e-8, search=(1e-12, 1e-2)),
    weight_decay=weight_decay(0.0),
    momentum=decay(0.0, start=0.5),
    centered=Choice(False, (False, True)),
)
def rmsprop(p, g, s, t, lr, alpha, eps, weight_decay, momentum, centered):
    g = g + weight_decay * p
    square = alpha * s["square_avg"] + (1 - alpha) * g * g
    mean = alpha * s["grad_avg"] + (1 - alpha) * g if centered else s["grad_avg"]
    # Rounding can take the variance just below 0, where the root is NaN.
    variance = (square - mean * mean).clamp(min=0) if centered else square
    b = momentum * s["momentum_buffer"] + g / (root(variance) + eps)
    return p - lr * b, {"square_avg": square, "grad_avg": mean, "momentum_buffer": b}
