"""Rules that step along a model of the loss, or in the metric of its graph."""

import numpy as np
from oracle import Plain, Reference


class InducedMetric(Plain):
    model = True

    def update(
        self,
        p,
        g,
        s,
        t,
        lr,
        momentum,
        xi,
        beta,
        weight_decay,
        beta_rms=0,
        eps=0,
        form="log",
        loss=0,
    ):
        if not s:
            zeros = [np.zeros_like(x) for x in g]
            s.update(m=zeros, v=zeros, S=0.0)
        s["m"] = [momentum * m + (1 - momentum) * x for m, x in zip(s["m"], g, strict=True)]
        s["v"] = [beta_rms * v + (1 - beta_rms) * x**2 for v, x in zip(s["v"], g, strict=True)]
        a = [1.0] * len(g)
        if form == "rms":
            a = [np.sqrt(v / (1 - beta_rms**t)) + eps for v in s["v"]]
        q = sum((x**2 / d).sum() for x, d in zip(g, a, strict=True))
        s["S"] = beta * s["S"] + (1 - beta) * xi * q
        S = s["S"] / (1 - beta**t)
        scale = loss / (loss**2 + S) if form == "log" else 1 / (1 + abs(S))
        return [
            x - lr * weight_decay * x - lr * scale * m / (1 - momentum**t) / d
            for x, m, d in zip(p, s["m"], a, strict=True)
        ]


class LogInducedMetric(InducedMetric):
    def update(self, p, g, s, t, loss, **given):
        return super().update(p, g, s, t, loss=loss, form="log", **given)


class TruncatedModel(Plain):
    model = True

    def update(self, p, g, s, t, loss, lr, floor):
        rate = min(lr, max(loss - floor, 0) / sum((x**2).sum() for x in g))
        return [x - rate * d for x, d in zip(p, g, strict=True)]


class TruncatedAdagrad(Plain):
    model = True

    def update(self, p, g, s, t, loss, lr, floor, eps):
        s["G"] = [G + x**2 for G, x in zip(s.get("G", [0.0] * len(g)), g, strict=True)]
        d = [x / (np.sqrt(G) + eps) for G, x in zip(s["G"], g, strict=True)]
        q = sum((x * y).sum() for x, y in zip(g, d, strict=True))
        rate = min(lr, max(loss - floor, 0) / q)
        return [x - rate * y for x, y in zip(p, d, strict=True)]


REFERENCE = {
    "inducedmetric": Reference(InducedMetric, point={"xi": 0.1}),
    "loginducedmetric": Reference(LogInducedMetric, point={"lr": 2.0, "xi": 10.0}),
    "truncatedmodel": Reference(TruncatedModel, point={"lr": 0.5, "floor": 17.0}),
    "truncatedadagrad": Reference(TruncatedAdagrad, point={"lr": 1.0, "floor": 15.0}),
}
