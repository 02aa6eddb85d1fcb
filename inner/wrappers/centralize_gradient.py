"""Gradient centralization: of matrices and kernels, each output's gradient less its mean.
Yong et al. 2020, arXiv:2004.01461.

The first dimension is that of the outputs, as in torch.nn. Vectors and numbers are left alone. As
in the paper it is the gradient of the loss that is centralized, before any decay or moment. The
authors' later code (Yonghongwei/Gradient-Centralization, algorithm-GC) does it to the whole step of
SGD, which is the same as long as nothing decays.
"""

from ..compose.wrapper import wrapper


@wrapper(over="tensor")
def centralize_gradient(p, g, s, t, inner):
    if g.ndim > 1:
        g = g - g.mean(tuple(range(1, g.ndim)), keepdim=True)
    return inner(p, g), s
