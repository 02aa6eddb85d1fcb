"""Accelerated methods in their papers' constants and sequences."""

import numpy as np
from oracle import Plain, Reference


class StochasticNesterov(Plain):
    """Vaswani et al. 2019, from the constants L, mu and rho of the problem."""

    def update(self, z, g, s, t, lr, momentum, rho, convex):
        if t == 1:
            s["v"], s["gain"] = z, 0.0
        if convex:
            s["gain"] = self.gain(s["gain"], rho)
            s["v"] = s["v"] - s["gain"] * lr * g
            after = self.gain(s["gain"], rho)
            a = after / (after + rho * s["gain"] ** 2)
        else:
            x = (1 - momentum) / (1 + momentum)
            smooth, mu = 1 / (rho * lr), rho * x**2 / lr
            eta = 1 / (rho * smooth)
            root = np.sqrt(mu * eta / rho)
            a, b = root / (1 + root), 1 - root
            s["v"] = b * s["v"] + (1 - b) * z - np.sqrt(eta / (mu * rho)) * g
        return a * s["v"] + (1 - a) * (z - lr * g)

    def gain(self, before, rho):
        return (1 / rho + np.sqrt(1 / rho**2 + 4 * before**2)) / 2


class AGNES(Plain):
    def update(self, ahead, g, s, t, lr, alpha, momentum):
        v = s.get("v", np.zeros_like(g))
        x = ahead - lr * g
        s["v"] = momentum * (v - g)
        return x + alpha * s["v"]


REFERENCE = {
    "stochasticnesterov": Reference(StochasticNesterov, point={"rho": 2.0}),
    "agnes": Reference(AGNES, point={"alpha": 0.05}),
}
