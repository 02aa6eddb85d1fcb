"""Steps no longer than what is left of the loss asks for."""

import torch

from ..core.hyper import Hyper, learning_rate, positive
from ..core.rule import rule
from ..core.slots import zeros
from ..numerics.elementwise import at_least_float32, root

# Losses that may be negative have bounds that are.
_FLOOR = Hyper(0.0, -torch.inf, torch.inf, "linear", search=(0.0, 1.0), finest="shared")


def truncated(p, g, step, loss, floor):
    """p - step, or so much of it as takes the linear model of the loss down to the floor."""
    fall = (g * step).to(at_least_float32(g.dtype)).sum()
    still = fall == 0
    # Below the floor the model is flat, and a step of 0 its minimiser.
    left = (loss - floor).clamp(min=0)
    share = torch.where(still, 1.0, left / torch.where(still, 1.0, fall)).clamp(max=1)
    return p - share * step


@rule(
    "TruncatedModel",
    over="model",
    needs=("loss",),
    lr=learning_rate(0.1, search=(1e-3, 100.0)),
    floor=_FLOOR,
)
def truncatedmodel(p, g, s, t, loss, lr, floor):
    """SGD on a model of the loss that knows a lower bound. Asi & Duchi 2019, arXiv:1903.08619.

    The minimiser of max(loss + <g, d>, floor) + |d|^2 / (2 lr), which is
    d = -min(lr, (loss - floor) / |g|^2) g. floor: what no sample's loss is below. At floor 0 it is
    Polyak's step, capped at lr, so that lr may be far too large. Where lr is a number per tensor or
    element, |d|^2 / lr is the sum of d^2 / lr.

    The authors' code (HilalAsi/APROX-Robust-Stochastic-Optimization-Algorithms) has floor 0, and
    takes no notice of its momentum and weight decay, which are left out here.
    """
    return truncated(p, g, lr * g, loss, floor), s


@rule(
    "TruncatedAdagrad",
    over="model",
    needs=("loss",),
    slots={"sum": zeros},
    lr=learning_rate(1e-2, search=(1e-3, 100.0)),
    floor=_FLOOR,
    eps=positive(1e-10, search=(1e-12, 1e-2)),
)
def truncatedadagrad(p, g, s, t, loss, lr, floor, eps):
    """Adagrad on a model of the loss that knows a lower bound. Asi & Duchi 2019, arXiv:1903.08619.

    TruncatedModel with |d|^2 in Adagrad's metric, sqrt(sum of g^2) + eps: the step is Adagrad's, or
    that part of it that takes the model to the floor. The authors' code loses its decay of the
    learning rate, and its weight decay moves nothing; they are left out here.
    """
    total = s["sum"] + g * g
    return truncated(p, g, lr * g / (root(total) + eps), loss, floor), {"sum": total}
