"""DoG and LDoG by their equations."""

import numpy as np
from oracle import Plain, Reference


def norm_of_all(xs):
    return np.sqrt(sum((x * x).sum() for x in xs))


class DoG(Plain):
    """Without the average, of which a path of the trained weights says nothing."""

    model = True

    def update(self, p, g, s, t, lr, reps_rel, weight_decay, eps, gamma):
        g = [b + weight_decay * a for a, b in zip(p, g, strict=True)]
        if t == 1:
            s["start"] = p
            s["reach"], s["total"] = reps_rel * (1 + norm_of_all(p)), 0.0
        moved = [a - b for a, b in zip(p, s["start"], strict=True)]
        s["reach"] = max(s["reach"], norm_of_all(moved))
        s["total"] += norm_of_all(g) ** 2
        rate = lr * s["reach"] / np.sqrt(s["total"] + eps)
        return [a - rate * b for a, b in zip(p, g, strict=True)]


class LDoG(DoG):
    model = False

    def update(self, p, g, s, t, **given):
        (after,) = DoG.update(self, [p], [g], s, t, **given)
        return after


POINT = {"lr": 1.0, "reps_rel": 0.05}
REFERENCE = {"dog": Reference(DoG, point=POINT), "ldog": Reference(LDoG, point=POINT)}
