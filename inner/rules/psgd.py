"""PSGD: gradients preconditioned by P = Q'Q, with Q moved along a Lie group so that P whitens them.

Li 2018, arXiv:1512.04202; Li 2019, arXiv:1809.10232; Pooladzandi & Li 2024, arXiv:2402.04553; as
lixilinx/psgd_torch (psgd.py), and for XMat its older preconditioned_stochastic_gradient_descent.py.

All three forms minimise E[h'P h + v'P^-1 v] over P, for v ~ N(0, I) and h = g + damping, whose
solution is P = E[hh']^(-1/2); products with the Hessian, the other choice of h, are not here. Where
the older and the newer code differ, this is the newer: h is damped by (damping + machine epsilon *
|g|) v and not by the mean of |g|, Q starts at (mean g^4 + damping^4)^(-1/8), it moves before it is
used, momentum is beta = min((t - 1) / t, momentum), and P times it is clipped to a root mean
square, then entry by entry. P is fitted to g and applied to its average; the newer code averages P
g instead. Fitted to the average, steps would be longer by sqrt((1 + momentum) / (1 - momentum)).
Weight decay, which the code has not, is decoupled. v is drawn from the step and the seed, and Q
moves at every step.
"""

import torch

from ..core.hyper import Integer, decay, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import Slot, long_zeros, number, zeros
from ..numerics import counter_rng as noise
from ..numerics.elementwise import at_least_float32, root
from .shampoo import LONGEST, squares


def _pair(g, t, damping, seed):
    """The probe v and the damped gradient h, both flat or both of g's shape."""
    v = noise.normal(t, g.shape, seed=seed).to(g)
    return v, g + (damping + torch.finfo(g.dtype).eps * g.abs()) * v


def _start(g, damping):
    """The scale of Q at the first step."""
    return ((g**4).mean() + damping**4) ** (-1 / 8)


def _smoothness(before, now, beta_smoothness):
    """A bound on the curvature of the criterion that rises at once and falls slowly."""
    kept = beta_smoothness * before + (1 - beta_smoothness) * now
    return torch.maximum(kept, now).to(before.dtype)


def _norm(x):
    return root((x * x).sum())


def _average(g, s, t, momentum):
    """The gradient's average, which starts as the mean of all."""
    beta = torch.minimum((t - 1) / t, momentum)
    return beta * s["momentum_buffer"] + (1 - beta) * g


def _stepped(p, step, lr, weight_decay, clip_rms, clip_entry):
    """The weights after a clipped step."""
    rms = root((step * step).mean())
    step = step * (clip_rms / torch.where(rms == 0, 1.0, rms)).clamp(max=1)
    step = torch.maximum(torch.minimum(step, clip_entry), -clip_entry)
    return (1 - lr * weight_decay) * p - lr * step.to(p.dtype)


def _declared(finest):
    """The hypers of all three."""
    return {
        "lr": learning_rate(1e-3),
        "lr_preconditioner": positive(0.1, search=(1e-3, 1.0), finest=finest),
        "damping": positive(1e-9, search=(1e-12, 1e-2), finest=finest),
        "momentum": decay(0.0, start=0.5),
        "clip_rms": positive(2.0, search=(0.1, 10.0), finest=finest),
        "clip_entry": positive(10.0, search=(0.5, 100.0), finest=finest),
        "weight_decay": weight_decay(0.0),
        "seed": Integer(0, 0, 2**31 - 1),
    }


def _flip(x):
    """The order of all entries reversed."""
    return x.flip(tuple(range(x.ndim)))


@rule(
    "PSGDXMat",
    over="model",
    slots={"a": long_zeros, "b": long_zeros, "momentum_buffer": zeros},
    **_declared("shared"),
)
def psgdxmat(
    p, g, s, t, lr, lr_preconditioner, damping, momentum, clip_rms, clip_entry, weight_decay, seed
):
    """PSGD with Q on the two diagonals of a matrix. Pooladzandi & Li 2024, arXiv:2402.04553.

    Q = diag(a) + adiag(b) over the whole model as one vector, so each weight is whitened together
    with the one as far from the end as it is from the start. Only the older code has it, for
    Newton's method; this is its fit, with the gradient for the Hessian's product and what is said
    of all forms: whitening, damping, start, clips and defaults of the newer code. Memory: 2, and
    1 of momentum.
    """
    m, g = _average(g, s, t, momentum), g.to(s["a"].dtype)
    v, h = _pair(g, t, damping, seed)
    first = (s["a"] == 0).all()
    a, b = torch.where(first, _start(g, damping), s["a"]), s["b"]
    qh = a * h + b * _flip(h)
    w = (_flip(a) * v - _flip(b) * _flip(v)) / (a * _flip(a) - b * _flip(b))
    on, across = qh * qh - w * w, qh * _flip(qh) - w * _flip(w)
    # The middle of an odd number of weights is on both diagonals.
    index = torch.arange(p.numel(), device=p.device).view_as(p)
    across = across * (index != _flip(index))
    step = lr_preconditioner / ((qh * qh + w * w).amax() + torch.finfo(g.dtype).tiny)
    a, b = a - step * (on * a + across * _flip(b)), b - step * (on * b + across * _flip(a))
    x, ab = m.to(g.dtype), a * b
    x = (a * a + _flip(b * b)) * x + (ab + _flip(ab)) * _flip(x)
    p = _stepped(p, x, lr, weight_decay, clip_rms, clip_entry)
    return p, {"a": a, "b": b, "momentum_buffer": m}


def _columns(p, values, stream):
    """Noise of norm sqrt(0.1), a column for each rank."""
    first = torch.ones((), dtype=torch.float64, device=p.device)
    size = p.numel(), values["rank"]
    x = noise.normal(first, size, seed=values["seed"], stream=stream).to(at_least_float32(p.dtype))
    return x * (0.1**0.5 / _norm(x))


def _columns_of_u(p, values, layout):
    return _columns(p, values, 1)


def _columns_of_v(p, values, layout):
    return _columns(p, values, 2)


def _identity(x):
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def _off(u, v, x):
    """(I + UV') x"""
    return x + u @ (v.mT @ x)


def _balanced(u, v):
    """U and V with the same UV' whose norms are equal, and U'U and V'V nearer to each other."""
    ratio = root(_norm(u) / _norm(v))
    u, v = u / ratio, v * ratio
    apart = 0.1 * (u.mT @ u - v.mT @ v) / ((u * u).sum() + (v * v).sum())
    # The inverse and then a product: as many right sides as there are weights are slow to solve.
    return u - u @ apart, v @ torch.linalg.inv(_identity(v) - apart).mT


@rule(
    "PSGDLRA",
    over="model",
    slots={
        "u": Slot(_columns_of_u),
        "v": Slot(_columns_of_v),
        "d": long_zeros,
        "smoothness_u": number(),
        "smoothness_v": number(),
        "smoothness_d": number(),
        "momentum_buffer": zeros,
    },
    beta_smoothness=decay(0.9, finest="shared"),
    rank=Integer(10, 1, 256, log=True),
    **_declared("shared"),
)
def psgdlra(
    p,
    g,
    s,
    t,
    lr,
    lr_preconditioner,
    beta_smoothness,
    damping,
    momentum,
    clip_rms,
    clip_entry,
    weight_decay,
    rank,
    seed,
):
    """PSGD with Q of low rank off its diagonal. Pooladzandi & Li 2024, arXiv:2402.04553.

    Q = (I + UV') diag(d) over the whole model as one vector, of a rank. d moves at every step, and
    U or V, as the toss of a coin says. As the newer code: U and V start as noise of norm sqrt(0.1),
    and steps are divided by running bounds of smoothness. There, U'U and V'V are brought together
    by a series that keeps UV' nearly; by a solve of that rank, it is kept. Memory: 2 rank + 1, and
    1 of momentum.
    """
    m, flat = _average(g, s, t, momentum), g.reshape(-1).to(s["d"].dtype)
    v, h = _pair(flat, t, damping, seed)
    first = (s["d"] == 0).all()
    d = torch.where(first, _start(flat, damping), s["d"].reshape(-1))
    U, V = _balanced(s["u"], s["v"])

    core = _identity(V) + V.mT @ U
    a = _off(U, V, d * h)
    ph = d * _off(V, U, a)
    b = v / d - V @ torch.linalg.solve(core.mT, U.mT @ (v / d))
    pv = (b - U @ torch.linalg.solve(core, V.mT @ b)) / d

    of_d, of_u, of_v = (s[f"smoothness_{name}"] for name in "duv")
    seen = (ph * h).abs().amax() + (v * pv).abs().amax()
    of_d = _smoothness(of_d, seen, beta_smoothness)
    moved_d = d - lr_preconditioner / of_d * d * (ph * h - v * pv)
    av, bv, au, bu = V.mT @ a, V.mT @ b, U.mT @ a, U.mT @ b
    seen = _norm(a) * _norm(V @ av) + _norm(b) * _norm(V @ bv)
    moved_of_u = _smoothness(of_u, seen, beta_smoothness)
    seen = _norm(a) * _norm(U @ au) + _norm(b) * _norm(U @ bu)
    moved_of_v = _smoothness(of_v, seen, beta_smoothness)
    slope_u = (torch.outer(a, av) - torch.outer(b, bv)) @ core
    slope_v = torch.outer(a + V @ au, au) - torch.outer(b + V @ bu, bu)
    heads = noise.uniform(t, (), seed=seed, stream=3).to(p.device) < 0.5
    made = {
        "u": torch.where(heads, U - lr_preconditioner / moved_of_u * slope_u, U),
        "v": torch.where(heads, V, V - lr_preconditioner / moved_of_v * slope_v),
        "smoothness_u": torch.where(heads, moved_of_u, of_u),
        "smoothness_v": torch.where(heads, of_v, moved_of_v),
        "smoothness_d": of_d,
    }
    x = _off(made["u"], made["v"], moved_d * m.reshape(-1).to(d.dtype))
    x = (moved_d * _off(made["v"], made["u"], x)).view_as(p)
    p = _stepped(p, x, lr, weight_decay, clip_rms, clip_entry)
    return p, {**made, "d": moved_d.view_as(s["d"]), "momentum_buffer": m}


def _sizes(shape):
    """The dimensions longer than 1, and the number of entries that the factor of each has: those of
    a matrix, or of its diagonal.
    """
    modes = [n for n in shape if n > 1] or [1]
    return modes, [n if n > LONGEST or len(modes) == 1 else n * n for n in modes]


def _factors(p, values, layout):
    return p.new_zeros(sum(_sizes(p.shape)[1]), dtype=at_least_float32(p.dtype))


def _bounds(p, values, layout):
    return p.new_zeros(len(_sizes(p.shape)[0]), dtype=at_least_float32(p.dtype))


def _along(x, q):
    """q times the first dimension of x, which goes last."""
    if q.ndim == 1:
        return x.movedim(0, -1) * q
    return torch.tensordot(x, q, dims=([0], [1]))


def _turned(q):
    return q if q.ndim == 1 else q.mT


def _solved(x, q):
    """The inverse of q' times the first dimension of x, which goes last."""
    if q.ndim == 1:
        return x.movedim(0, -1) / q
    flat = torch.linalg.solve_triangular(_turned(q), x.reshape(x.shape[0], -1), upper=False)
    return flat.reshape(x.shape).movedim(0, -1)


def _largest(x):
    """A lower bound of the largest eigenvalue of a matrix, near it, or that of a diagonal."""
    if x.ndim == 1:
        return x.amax()
    row = x.index_select(0, (x * x).sum(1).argmax().reshape(1))[0]
    ahead = x @ row
    return _norm(x @ ahead) / _norm(ahead)


@rule(
    "PSGDKron",
    over="tensor",
    slots={"q": Slot(_factors), "smoothness": Slot(_bounds), "momentum_buffer": zeros},
    beta_smoothness=decay(0.9, finest="tensor"),
    **_declared("tensor"),
)
def psgdkron(
    p,
    g,
    s,
    t,
    lr,
    lr_preconditioner,
    beta_smoothness,
    damping,
    momentum,
    clip_rms,
    clip_entry,
    weight_decay,
    seed,
):
    """PSGD with Q a Kronecker product, for each tensor. Li 2018, arXiv:1512.04202; Pooladzandi & Li
    2024, arXiv:2402.04553.

    A triangular factor for each dimension longer than 1, Q <- Q - step triu(A - B) Q ("EQ" of the
    code, whose default is now the one without triangles), or a diagonal: for vectors, and for
    dimensions above 4096. A and B are squares of Qh and of Q'^-1 v, unfolded; steps are divided by
    a running bound of |A + B|. The code's balancing of factors is left out: these steps do not
    depend on their scales. All tensors draw the same noise. Memory: m^2 + n^2 for m x n weights.
    """
    modes, sizes = _sizes(p.shape)
    # Copies, because the last bit of a product depends on where in memory its factors lie.
    m, g = _average(g, s, t, momentum), g.to(s["q"].dtype).clone().reshape(modes)
    v, h = _pair(g, t, damping, seed)
    first = (s["q"] == 0).all()
    scale = _start(g, damping) ** (1 / len(modes))
    a, b, factors = h, v, []
    for n, piece in zip(modes, s["q"].split(sizes), strict=True):
        q = piece.clone() if piece.shape[0] == n else piece.clone().view(n, n)
        one = torch.ones_like(q) if q.ndim == 1 else _identity(q)
        factors.append(torch.where(first, scale * one, q))
        a, b = _along(a, factors[-1]), _solved(b, factors[-1])
    x, bounds = m.to(g.dtype).reshape(modes), []
    for i, (q, bound) in enumerate(zip(factors, s["smoothness"].unbind(), strict=True)):
        on, off = squares(a, i, q), squares(b, i, q)
        bounds.append(_smoothness(bound, _largest(on + off), beta_smoothness))
        slope = (on - off) * q if q.ndim == 1 else torch.triu(on - off) @ q
        factors[i] = q - lr_preconditioner / bounds[i] * slope
        x = _along(_along(x, factors[i]).movedim(-1, 0), _turned(factors[i]))
    p = _stepped(p, x.reshape(p.shape), lr, weight_decay, clip_rms, clip_entry)
    q = torch.cat([x.reshape(-1) for x in factors])
    return p, {"q": q, "smoothness": torch.stack(bounds), "momentum_buffer": m}
