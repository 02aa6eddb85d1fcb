"""FRUGAL: Adam on a random part of each matrix, signSGD on the rest. Zmushko et al. 2024,
arXiv:2411.07837.

As the authors' code (fzmushko/FRUGAL) with its coordinate projectors: every update_gap steps, the
first included, another share `density` of the columns, rows or single entries (randk) is active;
there Adam begins anew, its bias correction too, and the others move by the sign of the gradient.
density=1 is AdamW with restarts, density=0 signSGD. Weights of more than two dimensions are
matrices of shape (first, all others); those of one are AdamW's, without restarts and scales. In the
code density belongs to a choice of entries, here it acts at once where it changes on the way: the
order in which entries become active is what a choice draws.

The choice is a function of the number of the restart, so nothing is kept of it; tensors of one
shape have the same entries active. Slots are as long as the weights, because their shapes cannot
depend on density: what is published as a saving of memory saves none here. Left out: the projection
on singular vectors, whose slope is infinite where two singular values meet; sgd on the rest, which
smooth=True with a large temperature is, of the rate lr / temperature; no step on the rest, which is
inactive_lr_scale=0.
"""

import torch

from .. import noise
from ..hyper import (
    Choice,
    Integer,
    decay,
    fraction,
    learning_rate,
    positive,
    temperature,
    weight_decay,
)
from ..rule import rule, sign, zeros
from .adam import decayed, direction, moments


def active(shape, projector, density, change, seed):
    """The entries with a state after the given number of changes."""
    if projector == "columns":
        shape = (1, *shape[1:])
    elif projector == "rows":
        shape = (shape[0], *(1 for _ in shape[1:]))
    drawn = noise.uniform(change, shape, seed=seed)
    order = drawn.flatten().argsort().argsort().reshape(shape)
    return order < torch.floor(density * order.numel())


@rule(
    "FRUGAL",
    over="tensor",
    slots={"m": zeros, "v": zeros},
    lr=learning_rate(1e-3),
    beta1=decay(0.9),
    beta2=decay(0.999),
    eps=positive(1e-8, search=(1e-12, 1e-2)),
    weight_decay=weight_decay(1e-2),
    proj_params_lr_scale=positive(1.0, search=(0.01, 10.0)),
    inactive_lr_scale=positive(1.0, search=(0.01, 10.0)),
    density=fraction(
        0.25,
        search=(0.0, 1.0),
        finest="tensor",
        rough="it says how many columns, rows or entries are active: a whole number",
    ),
    temperature=temperature(),
    update_gap=Integer(200, 1, 10**6, log=True),
    projector=Choice("columns", ("columns", "rows", "randk")),
    smooth=Choice(False, (False, True)),
    seed=Integer(0, 0, 2**31 - 1),
)
def frugal(
    p,
    g,
    s,
    t,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    proj_params_lr_scale,
    inactive_lr_scale,
    density,
    temperature,
    update_gap,
    projector,
    smooth,
    seed,
):
    p, _ = decayed(p, g, lr, weight_decay, decoupled=True)
    if p.ndim < 2:
        m, v = moments(g, s, beta1, beta2)
        return p - lr * direction(m, v, t, beta1, beta2, eps), {"m": m, "v": v}
    change = torch.floor((t - 1) / update_gap)
    age = t - change * update_gap
    on = active(p.shape, projector, density, change.to(p.device), seed).to(p)
    kept = {name: x * (age > 1) for name, x in s.items()}
    m, v = moments(on * g, kept, beta1, beta2)
    # Where an entry has no state the root has a slope that nothing must meet.
    stateful = on * direction(m, v + (1 - on), age, beta1, beta2, eps)
    rest = (1 - on) * inactive_lr_scale * sign(g, smooth, temperature)
    return p - lr * proj_params_lr_scale * (stateful + rest), {"m": m, "v": v}
