"""AlphaGrad, in the order of the author's code."""

import numpy as np
from oracle import Plain, Reference


class AlphaGrad(Plain):
    def update(self, p, g, s, t, lr, alpha, eps, momentum, dampening, weight_decay, nesterov):
        d = np.tanh(alpha * (g / (np.sqrt((g * g).sum()) + eps))) + weight_decay * p
        if momentum:
            fresh = "buffer" not in s
            s["buffer"] = d if fresh else momentum * s["buffer"] + (1 - dampening) * d
            d = d + momentum * s["buffer"] if nesterov else s["buffer"]
        return p - lr * d


REFERENCE = {"alphagrad": Reference(AlphaGrad)}
