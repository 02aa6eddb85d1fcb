"""Shampoo in the paper's form and in Google's, by eigenvectors."""

import numpy as np
from oracle import Plain, Reference


def power(a, exponent):
    values, vectors = np.linalg.eigh(a)
    return vectors * values**exponent @ vectors.T


def unfold(g, i):
    return np.moveaxis(g, i, 0).reshape(g.shape[i], -1)


def along(g, i, matrix):
    return np.moveaxis(np.tensordot(matrix, g, axes=(1, i)), 0, i)


class Shampoo(Plain):
    def update(self, p, g, s, t, lr, weight_decay, matrix_eps):
        g = g + weight_decay * p
        step = g
        for i, n in enumerate(g.shape):
            before = s.get(i, matrix_eps * np.eye(n))
            s[i] = before + unfold(g, i) @ unfold(g, i).T
            step = along(step, i, power(s[i], -1 / (2 * g.ndim)))
        return p - lr * step


class ScalableShampoo(Plain):
    def update(
        self,
        p,
        g,
        s,
        t,
        lr,
        betas,
        weight_decay,
        matrix_eps,
        start_preconditioning_step,
        graft,
        nesterov,
    ):
        beta1, beta2 = betas
        modes = [i for i, n in enumerate(g.shape) if n > 1]
        direction = g
        for i in modes:
            before = s.get(i, matrix_eps * np.eye(g.shape[i]))
            s[i] = beta2 * before + (1 - beta2) * unfold(g, i) @ unfold(g, i).T
            ridge = matrix_eps * np.sqrt((s[i] ** 2).sum()) * np.eye(g.shape[i])
            direction = along(direction, i, power(s[i] + ridge, -1 / (2 * len(modes))))
        u = g / np.linalg.norm(g) if graft.endswith("normalized") else g
        if graft != "sgd":
            before = s.get("d", 0)
            s["d"] = before + u**2 if graft == "adagrad" else beta2 * before + (1 - beta2) * u**2
            u = u / (np.sqrt(s["d"]) + 1e-10)
        direction = direction * np.linalg.norm(u) / np.linalg.norm(direction)
        s["ms"] = beta1 * s.get("ms", 0) + direction
        s["mg"] = beta1 * s.get("mg", 0) + u
        started = t >= start_preconditioning_step
        m, now = (s["ms"], direction) if started else (s["mg"], u)
        return p * (1 - lr * weight_decay) - lr * (now + beta1 * m if nesterov else m)


REFERENCE = {
    "shampoo": Reference(Shampoo, point={"matrix_eps": 0.3}),
    "scalableshampoo": Reference(
        ScalableShampoo,
        point={"matrix_eps": 0.3},
        chosen={"start_preconditioning_step": 4},
    ),
}
