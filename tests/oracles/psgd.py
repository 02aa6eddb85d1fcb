"""PSGD with dense matrices: what the forms do without any, as equations of Q and of its inverse."""

import numpy as np
import torch
from oracle import Plain, Reference

from hyperdescent.inner.numerics import counter_rng as noise

EPS = np.finfo(np.float64).eps


def normal(t, shape, seed, stream=0):
    t = torch.tensor(t, dtype=torch.float64)
    return noise.normal(t, shape, seed=seed, stream=stream).numpy()


def damped(g, v, damping):
    return g + damping * v + EPS * np.abs(g) * v


def starting_scale(g, damping):
    return (np.mean(g**4) + damping**4) ** -0.125


def averaged(s, g, t, momentum):
    beta = min((t - 1) / t, momentum)
    s["m"] = beta * s.get("m", 0) + (1 - beta) * g
    return s["m"]


def raised(s, name, seen, beta):
    before = s.get(name, 0)
    s[name] = max(beta * before + (1 - beta) * seen, seen)
    return s[name]


def stepped(p, x, lr, clip_rms, clip_entry, weight_decay):
    rms = np.sqrt(np.mean(x**2))
    x = np.clip(x * min(1, clip_rms / rms), -clip_entry, clip_entry)
    return p - lr * weight_decay * p - lr * x


class Whole(Plain):
    """The whole model as one vector, over which move(s, g, t, ...) gives the matrix Q."""

    model = True

    def update(self, p, g, s, t, lr, momentum, clip_rms, clip_entry, weight_decay, **given):
        shapes, sizes = [x.shape for x in p], np.cumsum([x.size for x in p])[:-1]
        p, g = (np.concatenate([x.ravel() for x in each]) for each in (p, g))
        m = averaged(s, g, t, momentum)
        q = self.move(s, g, t, **given)
        p = stepped(p, q.T @ (q @ m), lr, clip_rms, clip_entry, weight_decay)
        return [x.reshape(y) for x, y in zip(np.split(p, sizes), shapes, strict=True)]


class XMat(Whole):
    def move(self, s, g, t, lr_preconditioner, damping, seed):
        v, n = normal(t, g.shape, seed), g.size
        h = damped(g, v, damping)
        if t == 1:
            s["a"], s["b"] = np.full(n, starting_scale(g, damping)), np.zeros(n)
        q = np.diag(s["a"]) + np.fliplr(np.diag(s["b"]))
        qh, w = q @ h, np.linalg.solve(q.T, v)
        # E of the step Q <- (I - mu E) Q, on the two diagonals only.
        full = np.outer(qh, qh) - np.outer(w, w)
        here, there = np.eye(n, dtype=bool), np.fliplr(np.eye(n, dtype=bool))
        e = full * (here | there)
        q = q - lr_preconditioner / np.max(qh**2 + w**2) * e @ q
        s["a"] = np.diag(q).copy()
        s["b"] = np.where(np.diag(here & there), 0, np.diag(np.fliplr(q)))
        return np.diag(s["a"]) + np.fliplr(np.diag(s["b"]))


class LRA(Whole):
    def move(self, s, g, t, lr_preconditioner, beta_smoothness, damping, rank, seed):
        v, n = normal(t, g.shape, seed), g.size
        h = damped(g, v, damping)
        if t == 1:
            s["d"] = np.full(n, starting_scale(g, damping))
            for name, stream in (("u", 1), ("v", 2)):
                x = normal(t, (n, rank), seed, stream)
                s[name] = x * np.sqrt(0.1) / np.linalg.norm(x)
        ratio = np.sqrt(np.linalg.norm(s["u"]) / np.linalg.norm(s["v"]))
        u, w, d = s["u"] / ratio, s["v"] * ratio, s["d"]
        apart = 0.1 * (u.T @ u - w.T @ w) / ((u**2).sum() + (w**2).sum())
        u, w = u @ (np.eye(rank) - apart), w @ np.linalg.inv(np.eye(rank) - apart)
        q = (np.eye(n) + u @ w.T) * d
        a, b = q @ h, np.linalg.solve(q.T, v)
        ph, pv = q.T @ a, np.linalg.solve(q, b)
        length = np.linalg.norm
        bound = raised(s, "ld", np.max(np.abs(ph * h)) + np.max(np.abs(v * pv)), beta_smoothness)
        s["d"] = d - lr_preconditioner / bound * d * (ph * h - v * pv)
        e = np.outer(a, a) - np.outer(b, b)
        s["u"], s["v"] = u, w
        if float(noise.uniform(torch.tensor(t), (), seed=seed, stream=3)) < 0.5:
            seen = length(a) * length(w @ w.T @ a) + length(b) * length(w @ w.T @ b)
            mu = lr_preconditioner / raised(s, "lu", seen, beta_smoothness)
            s["u"] = u - mu * e @ w @ (np.eye(rank) + w.T @ u)
        else:
            seen = length(a) * length(u @ u.T @ a) + length(b) * length(u @ u.T @ b)
            mu = lr_preconditioner / raised(s, "lv", seen, beta_smoothness)
            s["v"] = w - mu * (np.eye(n) + w @ u.T) @ e @ u
        return (np.eye(n) + s["u"] @ s["v"].T) * s["d"]


def contracted(x, i):
    x = np.moveaxis(x, i, 0).reshape(x.shape[i], -1)
    return x @ x.T


def near_largest(x):
    row = x[np.argmax((x**2).sum(1))]
    return np.linalg.norm(x @ x @ row) / np.linalg.norm(x @ row)


class Kron(Plain):
    def update(
        self,
        p,
        g,
        s,
        t,
        lr,
        lr_preconditioner,
        beta_smoothness,
        damping,
        momentum,
        clip_rms,
        clip_entry,
        weight_decay,
        seed,
    ):
        shape = p.shape
        m = averaged(s, g, t, momentum)
        g = g.squeeze() if g.size > 1 else g.reshape(1)
        v = normal(t, g.shape, seed)
        h = damped(g, v, damping)
        if t == 1:
            scale = starting_scale(g, damping) ** (1 / g.ndim)
            s["q"] = [scale * np.eye(n) for n in g.shape]
        whole = np.ones((1, 1))
        for q in s["q"]:
            whole = np.kron(whole, q)
        a = (whole @ h.ravel()).reshape(g.shape)
        b = np.linalg.solve(whole.T, v.ravel()).reshape(g.shape)
        whole = np.ones((1, 1))
        for i, q in enumerate(s["q"]):
            on, off = contracted(a, i), contracted(b, i)
            if g.ndim == 1:
                on, off = np.diag(np.diag(on)), np.diag(np.diag(off))
                seen = np.max(np.diag(on + off))
            else:
                seen = near_largest(on + off)
            bound = raised(s, i, seen, beta_smoothness)
            s["q"][i] = q - lr_preconditioner / bound * np.triu(on - off) @ q
            whole = np.kron(whole, s["q"][i])
        x = (whole.T @ (whole @ m.ravel())).reshape(shape)
        return stepped(p, x, lr, clip_rms, clip_entry, weight_decay)


POINT = {"lr_preconditioner": 0.2, "damping": 0.1, "clip_rms": 0.6, "clip_entry": 0.7}
REFERENCE = {
    "psgdxmat": Reference(XMat, point=POINT),
    "psgdlra": Reference(LRA, chosen={"rank": 3}, point=POINT | {"beta_smoothness": 0.8}),
    "psgdkron": Reference(Kron, point=POINT | {"beta_smoothness": 0.8}),
}
