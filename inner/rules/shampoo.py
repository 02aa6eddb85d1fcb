"""Shampoo: one matrix of second moments for every dimension of a tensor.

Two forms: the paper's, whose statistics are sums, and Google's, whose statistics are averages and
whose step has the length of a diagonal method's. Both invert roots by a Newton iteration, at every
step: nothing is decomposed, and nothing is stale.
"""

import torch

from ..core.hyper import Choice, Integer, decay, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import Slot, zeros
from ..numerics.elementwise import at_least_float32, root
from ..numerics.matrix_roots import newton_inverse_root

# A dimension longer than that has no matrix: its statistics would outgrow the weights.
LONGEST = 4096


def _parted(x, shape):
    """The statistics of each dimension out of one vector: a matrix, or its diagonal."""
    sizes = [n if n > LONGEST else n * n for n in shape]
    pieces = zip(x.split(sizes), shape, strict=True)
    return [piece if n > LONGEST else piece.view(n, n) for piece, n in pieces]


def _joined(statistics):
    return torch.cat([x.reshape(-1) for x in statistics])


def _identities(p, values, shape):
    """matrix_eps times the identity for each dimension."""
    like = {"dtype": at_least_float32(p.dtype), "device": p.device}
    eyes = [torch.ones(n, **like) if n > LONGEST else torch.eye(n, **like) for n in shape]
    return _joined(eyes) * values["matrix_eps"] if shape else torch.zeros(0, **like)


def _of_all(p, values, layout):
    return _identities(p, values, p.shape)


def _of_modes(p, values, layout):
    return _identities(p, values, _modes(p.shape))


def _modes(shape):
    """The dimensions that Google's form has statistics of: none of a tensor with a long one."""
    return [n for n in shape if n > 1] if max(shape, default=0) <= LONGEST else []


def squares(g, i, x):
    """The product of g with itself over all dimensions but i, or the diagonal of it."""
    unfolded = g.movedim(i, 0).reshape(g.shape[i], -1)
    return unfolded @ unfolded.mT if x.ndim == 2 else (unfolded * unfolded).sum(1)


def _conditioned(g, statistics, ridge, steps):
    """g with the statistics of each dimension to the power -1 / (2 order) applied along it."""
    p = 2 * len(statistics)
    for x in statistics:
        # The first dimension goes last each time, so that all are as they were in the end.
        if x.ndim == 2:
            g = torch.tensordot(
                g, newton_inverse_root(x, p, ridge=ridge, steps=steps), dims=([0], [0])
            )
        else:
            g = g.movedim(0, -1) * x ** (-1 / p)
    return g


@rule(
    "Shampoo",
    over="tensor",
    slots={"statistics": Slot(_of_all)},
    lr=learning_rate(0.1, search=(1e-4, 10.0)),
    weight_decay=weight_decay(0.0),
    matrix_eps=positive(1e-6, search=(1e-8, 1.0), finest="tensor"),
)
def shampoo(p, g, s, t, lr, weight_decay, matrix_eps):
    """Shampoo. Gupta, Koren & Singer 2018, arXiv:1802.09568, Algorithms 1 and 2.

    Sums of squares from matrix_eps times the identity, to the power -1 / (2 order), for tensors of
    any order: a vector has the full matrix of Adagrad. A dimension above 4096 keeps the diagonal of
    its matrix, the paper's diagonal form. pytorch_optimizer is the same without momentum (its
    momentum mixes a gradient with the last preconditioned step); weight decay is added to the
    gradient, as there. Its lr of 1e-3 moves little, as steps shrink like Adagrad's from the length
    of an orthogonal matrix; 0.1 is torch_optimizer's. Memory: m^2 + n^2 for m x n weights.
    """
    d = (g + weight_decay * p).to(s["statistics"].dtype)
    statistics = _parted(s["statistics"], p.shape)
    statistics = [x + squares(d, i, x) for i, x in enumerate(statistics)]
    step = _conditioned(d, statistics, 0.0, 40)
    return p - lr * step.to(p.dtype), {"statistics": _joined(statistics)}


def _unit(x):
    """x at length 1, or 0."""
    norm = root((x * x).sum())
    return x / torch.where(norm == 0, 1.0, norm)


@rule(
    "ScalableShampoo",
    over="tensor",
    slots={
        "statistics": Slot(_of_modes),
        "diagonal": zeros,
        "momentum": zeros,
        "graft_momentum": zeros,
    },
    lr=learning_rate(1e-3),
    beta1=decay(0.9),
    beta2=decay(0.999, finest="tensor"),
    weight_decay=weight_decay(0.0),
    matrix_eps=positive(1e-6, search=(1e-8, 1.0), finest="tensor"),
    start_preconditioning_step=Integer(5, 1, 10**6, log=True),
    graft=Choice("sgd", ("sgd", "adagrad", "rmsprop", "rmsprop_normalized")),
    nesterov=Choice(True, (True, False)),
)
def scalableshampoo(
    p,
    g,
    s,
    t,
    lr,
    beta1,
    beta2,
    weight_decay,
    matrix_eps,
    start_preconditioning_step,
    graft,
    nesterov,
):
    """Scalable Shampoo. Anil et al. 2020, arXiv:2002.09018; grafting Agarwal et al. 2020,
    arXiv:2002.11803; its defaults from google-research's scalable_shampoo/optax.

    The direction of Shampoo with averaged statistics, at the length that the step of the graft has
    on the same tensor; before start_preconditioning_step, the graft. matrix_eps is what statistics
    start at and, times their norm, the ridge under the root; that norm is Frobenius' and not the
    spectral one, which has no derivative where eigenvalues meet. Not in this form: blocks and
    merged dimensions (each dimension longer than 1 has its statistics, to the power -1 / (2 their
    number); a tensor with one above 4096 follows the graft), and stale roots with their test of
    failure. beta2 < 1, so no sums. Momentum is a sum; Google's moving_average_for_momentum is lr *
    (1 - beta1) in place of lr, and weight_decay / (1 - beta1).

    Weight decay is decoupled, by lr * weight_decay. Google's code adds lr * weight_decay * p to a
    direction that it then multiplies by lr: a decay of lr^2 * weight_decay.
    """
    # A copy, because the last bit of a product depends on where in memory its factors lie.
    d, modes = g.to(s["statistics"].dtype).clone(), _modes(p.shape)
    folded = d.reshape(modes or p.shape)
    statistics = _parted(s["statistics"], modes) if modes else []
    statistics = [beta2 * x + (1 - beta2) * squares(folded, i, x) for i, x in enumerate(statistics)]
    square, u = s["diagonal"], g
    if graft != "sgd":
        u = _unit(g) if graft == "rmsprop_normalized" else g
        kept, fresh = (1.0, 1.0) if graft == "adagrad" else (beta2, 1 - beta2)
        square = kept * square + fresh * u * u
        u = u / (root(square) + 1e-10)
    direction = u
    if modes:
        direction = _unit(_conditioned(folded, statistics, matrix_eps, 30)).reshape(p.shape)
        direction = (direction * root((u * u).sum())).to(p.dtype)
    m = beta1 * s["momentum"] + direction
    m_graft = beta1 * s["graft_momentum"] + u
    # Factors, not a branch: t may be a number on another device than the weights.
    on = t >= start_preconditioning_step
    step = on * m + ~on * m_graft
    if nesterov:
        step = on * direction + ~on * u + beta1 * step
    p = (1 - lr * weight_decay) * p - lr * step
    made = {"diagonal": square, "momentum": m, "graft_momentum": m_graft}
    return p, {"statistics": _joined(statistics) if modes else s["statistics"], **made}
