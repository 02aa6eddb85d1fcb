"""Subset-Norm and Subspace-Momentum, in the order of the authors' code."""

import numpy as np
import torch
from oracle import Plain, Reference

from hyperdescent.inner.numerics.counter_rng import uniform


def hartley(size):
    spectrum = np.fft.fft(np.eye(size))
    return (spectrum.real - spectrum.imag) / np.sqrt(size)


def projector(size, rank, change, seed):
    t = torch.tensor(float(change))
    rows = np.argsort(uniform(t, (size,), seed=seed).numpy())[:rank]
    signs = np.where(uniform(t, (size,), seed=seed, stream=1).numpy() > 0.5, 1.0, -1.0)
    return hartley(size)[rows] @ np.diag(signs)


class Generic(Plain):
    """The authors' GenericOptim: a numerator over a denominator."""

    momentum, subset = "ema", True

    def update(self, p, g, s, t, lr, betas, eps, weight_decay, correct_bias, **rest):
        kind, shape = rest["second_moment"], p.shape
        if p.ndim > 1:
            p, g = p.reshape(len(p), -1), g.reshape(len(g), -1)
        above = self.numerator(g, s, t, betas[0], **rest)
        below = self.denominator(g, s, betas[1], eps, kind)
        size = lr
        if correct_bias:
            size = size / (1 - betas[0] ** t)
            size = size * np.sqrt(1 - betas[1] ** t) if kind == "ema" else size
        p = p - size * above / below
        return (p - lr * weight_decay * p).reshape(shape)

    def numerator(self, g, s, t, beta1, rank=None, update_proj_gap=None, seed=None, **rest):
        if self.momentum == "ema" or g.ndim == 1:
            s["m"] = beta1 * s.get("m", 0) + (1 - beta1) * g
            return s["m"]
        tall = g.shape[0] >= g.shape[1]
        wide = g.T if tall else g
        if t == 1 or t % update_proj_gap == 0:
            s["basis"] = projector(len(wide), rank, t // update_proj_gap, seed)
            s["m"] = 0.0
        low = s["basis"] @ wide
        s["m"] = beta1 * s["m"] + (1 - beta1) * low
        above = s["basis"].T @ s["m"] + wide - s["basis"].T @ low
        return above.T if tall else above

    def denominator(self, g, s, beta2, eps, kind):
        if kind == "none":
            return 1.0
        squares = g * g
        if self.subset and g.ndim > 1:
            squares = squares.sum(1 if g.shape[0] >= g.shape[1] else 0, keepdims=True)
        old = s.get("v", 0)
        s["v"] = old + squares if kind == "sum" else beta2 * old + (1 - beta2) * squares
        return np.sqrt(s["v"]) + eps


class Subspace(Generic):
    momentum, subset = "sm", False


class Both(Generic):
    momentum = "sm"


CHOSEN = {"rank": 1, "update_proj_gap": 3}
REFERENCE = {
    "subsetnorm": Reference(Generic),
    "subspacemomentum": Reference(Subspace, chosen=CHOSEN),
    "snsm": Reference(Both, chosen=CHOSEN),
}
