"""Descent in the metric that the graph of the loss has from one dimension more. Harvey 2025,
arXiv:2509.03594.

The graph (w, sqrt(xi) L(w)) has the metric 1 + xi g g', and in it the gradient is
g / (1 + xi |g|^2): steps are longest where |g| = 1 / sqrt(xi), and shrink beyond. As the author's
code (harveyThomas4692/Induced-Metric-Optimiser, torch_imp.py), g and xi |g|^2 are averages free of
their bias towards zero; decay is decoupled, and not scaled by the metric. beta begins at the 0.8 of
its JAX form, where the torch form has 0.1. In the author's own sweeps the best xi was at most 1e-5,
where the metric is all but flat.
"""

import torch

from ..core.hyper import Choice, decay, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import if_option, number, zeros
from ..numerics.elementwise import at_least_float32, root


def unbiased(average, share, t):
    """An average of which a share is kept at every step, free of its bias towards zero."""
    return average / (1 - share**t)


def averaged_metric(s, products, t, xi, beta):
    """The averages of xi times a sum of products, as kept and without bias."""
    total = products.to(at_least_float32(products.dtype)).sum()
    # Of three numbers none is a vector, whose dtype would be kept.
    metric = (beta * s["metric"] + (1 - beta) * xi * total).to(s["metric"].dtype)
    return metric, unbiased(metric, beta, t)


@rule(
    "InducedMetric",
    over="model",
    slots={"m": zeros, "v": if_option("form", "rms", zeros), "metric": number()},
    lr=learning_rate(0.1, search=(1e-4, 10.0)),
    momentum=decay(0.9),
    xi=positive(0.1, search=(1e-9, 10.0), finest="shared"),
    beta=decay(0.8, finest="shared"),
    beta_rms=decay(0.99, when=("form", "rms")),
    weight_decay=weight_decay(0.0),
    eps=positive(1e-8, search=(1e-12, 1e-2), when=("form", "rms")),
    form=Choice("plain", ("plain", "rms")),
)
def inducedmetric(p, g, s, t, lr, momentum, xi, beta, beta_rms, weight_decay, eps, form):
    m, v = momentum * s["m"] + (1 - momentum) * g, s["v"]
    step, products = unbiased(m, momentum, t), g * g
    if form == "rms":  # The added dimension over a space that has RMSprop's metric.
        v = beta_rms * v + (1 - beta_rms) * g * g
        a = root(unbiased(v, beta_rms, t)) + eps
        step, products = step / a, products / a
    metric, corrected = averaged_metric(s, products, t, xi, beta)
    p = (1 - lr * weight_decay) * p - lr * step / (1 + corrected)
    return p, {"m": m, "v": v, "metric": metric}


@rule(
    "LogInducedMetric",
    over="model",
    needs=("loss",),
    slots={"m": zeros, "metric": number()},
    lr=learning_rate(0.1, search=(1e-4, 10.0)),
    momentum=decay(0.9),
    xi=positive(0.1, search=(1e-9, 10.0), finest="shared"),
    beta=decay(0.8, finest="shared"),
    weight_decay=weight_decay(0.0),
)
def loginducedmetric(p, g, s, t, loss, lr, momentum, xi, beta, weight_decay):
    """Descent of log L in the metric that its graph has from one dimension more. Harvey 2025,
    arXiv:2509.03594.

    The gradient of log L in that metric is g L / (L^2 + xi |g|^2); the loss must be positive. As in
    InducedMetric, from the same code, the gradient and xi |g|^2 are averages, the loss is not.
    Multiplying the loss by a constant changes nothing.
    """
    m = momentum * s["m"] + (1 - momentum) * g
    metric, corrected = averaged_metric(s, g * g, t, xi, beta)
    size = loss * loss + corrected
    # A loss that is 0 has reached its bound, and its gradient, too, is 0.
    none = size == 0
    share = torch.where(none, 0.0, loss / torch.where(none, 1.0, size))
    p = (1 - lr * weight_decay) * p - lr * share * unbiased(m, momentum, t)
    return p, {"m": m, "metric": metric}
