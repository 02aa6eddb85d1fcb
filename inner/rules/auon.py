"""AuON and Hybrid-AuON: momentum scaled by the root mean square of its cosh. Maity 2025,
arXiv:2509.24320.
"""

import torch

from ..core.hyper import Integer, decay, positive, weight_decay
from ..numerics.elementwise import at_least_float32, root
from ..numerics.newton_schulz import JORDAN, first, polar
from .matrices import as_matrix, averaged, shape_factor, with_adam

_BOTH = {
    "lr": positive(0.02, search=(1e-4, 10.0)),
    "momentum": decay(0.95),
    "weight_decay": weight_decay(0.0),
    "gamma": positive(1.0, search=(0.1, 30.0), finest="tensor"),
}


def braked(x, gamma):
    """A matrix over the root mean square of its cosh."""
    return x / (torch.cosh(gamma * x).square().mean().sqrt() + 1e-8)


def auon_matrix(p, g, s, t, lr, momentum, weight_decay, gamma):
    """AuON: normalised momentum over the root mean square of its cosh. Maity 2025,
    arXiv:2509.24320.

    What it comes to: of a matrix of N entries with norm 1 the divisor's square lies between
    1 + 1/N and 1 + 1.382/N, so that it is 1.0001 for 64 x 64, and AuON is momentum of norm
    sqrt(max(1, m/n)). gamma, a factor inside the cosh that the author's later code has (1.5 there;
    1 is the paper), matters where it is not far below sqrt(N).

    The paper's form, as in the author's Auon_Adam_train.py, with Nesterov's average; in at least
    float32, not bfloat16. His later package divides the momentum itself and not the normalised
    one, which leaves plain SGD with momentum, and drops the factor of the shape; decoupled weight
    decay is from there. What is no matrix is Adam's, with hypers that begin with aux_.
    """
    u, s = averaged(g, s, momentum)
    x = u.to(at_least_float32(u.dtype))
    x = braked(x / (root((x * x).sum()) + 1e-7), gamma).to(p.dtype)
    return (1 - lr * weight_decay) * p - lr * shape_factor(p) * x, s


auon = with_adam("AuON", auon_matrix, **_BOTH)


def hybrid_auon_matrix(p, g, s, t, lr, momentum, weight_decay, gamma, ns_steps):
    """Hybrid-AuON: one step of Muon's iteration, over the root mean square of the cosh of what
    comes out. Maity 2025, arXiv:2509.24320.

    The paper's form: one step (five in the author's later package, which makes it Muon without a
    factor for the shape). What the paper calls the RMS it writes without a root; AuON's own has
    one, and so has this. Here too the divisor is 1 but for some 6/N at most, and what is left is a
    Muon of one step: singular values of x / |x| that are small become 3.4 times as large. gamma,
    weight decay, the dtype and Adam for the rest are as in AuON.
    """
    u, s = averaged(g, s, momentum)
    x = polar(as_matrix(u).to(at_least_float32(u.dtype)), first(JORDAN, ns_steps))
    x = braked(x, gamma).view_as(p).to(p.dtype)
    return (1 - lr * weight_decay) * p - lr * shape_factor(p) * x, s


hybrid_auon = with_adam("HybridAuON", hybrid_auon_matrix, **_BOTH, ns_steps=Integer(1, 1, 10))
