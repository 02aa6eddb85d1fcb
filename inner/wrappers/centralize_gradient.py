"""Gradient centralization: of matrices and kernels, each output's gradient less its mean.
Yong et al. 2020, arXiv:2004.01461.

The first dimension is that of the outputs, as in torch.nn. Vectors and numbers are left alone. A
weight decay that is added to the gradient inside is not centralized, as in the authors' SGD (
Yonghongwei/Gradient-Centralization); centralize_gradient inside of coupled_weight_decay would be.
"""

from ..wrap import wrapper


@wrapper(over="tensor")
def centralize_gradient(p, g, s, t, inner):
    if g.ndim > 1:
        g = g - g.mean(tuple(range(1, g.ndim)), keepdim=True)
    return inner(p, g), s
