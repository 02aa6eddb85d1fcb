"""Adam's relatives: pytorch_optimizer where it agrees with the authors, and else plain loops."""

from functools import partial

import numpy as np
import pytorch_optimizer
from oracle import Plain, Reference


class AdamSSM(Plain):
    """Both transfer functions in series, as they are written."""

    def update(self, p, g, s, t, lr, betas, pole, zero, eps, weight_decay):
        b1, b2 = betas
        g = g + weight_decay * p
        gain = (1 - pole) / (1 - zero)
        for name, signal in (("of_g", g * g), ("of_ones", 1.0)):
            u_before, v_before = s.get(name, (0.0, 0.0))
            u = b2 * u_before + (1 - b2) * signal
            s[name] = u, pole * v_before + gain * (u - zero * u_before)
        s["m"] = b1 * s.get("m", 0.0) + (1 - b1) * g
        vhat = s["of_g"][1] / s["of_ones"][1]
        return p - lr * s["m"] / (1 - b1**t) / (np.sqrt(vhat) + eps)


class OptAMSGrad(Plain):
    def update(self, p, g, s, t, lr, betas, eps, weight_decay, guess):
        b1, b2 = betas
        g = g + weight_decay * p
        theta_before = s.get("theta", np.zeros_like(p))
        theta = b1 * theta_before + (1 - b1) * g
        s["v"] = b2 * s.get("v", 0.0) + (1 - b2) * (g - s.get("guess", 0.0)) ** 2
        s["vmax"] = np.maximum(s.get("vmax", 0.0), s["v"])
        s["guess"] = {"gradient": g, "momentum": theta}[guess]
        h = b1 * theta_before + (1 - b1) * s["guess"]
        den = np.sqrt(s["vmax"]) + eps
        s["half"] = s.get("half", p) - lr * theta / den
        s["theta"] = theta
        return s["half"] - lr * h / den


class AdEMAMix(Plain):
    """beta3's schedule in the closed form of its half-life."""

    def update(self, p, g, s, t, lr, betas, alpha, beta3_warmup, alpha_warmup, eps, weight_decay):
        b1, b2, b3 = betas
        if alpha_warmup:
            alpha = min(t * alpha / alpha_warmup, alpha)
        if t < beta3_warmup:
            a = t / beta3_warmup
            b3 = np.exp(np.log(b1) * np.log(b3) / ((1 - a) * np.log(b3) + a * np.log(b1)))
        s["m1"] = b1 * s.get("m1", 0.0) + (1 - b1) * g
        s["m2"] = b3 * s.get("m2", 0.0) + (1 - b3) * g
        s["v"] = b2 * s.get("v", 0.0) + (1 - b2) * g * g
        den = np.sqrt(s["v"]) / np.sqrt(1 - b2**t) + eps
        return p - lr * ((s["m1"] / (1 - b1**t) + alpha * s["m2"]) / den + weight_decay * p)


class AdaMomentum(Plain):
    def update(self, p, g, s, t, lr, betas, eps, weight_decay, decoupled_weight_decay):
        b1, b2 = betas
        if decoupled_weight_decay:
            p = p * (1 - lr * weight_decay)
        else:
            g = g + weight_decay * p
        s["m"] = b1 * s.get("m", 0.0) + (1 - b1) * g
        s["v"] = b2 * s.get("v", 0.0) + (1 - b2) * s["m"] ** 2 + eps
        return p - lr / (1 - b1**t) * s["m"] / (np.sqrt(s["v"]) / np.sqrt(1 - b2**t))


def renamed(**names):
    """Arguments under the names of pytorch_optimizer."""
    return lambda given: {names.get(n, n): x for n, x in given.items()}


REFERENCE = {
    "adabelief": Reference(
        partial(pytorch_optimizer.AdaBelief, foreach=False),
        translate=renamed(decoupled_weight_decay="weight_decouple"),
    ),
    "adan": Reference(
        partial(pytorch_optimizer.Adan, foreach=False),
        translate=renamed(no_prox="weight_decouple"),
    ),
    "adamssm": Reference(AdamSSM),
    "optamsgrad": Reference(OptAMSGrad),
    "ademamix": Reference(AdEMAMix, point={"beta3_warmup": 20.0, "alpha_warmup": 30.0}),
    "adamomentum": Reference(AdaMomentum),
}
