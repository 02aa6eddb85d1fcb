"""Normalized SGD with momentum: every tensor moves by the length lr.

Cutkosky & Mehta 2020, arXiv:2002.03305, without their extrapolated gradients (NIGT); a step of a
trust region in the Euclidean norm in Kovalev 2025, arXiv:2503.12645. The buffer is an average
without bias correction, since only its direction counts. Ours are a norm for each tensor, where the
papers have one vector; eps beside the norm, for where there is no gradient; and decoupled weight
decay, under which no tensor grows longer than 1 / weight_decay.
"""

from ..core.hyper import decay, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import zeros
from ..numerics.elementwise import root


@rule(
    "NormalizedSGD",
    over="tensor",
    slots={"momentum_buffer": zeros},
    lr=learning_rate(1e-2, search=(1e-4, 10.0)),
    momentum=decay(0.9),
    weight_decay=weight_decay(0.0),
    eps=positive(1e-8, search=(1e-12, 1e-2)),
)
def normalizedsgd(p, g, s, t, lr, momentum, weight_decay, eps):
    m = momentum * s["momentum_buffer"] + (1 - momentum) * g
    u = m / (root((m * m).sum()) + eps)
    return (1 - lr * weight_decay) * p - lr * u, {"momentum_buffer": m}
