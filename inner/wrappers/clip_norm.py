"""The gradient of the whole model scaled down to a norm. Pascanu et al. 2013, arXiv:1211.5063.

As torch.nn.utils.clip_grad_norm_, which adds 1e-6 to the norm it divides by.
"""

from ..hyper import positive
from ..rule import root
from ..wrap import wrapper


@wrapper(over="model", max_norm=positive(1.0, search=(1e-3, 1e3)))
def clip_norm(p, g, s, t, inner, max_norm):
    norm = root((g * g).sum())
    return inner(p, g * (max_norm / (norm + 1e-6)).clamp(max=1)), s
