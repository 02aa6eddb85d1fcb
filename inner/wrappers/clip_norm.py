"""The gradient of the whole model scaled down to a norm. Pascanu et al. 2013, arXiv:1211.5063.

As torch.nn.utils.clip_grad_norm_, which adds 1e-6 to the norm it divides by. In the torch form the
whole model is a param group.
"""

from ..compose.wrapper import wrapper
from ..core.hyper import positive
from ..numerics.elementwise import at_least_float32, root


def clipped(g, max_norm):
    """A vector of at most this length."""
    x = g.to(at_least_float32(g.dtype))
    return g * (max_norm / (root((x * x).sum()) + 1e-6)).clamp(max=1)


@wrapper(over="model", max_norm=positive(1.0, search=(1e-3, 1e3), finest="shared"))
def clip_norm(p, g, s, t, inner, max_norm):
    return inner(p, clipped(g, max_norm)), s
