"""Lion, signSGD, Signum and the cautious rules, from the papers' equations; without surrogates for
their signs and masks the other library's.
"""

from functools import partial

import numpy as np
import pytorch_optimizer
from oracle import Plain, Reference


def sign(x, smooth, temperature):
    return np.tanh(x / temperature) if smooth else np.sign(x)


def mask(x, smooth, temperature):
    return (1 + np.tanh(x / temperature / 2)) / 2 if smooth else np.where(x > 0, 1.0, 0.0)


class Lion(Plain):
    cautious = False

    def update(self, p, g, s, t, lr, betas, weight_decay, smooth, temperature):
        m = s.get("m", 0 * g)
        u = sign(betas[0] * m + (1 - betas[0]) * g, smooth, temperature)
        s["m"] = betas[1] * m + (1 - betas[1]) * g
        if self.cautious:
            phi = mask(u * g, smooth, temperature)
            u = u * phi * g.size / (phi.sum() + 1)
        return p - lr * weight_decay * p - lr * u


class CLion(Lion):
    cautious = True


class SignSGD(Plain):
    def update(self, p, g, s, t, lr, weight_decay, smooth, temperature, momentum=0.0):
        s["m"] = momentum * s.get("m", 0 * g) + (1 - momentum) * g
        return p - lr * (weight_decay * p + sign(s["m"], smooth, temperature))


class CAdamW(Plain):
    def update(self, p, g, s, t, lr, betas, eps, weight_decay, smooth, temperature):
        b1, b2 = betas
        s["m"] = b1 * s.get("m", 0 * g) + (1 - b1) * g
        s["v"] = b2 * s.get("v", 0 * g) + (1 - b2) * g**2
        phi = mask(s["m"] * g, smooth, temperature)
        scale = 1 / max(phi.mean(), 1e-3)
        size = lr * np.sqrt(1 - b2**t) / (1 - b1**t)
        return p * (1 - lr * weight_decay) - size * s["m"] * phi * scale / (np.sqrt(s["v"]) + eps)


def either(library, plain):
    """library where nothing is smooth, and else plain."""

    def make(params, smooth, temperature, **given):
        if smooth:
            return plain(params, smooth=smooth, temperature=temperature, **given)
        return library(params, foreach=False, **given)

    return make


def known(make, *rough):
    return Reference(make, point={"temperature": 1.0}, rough=frozenset(rough))


_Lion = pytorch_optimizer.Lion
_SignSGD = pytorch_optimizer.SignSGD
REFERENCE = {
    "lion": known(either(_Lion, Lion), "beta1", "beta2"),
    "clion": known(either(partial(_Lion, cautious=True), CLion), "beta1", "beta2"),
    "cadamw": known(CAdamW),
    "signsgd": known(either(partial(_SignSGD, momentum=0.0), SignSGD)),
    "signum": known(either(_SignSGD, SignSGD), "momentum"),
}
