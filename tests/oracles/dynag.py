"""DynAG, in the order of the author's code, with the shrinking factor of each tensor its own."""

import numpy as np
from oracle import Plain, Reference
from scipy.stats import norm


class DynAG(Plain):
    def update(self, p, g, s, t, lr, k, weight_decay, momentum, dampening, nesterov, **rest):
        if t == 1:
            s.update(alpha=1.0, saturation=0.0, ratio=np.inf)
        d = self.squash(g, s, **rest)
        d = k * d + weight_decay * p
        if momentum:
            s["buffer"] = d if t == 1 else momentum * s["buffer"] + (1 - dampening) * d
            d = d + momentum * s["buffer"] if nesterov else s["buffer"]
        if rest["shrink"]:
            self.measure(d, s, t, rest["warmup_steps"], rest["shrink_decay"])
        return p - lr * d

    def squash(self, g, s, eps, tau, p_star, shrink_min, shrink_ratio, **rest):
        # The hypers are those of this step, also for what was measured before it.
        lower = shrink_min + (1 - shrink_min) * min(1.0, s["ratio"] / shrink_ratio)
        norm_g, n = np.sqrt((g * g).sum()), g.size
        sigma = norm_g / np.sqrt(n)
        kappa = tau / norm.ppf(1 - p_star / 2)
        alpha = kappa * (norm_g + eps) / (sigma + eps)
        alpha *= (n / (rest["model_size"] or n)) ** (1 / 3)
        alpha *= (p_star / (s["saturation"] + eps)) ** rest["saturation_power"] * lower
        rho = 1 - rest["alpha_decay"]
        s["alpha"] = np.clip((1 - rho) * s["alpha"] + rho * alpha, 1e-12, 1e12)
        normal = g / (norm_g + eps)
        s["saturation"] = np.mean(np.abs(s["alpha"] * normal) > tau)
        return lower * np.tanh(s["alpha"] / lower * normal)

    def measure(self, d, s, t, warmup_steps, kept):
        now = np.sqrt(np.mean(d * d))
        s["now"] = now if t == 1 else kept * s["now"] + (1 - kept) * now
        if t <= warmup_steps:
            s["start"] = s["now"] if t == 1 else kept * s["start"] + (1 - kept) * s["now"]
        else:
            s["ratio"] = s["now"] / s["start"]


REFERENCE = {
    "dynag": Reference(
        DynAG,
        point={"shrink_ratio": 3.0, "shrink_decay": 0.8, "tau": 1.1},
        chosen={"warmup_steps": 3, "model_size": 50},
        rough=frozenset({"tau"}),
    )
}
