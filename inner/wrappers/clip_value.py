"""Every entry of the gradient kept within [-max_value, max_value]. Mikolov 2012, Statistical
Language Models Based on Neural Networks, fit.vut.cz/study/phd-thesis/283.

As torch.nn.utils.clip_grad_value_.
"""

import torch

from ..compose.wrapper import wrapper
from ..core.hyper import positive


@wrapper(max_value=positive(1.0, search=(1e-3, 1e3)))
def clip_value(p, g, s, t, inner, max_value):
    # where, not clamp: bounds may be numbers on another device.
    return inner(p, torch.where(g.abs() > max_value, max_value * g.sign(), g)), s
