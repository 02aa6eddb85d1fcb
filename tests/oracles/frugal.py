"""FRUGAL with coordinate projectors, in the order of the authors' code."""

import numpy as np
import torch
from oracle import Plain, Reference

from hyperdescent.inner.numerics.counter_rng import uniform


class Frugal(Plain):
    def update(self, p, g, s, t, lr, betas, weight_decay, **rest):
        if t == 1:
            s["step"] = 0
        p = p * (1 - lr * weight_decay)
        if p.ndim == 1:
            return p - self.adam(g, s, lr, betas, rest["eps"])
        # Matrices: rows are the first dimension, columns all others.
        p2, g2 = p.reshape(len(p), -1), g.reshape(len(g), -1)
        gap = rest["update_gap"]
        if s["step"] % gap == 0:
            s.update(step=0, m=0.0, v=0.0)
        on = np.zeros_like(g2, dtype=bool)
        on.flat = self.choose(g2.shape, (t - 1) // gap, **rest)
        active_lr = lr * rest["proj_params_lr_scale"]
        update = np.where(on, self.adam(np.where(on, g2, 0), s, active_lr, betas, rest["eps"]), 0)
        signs = np.tanh(g2 / rest["temperature"]) if rest["smooth"] else np.sign(g2)
        update += active_lr * rest["inactive_lr_scale"] * np.where(on, 0, signs)
        return (p2 - update).reshape(p.shape)

    def adam(self, g, s, lr, betas, eps):
        s["step"] += 1
        s["m"] = betas[0] * s.get("m", 0) + (1 - betas[0]) * g
        s["v"] = betas[1] * s.get("v", 0) + (1 - betas[1]) * g * g
        c1, c2 = 1 - betas[0] ** s["step"], 1 - betas[1] ** s["step"]
        return lr / c1 * s["m"] / (np.sqrt(s["v"]) / np.sqrt(c2) + eps)

    def choose(self, shape, change, projector, density, seed, **rest):
        rows, columns = shape
        count = {"columns": columns, "rows": rows, "randk": rows * columns}[projector]
        drawn = uniform(torch.tensor(float(change)), (count,), seed=seed).numpy()
        on = np.zeros(count, dtype=bool)
        on[np.argsort(drawn)[: int(count * density)]] = True
        if projector == "columns":
            return np.tile(on, rows)
        return np.repeat(on, columns) if projector == "rows" else on


REFERENCE = {
    "frugal": Reference(
        Frugal,
        point={"temperature": 0.7},
        # With none or all of a matrix active, some hypers would have no effect.
        chosen={"update_gap": 3, "density": 0.5},
    )
}
