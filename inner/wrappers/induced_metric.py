"""The step in the metric that a loss surface inherits from one dimension more: shorter where it is
steep. Harvey 2025, arXiv:2509.03594.

Around a rule that steps along P g: times 1 / (1 + xi g'P g), over the whole model. Its step per
unit of learning rate stands for P g; with momentum the product can be negative, and its size
counts, as in the author's code (harveyThomas4692/Induced-Metric-Optimiser), which averages it over
steps. Not a kind of clipping: a step along g is longest at |g| = 1 / sqrt(xi), and shorter again
beyond. All that the rule inside does is scaled; the code leaves decay as it is, and so does
decoupled_weight_decay(induced_metric(adam)).
"""

from ..compose.wrapper import wrapper
from ..core.hyper import positive
from ..numerics.elementwise import at_least_float32


@wrapper(over="model", moves=True, xi=positive(0.1, search=(1e-9, 10.0), finest="shared"))
def induced_metric(p, g, s, t, inner, xi):
    step = inner(p, g) - p
    product = (g * inner.direction(step)).sum(dtype=at_least_float32(p.dtype))
    return p + step / (1 + xi * product.abs()), s
