"""Scion: steps to the far side of a norm's ball. Pethick et al. 2025, arXiv:2502.07529.

An average m of gradients, and a step to what minimises <m, u> over the unit ball of a norm for
layers: of tensors as matrices of d_out rows, a kernel (out, in, k, k) as (out, in k k), a vector as
one column. norm, with the scales of the authors' code (LIONS-EPFL/scion, scion.py):

    spectral  U V' sqrt(out / in) / (k k), and of vectors their root mean square: their "Auto"
    sign      the sign of every element / d_in
    col       every column over its root mean square
    row       every row over its length and sqrt(d_in)
    l1        the sign of the largest element alone: steepest coordinate descent

Of a vector spectral is col, which needs no iteration. l1, which they do not have, is without a
scale; elements that tie share its step. In the rest:

- Constrained, p <- (1 - lr) p - lr scale u stays in the ball of radius scale once there, for lr at
  most 1. With unconstrained=True, p <- p - lr scale u.
- beta is what the average keeps; the authors' momentum is the share of the new gradient, 1 - beta,
  and their default of 1 is our 0.
- eps is beside every norm that is divided by, so in the sign, too: x / (|x| + eps). Where it is far
  below the gradients, the slope of sign and l1 in beta says nothing of its effect.
- The quintic iteration is theirs, 5 steps that leave singular values in about [0.7, 1.2], but in at
  least float32, where they have bfloat16.
"""

from ..core.hyper import Choice, decay, learning_rate, positive
from ..core.rule import rule
from ..core.slots import zeros
from ..numerics.elementwise import at_least_float32, root
from ..numerics.newton_schulz import JORDAN, first, polar


def _steepest(m, norm, eps):
    """Minus the minimiser of <m, u> over the unit ball of a norm."""
    x = m.to(at_least_float32(m.dtype)).reshape(m.shape[0], -1)
    d_out, d_in = x.shape
    if norm == "spectral" and m.ndim > 1:
        kernel = m.shape[2:].numel()
        u = polar(x, first(JORDAN, 5), eps=eps) * ((d_out * kernel / d_in) ** 0.5 / kernel)
    elif norm == "sign":
        u = x / (x.abs() + eps) / d_in
    elif norm in ("col", "spectral"):
        u = x / (root((x * x).mean(0, keepdim=True)) + eps)
    elif norm == "row":
        u = x / (root((x * x).sum(1, keepdim=True)) * d_in**0.5 + eps)
    else:
        largest = (x.abs() == x.abs().amax()).to(x)
        u = x / (x.abs() + eps) * largest / largest.sum()
    return u.reshape(m.shape).to(m.dtype)


@rule(
    "Scion",
    over="tensor",
    slots={"momentum_buffer": zeros},
    lr=learning_rate(1e-3),
    beta=decay(0.0, start=0.9),
    scale=positive(1.0, search=(1e-2, 1e4), finest="tensor"),
    eps=positive(1e-8, search=(1e-12, 1e-2), finest="tensor"),
    norm=Choice("spectral", ("spectral", "sign", "col", "row", "l1")),
    unconstrained=Choice(False, (False, True)),
)
def scion(p, g, s, t, lr, beta, scale, eps, norm, unconstrained):
    m = beta * s["momentum_buffer"] + (1 - beta) * g
    step = lr * scale * _steepest(m, norm, eps)
    return (p if unconstrained else (1 - lr) * p) - step, {"momentum_buffer": m}
