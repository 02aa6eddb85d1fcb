"""delta-GClip by its formula."""

import numpy as np
from oracle import Plain, Reference


def step(norm, lr, gamma, delta):
    return lr * min(1.0, max(delta, gamma / norm))


class OfTheModel(Plain):
    model = True

    def update(self, p, g, s, t, lr, gamma, delta, weight_decay):
        norm = np.sqrt(sum((x * x).sum() for x in g))
        h = step(norm, lr, gamma, delta)
        return [a - h * (b + weight_decay * a) for a, b in zip(p, g, strict=True)]


class OfEachTensor(Plain):
    def update(self, p, g, s, t, lr, gamma, delta, weight_decay):
        h = step(np.sqrt((g * g).sum()), lr, gamma, delta)
        return p - h * (g + weight_decay * p)


# The floor acts on some steps of this path, the threshold on others.
POINT = {"gamma": 1.2, "delta": 0.4}
REFERENCE = {
    "deltagclip": Reference(OfTheModel, point=POINT),
    "deltagclipc": Reference(OfEachTensor, point=POINT),
}
