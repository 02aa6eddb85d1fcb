"""The gradient of each tensor scaled down to a norm. Pascanu et al. 2013, arXiv:1211.5063.

There it is that of all tensors as one, `clip_norm`. As torch.nn.utils.clip_grad_norm_ called with
one tensor after another, which adds 1e-6 to the norm it divides by.
"""

from ..compose.wrapper import wrapper
from ..core.hyper import positive
from .clip_norm import clipped


@wrapper(over="tensor", max_norm=positive(1.0, search=(1e-3, 1e3), finest="tensor"))
def clip_tensor(p, g, s, t, inner, max_norm):
    return inner(p, clipped(g, max_norm)), s
