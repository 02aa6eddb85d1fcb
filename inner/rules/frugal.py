"""FRUGAL: Adam on a random part of each matrix, signSGD on the rest. Zmushko et al. 2024,
arXiv:2411.07837.

As the authors' code (fzmushko/FRUGAL) with its coordinate projectors: every update_gap steps, the
first included, another share `density` of the columns, rows or single entries (randk), rounded
down, is active; there Adam begins anew, its bias correction too, and the others move by the sign of
the gradient. density=1 is AdamW with restarts, density=0 signSGD. Weights of more than two
dimensions are matrices of shape (first, all others); those of one are AdamW's, without restarts and
scales.

Memory: 2 * density per weight of a matrix, the moments of the active part. The choice is a function
of the number of the restart, so nothing is kept of it; tensors of one shape have the same entries
active. density, projector and seed may not change during a training. Left out: the projection on
singular vectors, whose slope is infinite where two singular values meet; sgd on the rest, which
smooth=True with a large temperature is, of the rate lr / temperature; no step on the rest, which is
inactive_lr_scale=0.
"""

import torch

from ..core.hyper import Choice, Integer, decay, learning_rate, positive, temperature, weight_decay
from ..core.rule import rule
from ..core.slots import Slot
from ..numerics import counter_rng as noise
from ..numerics.elementwise import sign
from .adam import decayed, direction, moments


def lines(shape, projector, density):
    """(the shape of a matrix of whose lines some are active, along which dimension, how many)"""
    # Single entries are the columns of a matrix of one row.
    matrix = (1, shape.numel()) if projector == "randk" else (shape[0], shape[1:].numel())
    dim = 0 if projector == "rows" else 1
    return matrix, dim, int(density * matrix[dim])


def _active_zeros(p, values, layout):
    if p.ndim < 2:
        return torch.zeros_like(p)
    matrix, dim, count = lines(p.shape, values["projector"], values["density"])
    return p.new_zeros((matrix[0], count) if dim else (count, matrix[1]))


def active(size, count, change, seed):
    """The lines with a state after the given number of changes."""
    return noise.uniform(change, (size,), seed=seed).argsort(stable=True)[:count]


@rule(
    "FRUGAL",
    over="tensor",
    slots={"m": Slot(_active_zeros), "v": Slot(_active_zeros)},
    lr=learning_rate(1e-3),
    beta1=decay(0.9),
    beta2=decay(0.999),
    eps=positive(1e-8, search=(1e-12, 1e-2)),
    weight_decay=weight_decay(1e-2),
    proj_params_lr_scale=positive(1.0, search=(0.01, 10.0)),
    inactive_lr_scale=positive(1.0, search=(0.01, 10.0)),
    temperature=temperature(),
    density=Choice(0.25, (0.0, 0.0625, 0.125, 0.25, 0.5, 1.0)),
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
    temperature,
    density,
    update_gap,
    projector,
    smooth,
    seed,
):
    p, _ = decayed(p, g, lr, weight_decay, decoupled=True)
    if p.ndim < 2:
        m, v = moments(g, s, beta1, beta2)
        return p - lr * direction(m, v, t, beta1, beta2, eps), {"m": m, "v": v}
    matrix, dim, count = lines(p.shape, projector, density)
    change = torch.floor((t - 1) / update_gap)
    age = t - change * update_gap
    index = active(matrix[dim], count, change.to(p.device), seed)

    def part(x):
        # A hyperparameter may be one number.
        return x.reshape(matrix).index_select(dim, index) if x.ndim else x

    beta1, beta2, eps = map(part, (beta1, beta2, eps))
    m, v = moments(part(g), {n: x * (age > 1) for n, x in s.items()}, beta1, beta2)
    rest = (inactive_lr_scale * sign(g, smooth, temperature)).reshape(matrix)
    step = rest.index_copy(dim, index, direction(m, v, age, beta1, beta2, eps)).reshape(p.shape)
    return p - lr * proj_params_lr_scale * step, {"m": m, "v": v}
