"""Stochastic Nesterov acceleration where noise vanishes at the optimum.

Vaswani, Bach & Schmidt 2019, arXiv:1810.07288, for losses of smoothness L and strong convexity mu
and gradients with E|g|² <= rho |grad|². Numbers that can be learned without knowing L and mu stand
for these: the step lr = 1 / (rho L), rho itself, and momentum = (1 - x) / (1 + x), where x is
sqrt(mu lr / rho). Back: L = 1 / (rho lr) and mu = rho x² / lr, x = (1 - momentum) / (1 + momentum).
At rho = 1 this is torch.optim.SGD(nesterov=True); a larger rho lets the slow sequence v trust each
gradient less. convex=True is the form for mu = 0, whose momentum grows with the steps.

Gradients are taken at the extrapolated weights, which are p; the weights to use are those before
extrapolation. It is made at the end of a step, with the numbers in force there. Where noise does
not vanish at the optimum, acceleration amplifies it.
"""

from ..core.hyper import Choice, decay, learning_rate, positive
from ..core.rule import rule
from ..core.slots import shared, weights, zeros
from ..numerics.elementwise import root


def before_extrapolation(p, s, values, layout):
    return s["w"]


@rule(
    "StochasticNesterov",
    slots={"w": weights, "v": weights, "gain": shared(0.0)},
    readout=before_extrapolation,
    lr=learning_rate(1e-3, search=(1e-4, 10.0)),
    momentum=decay(0.9, when=("convex", False)),
    rho=positive(1.0, search=(1.0, 1e3)),
    convex=Choice(False, (False, True)),
)
def stochasticnesterov(p, g, s, t, lr, momentum, rho, convex):
    w = p - lr * g
    if convex:
        gain = larger_gain(s["gain"], rho)
        v = s["v"] - gain * lr * g
        ahead = 1 / (rho * larger_gain(gain, rho))
    else:
        x, gain = (1 - momentum) / (1 + momentum), s["gain"]
        v = (1 - x) * s["v"] + x * p - lr / (rho * x) * g
        ahead = x / (1 + x)
    return ahead * v + (1 - ahead) * w, {"w": w, "v": v, "gain": gain}


def larger_gain(gain, rho):
    """The next of the sequence that grows as half the number of steps over rho."""
    return (1 / rho + root(1 / rho**2 + 4 * gain**2)) / 2


@rule(
    "AGNES",
    slots={"w": weights, "v": zeros},
    readout=before_extrapolation,
    lr=learning_rate(1e-2, search=(1e-4, 10.0)),
    alpha=positive(1e-3, search=(1e-5, 10.0)),
    momentum=decay(0.99),
)
def agnes(p, g, s, t, lr, alpha, momentum):
    """Nesterov acceleration for noise of the size of the gradient. Gupta, Siegel & Wojtowytsch
    2024, arXiv:2302.05515.

    alpha, the step along the velocity, falls below lr as noise grows; alpha = lr is
    torch.optim.SGD(nesterov=True). Gradients are taken at the extrapolated weights, which are p;
    the weights to use are those before extrapolation. momentum is the paper's rho.
    """
    w, v = p - lr * g, momentum * (s["v"] - g)
    return w + alpha * v, {"w": w, "v": v}
