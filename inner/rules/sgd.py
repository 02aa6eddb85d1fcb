"""Stochastic gradient descent with momentum.

Robbins & Monro 1951; Polyak 1964, doi:10.1016/0041-5553(64)90137-5; Nesterov form of Sutskever et
al. 2013, proceedings.mlr.press/v28/sutskever13. The first gradient enters the buffer undamped, and
the learning rate multiplies after the buffer, as in torch.optim.SGD.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.hyper import Choice, Tensors, decay, fraction, learning_rate, weight_decay
from ..core.rule import rule
from ..core.slots import zeros


def nesterov_needs_momentum(values: Mapping[str, object]) -> str | None:
    """torch.optim.SGD's condition on the three of them."""
    momentum, dampening = (torch.as_tensor(values[n]) for n in ("momentum", "dampening"))
    if values["nesterov"] and bool((momentum == 0).any() or (dampening != 0).any()):
        return "nesterov=True needs momentum > 0 and dampening = 0"
    return None


def heavy_ball(
    d: Tensor, s: Tensors, t: Tensor, momentum: Tensor, dampening: Tensor, nesterov: bool
) -> tuple[Tensor, Tensors]:
    """The direction d through a momentum buffer: (direction to take, slots)."""
    # Products, not branches, so that a number on the CPU may meet weights on another device. torch
    # ignores dampening where there is no momentum.
    kept = 1 - dampening * momentum.sign() * (t > 1)
    b = momentum * s["momentum_buffer"] + kept * d
    return d + momentum * b if nesterov else b, {"momentum_buffer": b}


@rule(
    "SGD",
    slots={"momentum_buffer": zeros},
    check=nesterov_needs_momentum,
    lr=learning_rate(1e-3, search=(1e-4, 10.0)),
    momentum=decay(0.0, start=0.5),
    dampening=fraction(0.0, search=(0.0, 0.9), when=("nesterov", False)),
    weight_decay=weight_decay(0.0),
    nesterov=Choice(False, (False, True)),
)
def sgd(p, g, s, t, lr, momentum, dampening, weight_decay, nesterov):
    d, s = heavy_ball(g + weight_decay * p, s, t, momentum, dampening, nesterov)
    return p - lr * d, s
