"""Grams and Ano: the sign of one average with the size of another, as their authors."""

import numpy as np
from oracle import Plain, Reference


def sign(x, smooth, temperature):
    return np.tanh(x / temperature) if smooth else np.sign(x)


class Grams(Plain):
    def update(self, p, g, s, t, lr, betas, eps, weight_decay, smooth, temperature):
        b1, b2 = betas
        p = p * (1 - lr * weight_decay)
        s["m"] = b1 * s.get("m", 0.0) + (1 - b1) * g
        s["v"] = b2 * s.get("v", 0.0) + (1 - b2) * g * g
        rate = lr * np.sqrt(1 - b2**t) / (1 - b1**t)
        size = np.abs(s["m"]) / (np.sqrt(s["v"]) + eps)
        return p - rate * sign(g, smooth, temperature) * size


class Ano(Plain):
    def momentum(self, t, betas):
        return betas[0]

    def update(
        self, p, g, s, t, lr, eps, weight_decay, smooth, temperature, betas=None, beta2=None
    ):
        b1 = self.momentum(t, betas)
        b2 = betas[1] if betas else beta2
        s["m"] = b1 * s.get("m", 0.0) + (1 - b1) * g
        v = s.get("v", np.zeros_like(g))
        s["v"] = b2 * v + (1 - b2) * sign(g**2 - v, smooth, temperature**2) * g**2
        p = p * (1 - lr * weight_decay)
        size = np.abs(g) / np.sqrt(s["v"] / (1 - b2**t) + eps)
        return p - lr * size * sign(s["m"], smooth, temperature)


class Anolog(Ano):
    def momentum(self, t, betas):
        return max(0.0, 1 - 1 / np.log(max(2, t)))


# Wide enough for central differences: those of tanh(x / T) are wrong by (1e-5 / T)**2.
POINT = {"temperature": 0.5}
REFERENCE = {
    "grams": Reference(Grams, point=POINT),
    "ano": Reference(Ano, point=POINT, rough=frozenset({"beta1"})),
    "anolog": Reference(Anolog, point=POINT),
}
