"""AMSGrad: Adam that never forgets its largest second moment. Reddi et al. 2018, arXiv:1904.09237.

As torch.optim.Adam(amsgrad=True): the largest is that of the biased averages, and it is corrected
for bias at the current step. The paper corrects nothing.
"""

import torch

from ..core.hyper import decay, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import zeros
from .adam import direction, moments


@rule(
    "AMSGrad",
    slots={"m": zeros, "v": zeros, "v_max": zeros},
    lr=learning_rate(1e-3),
    beta1=decay(0.9),
    beta2=decay(0.999),
    eps=positive(1e-8, search=(1e-12, 1e-2)),
    weight_decay=weight_decay(0.0),
)
def amsgrad(p, g, s, t, lr, beta1, beta2, eps, weight_decay):
    m, v = moments(g + weight_decay * p, s, beta1, beta2)
    v_max = torch.maximum(s["v_max"], v)
    step = direction(m, v_max, t, beta1, beta2, eps)
    return p - lr * step, {"m": m, "v": v, "v_max": v_max}
