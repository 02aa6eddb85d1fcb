"""Rules that make matrices orthogonal, by what they do to singular values.

No matrix is multiplied with itself here: a polynomial step is one on numbers between the factors
of a decomposition.
"""

import numpy as np
from oracle import Plain, Reference

JORDAN = [(3.4445, -4.7750, 2.0315)] * 20
QUINTIC = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


def on_singular_values(x, rows):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    for a, b, c in rows:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


def normalised(x):
    return x / (np.sqrt((x**2).sum()) + 1e-7)


class Split(Plain):
    """matrix(u, **given) -> the step, per lr, of u, an average of gradients as a matrix; for what
    is no matrix, Adam.
    """

    nesterov = True

    def matrix(self, u, g, s, **given):
        raise NotImplementedError

    def update(self, p, g, s, t, lr, momentum, weight_decay, **given):
        aux = {n.removeprefix("aux_"): given.pop(n) for n in list(given) if n.startswith("aux_")}
        if p.ndim < 2:
            return self.adam(p, g, s, t, **aux)
        m = s["m"] = momentum * s.get("m", 0 * g) + (1 - momentum) * g
        ahead = given.pop("nesterov", self.nesterov)
        u = (1 - momentum) * g + momentum * m if ahead else m
        flat = (p.shape[0], p.size // p.shape[0])
        step = self.matrix(u.reshape(flat), g.reshape(flat), s, **given)
        return p * (1 - lr * weight_decay) - lr * step.reshape(p.shape)

    def adam(self, p, g, s, t, lr, beta1, beta2, eps, weight_decay):
        s["m"] = beta1 * s.get("m", 0) + (1 - beta1) * g
        s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * g**2
        step = s["m"] / (1 - beta1**t) / (np.sqrt(s["v"] / (1 - beta2**t)) + eps)
        return p * (1 - lr * weight_decay) - lr * step


def scaled(o, scale):
    m, n = o.shape
    factor = {"keller": np.sqrt(max(1, m / n)), "moonlight": 0.2 * np.sqrt(max(m, n))}
    return o * factor.get(scale, np.sqrt(m / n))


class Muon(Split):
    def matrix(self, u, g, s, ns_steps, ns_coefficients, scale):
        rows = {"jordan": JORDAN, "quintic": QUINTIC}[ns_coefficients]
        return scaled(on_singular_values(normalised(u), rows[:ns_steps]), scale)


class TurboMuon(Split):
    def matrix(self, u, g, s, ns_steps, scale):
        x = u.T if u.shape[0] > u.shape[1] else u
        x = x / np.sqrt(np.maximum(np.abs(x @ x.T).sum(1, keepdims=True), 1e-7))
        o = on_singular_values(x, QUINTIC[5 - ns_steps :])
        return scaled(o.T if u.shape[0] > u.shape[1] else o, scale)


def braked(x, gamma):
    return x / (np.sqrt((np.cosh(gamma * x) ** 2).mean()) + 1e-8)


class AuON(Split):
    def matrix(self, u, g, s, gamma):
        return scaled(braked(normalised(u), gamma), "keller")


class HybridAuON(Split):
    def matrix(self, u, g, s, gamma, ns_steps):
        o = on_singular_values(normalised(u), JORDAN[:ns_steps])
        return scaled(braked(o, gamma), "keller")


def sized(u):
    return u * 0.2 * np.sqrt(u.size) / np.sqrt((u**2).sum())


class ASGO(Split):
    nesterov = False

    def matrix(self, u, g, s, beta2, matalg_steps):
        wide = u.shape[0] < u.shape[1]
        now = g @ g.T if wide else g.T @ g
        s["side"] = beta2 * s.get("side", 0) + (1 - beta2) * now
        values, vectors = np.linalg.eigh(s["side"])
        half = (vectors / np.sqrt(values)) @ vectors.T
        return sized(half @ u if wide else u @ half)


class DASGO(Split):
    nesterov = False

    def matrix(self, u, g, s, beta2, eps):
        s["side"] = beta2 * s.get("side", 0) + (1 - beta2) * (g**2).sum(0)
        return sized(u / np.sqrt(s["side"] + eps))


REFERENCE = {
    "muon": Reference(Muon),
    "turbomuon": Reference(TurboMuon),
    "auon": Reference(AuON),
    "hybridauon": Reference(HybridAuON),
    "asgo": Reference(ASGO, tolerance=1e-9, why="an exact root, not ten steps towards it"),
    "dasgo": Reference(DASGO),
}
