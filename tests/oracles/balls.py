"""Normalized SGD and Scion, from the papers' equations and the scales of Scion's authors."""

import numpy as np
from oracle import Plain, Reference


class NormalizedSGD(Plain):
    def update(self, p, g, s, t, lr, momentum, weight_decay, eps):
        s["m"] = momentum * s.get("m", 0 * g) + (1 - momentum) * g
        return p - lr * (weight_decay * p + s["m"] / (np.linalg.norm(s["m"]) + eps))


def quintic(x, eps):
    """Five steps of 3.4445 s - 4.775 s^3 + 2.0315 s^5 on the singular values."""
    u, s, v = np.linalg.svd(x, full_matrices=False)
    s = s / (np.sqrt((s**2).sum()) + eps)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return u @ np.diag(s) @ v


class Scion(Plain):
    def update(self, p, g, s, t, lr, beta, scale, eps, norm, unconstrained):
        s["m"] = beta * s.get("m", 0 * g) + (1 - beta) * g
        u = self.direction(s["m"], norm, eps)
        return p * (1 - (not unconstrained) * lr) - lr * scale * u

    def direction(self, m, norm, eps):
        x = m.reshape(len(m), -1)
        if m.ndim == 1 and norm == "spectral":
            return m / (np.sqrt((m**2).mean()) + eps)
        if norm == "spectral":
            kernel = np.prod(m.shape[2:])
            return quintic(x, eps).reshape(m.shape) * np.sqrt(m.shape[0] / m.shape[1]) / kernel
        if norm == "l1":
            out = np.zeros(m.size)
            k = np.abs(m).argmax()
            out[k] = m.flat[k] / (abs(m.flat[k]) + eps)
            return out.reshape(m.shape)
        out = np.empty_like(x)
        for i, row in enumerate(x):
            for j, entry in enumerate(row):
                size = {
                    "sign": abs(entry) + eps,
                    "col": np.sqrt((x[:, j] ** 2).mean()) + eps,
                    "row": np.linalg.norm(row) * np.sqrt(len(row)) + eps,
                }[norm]
                out[i, j] = entry / size / (len(row) if norm == "sign" else 1)
        return out.reshape(m.shape)


REFERENCE = {
    "normalizedsgd": Reference(NormalizedSGD),
    "scion": Reference(
        Scion,
        tolerance=1e-11,
        why="five quintic steps multiply the rounding of small singular values by 3.4445^5 = 485",
        point={"scale": 1.0},
    ),
}
