"""Rules that find their learning rate or its schedule themselves."""

from functools import partial

import numpy as np
import pytorch_optimizer
from oracle import Plain, Reference


class ScheduleFreeAdamW(Plain):
    """The authors' recursion in y; pytorch_optimizer has 1e-15 more under the root."""

    def update(self, y, g, s, t, lr, betas, eps, weight_decay, r, weight_lr_power):
        b1, b2 = betas
        s["v"] = b2 * s.get("v", 0.0) + (1 - b2) * g * g
        d = g / (np.sqrt(s["v"] / (1 - b2**t)) + eps) + weight_decay * y
        s["lr_max"] = max(lr, s.get("lr_max", -1.0))
        weight = t**r * s["lr_max"] ** weight_lr_power
        s["sum"] = s.get("sum", 0.0) + weight
        c = weight / s["sum"]
        z = s.get("z", y)
        s["z"] = z - lr * d
        return (1 - c) * y + c * z + lr * (b1 * (1 - c) - 1) * d


def prodigy(given):
    names = {"use_bias_correction": "bias_correction"}
    return {names.get(n, n): x for n, x in given.items()} | {
        "betas": given["betas"][:2],
        "beta3": given["betas"][2],
    }


REFERENCE = {
    "prodigy": Reference(
        partial(pytorch_optimizer.Prodigy, foreach=False),
        translate=prodigy,
        tolerance=1e-8,
        why="it takes the way from the first weights as a difference of weights, of which steps of "
        "size d0 = 1e-6 leave ten digits; see tests/inner/rules/test_without_a_rate.py",
        # Large enough that the weights move in a few steps.
        point={"lr": 1.0, "d0": 0.05},
    ),
    "schedulefreesgd": Reference(partial(pytorch_optimizer.ScheduleFreeSGD, foreach=False)),
    "schedulefreeadamw": Reference(ScheduleFreeAdamW),
}
