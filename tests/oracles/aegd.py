"""AEGD and AEGDM by their equations."""

import numpy as np
from oracle import Plain, Reference


class AEGD(Plain):
    def update(self, p, g, s, t, loss, lr, c, weight_decay, decoupled_weight_decay):
        v = g / (2 * np.sqrt(loss + c))
        if t == 1:
            s["r"] = np.full_like(p, np.sqrt(loss + c))
        if decoupled_weight_decay:
            p = p * (1 - lr * weight_decay)
        else:
            v = v + weight_decay * p
        s["r"] = s["r"] / (1 + 2 * lr * v**2)
        return p - 2 * lr * s["r"] * v


class AEGDM(Plain):
    def update(self, p, g, s, t, loss, lr, momentum, c, weight_decay):
        v = g / (2 * np.sqrt(loss + c))
        if t == 1:
            s["r"], s["m"] = np.full_like(p, np.sqrt(loss + c)), np.zeros_like(p)
        s["r"] = s["r"] / (1 + 2 * lr * v**2)
        s["m"] = momentum * s["m"] + v + weight_decay * p
        return p - 2 * lr * s["r"] * s["m"]


REFERENCE = {"aegd": Reference(AEGD), "aegdm": Reference(AEGDM)}
