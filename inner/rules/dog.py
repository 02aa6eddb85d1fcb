"""DoG: distance over gradients. Ivgi, Hinder & Carmon 2023, arXiv:2302.12022.

The rate is the largest distance from the start so far over the root of the sum of squared norms of
the gradients. The weights to use are their polynomial-decay average (Shamir & Zhang 2013,
arXiv:1212.1824), without which the paper reports no result: gamma = 0 is the plain mean, a large
gamma the last weights.

As the authors' code (formll/dog): weight decay is added to the gradient before its norm is taken,
and lr, the paper's c, multiplies the rate. Distances and sums are kept in float32 at least, and so
is what rounding takes off the weights: the first steps are a millionth of them, and bfloat16
weights would never leave their start. Memory: the start, the average and that rest.

Neither the distance nor the sum ever shrinks: one burst of huge gradients freezes the weights. The
slope in reps_rel is nearly 0 once the distance has outgrown it.
"""

import torch

from ..core.hyper import learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import Slot, long_zeros, number, weights
from ..numerics.elementwise import at_least_float32, root


def precise(x):
    return x.to(at_least_float32(x.dtype))


def norm(x):
    return root((x * x).sum())


def reach(p, values, layout):
    """The distance before the first step."""
    far = values["reps_rel"] * (1 + norm(precise(p)))
    return far.to(at_least_float32(p.dtype))


def precise_weights(p, values, layout):
    return precise(p).clone()


def average(p, s, values, layout):
    return s["average"].to(p.dtype)


SLOTS = {
    "start": weights,
    "rest": long_zeros,
    "average": Slot(precise_weights),
    "reach": Slot(reach),
    "total": number(),
}


def hypers(finest):
    return {
        "lr": learning_rate(1.0, search=(0.1, 10.0)),
        "reps_rel": positive(1e-6, search=(1e-8, 0.1), finest=finest),
        "weight_decay": weight_decay(0.0),
        "eps": positive(1e-8, search=(1e-12, 1e-2), finest=finest),
        "gamma": positive(8.0, search=(0.1, 100.0), finest=finest),
    }


def distance_over_gradients(p, g, s, t, lr, reps_rel, weight_decay, eps, gamma):
    """The step of one unit, a tensor or the model."""
    x, g = p + s["rest"], precise(g + weight_decay * p)
    far = torch.maximum(s["reach"], norm(x - s["start"]))
    total = s["total"] + (g * g).sum()
    x = x - lr * far / root(total + eps) * g
    p, share = x.to(p.dtype), (1 + gamma) / (t + gamma)
    mean = (1 - share) * s["average"] + share * x
    return p, {"start": s["start"], "rest": x - p, "average": mean, "reach": far, "total": total}


@rule("DoG", over="model", slots=SLOTS, readout=average, **hypers("shared"))
def dog(p, g, s, t, lr, reps_rel, weight_decay, eps, gamma):
    return distance_over_gradients(p, g, s, t, lr, reps_rel, weight_decay, eps, gamma)


@rule("LDoG", over="tensor", slots=SLOTS, readout=average, **hypers("tensor"))
def ldog(p, g, s, t, lr, reps_rel, weight_decay, eps, gamma):
    """DoG with a distance and a sum of each tensor. Ivgi et al. 2023, arXiv:2302.12022, LDoG."""
    return distance_over_gradients(p, g, s, t, lr, reps_rel, weight_decay, eps, gamma)
