"""Batch normalization whose running statistics carry gradients.

torch's kernel updates running_mean and running_var outside autograd, and its backward treats them
as constants. They are functions of the weights of every earlier step, and the validation loss
reads them, so a metagradient without that path is wrong. Ioffe & Szegedy 2015, arXiv:1502.03167.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
else:
    BatchNorm = nn.modules.batchnorm._BatchNorm


def carry_statistics(model: nn.Module) -> None:
    """Make every batch norm of model update its statistics out of place and differentiably."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(self: BatchNorm, x: Tensor) -> Tensor:
    self._check_input_dim(x)
    across = [d for d in range(x.ndim) if d != 1]
    tracking = self.running_mean is not None and self.running_var is not None
    if self.training or not tracking:
        count = x.numel() / x.shape[1]
        if count < 2:
            raise ValueError("batch norm needs more than one value per channel to train on")
        mean, var = x.mean(across), x.var(across, correction=0)
        if self.training and tracking:
            _update_statistics(self, mean, var, count)
    else:
        mean, var = self.running_mean, self.running_var  # type: ignore[assignment]
    shape = [1, -1] + [1] * (x.ndim - 2)
    scale = torch.rsqrt(var + self.eps)
    if self.affine:
        scale = scale * self.weight
    out = (x - mean.view(shape)) * scale.view(shape)
    return out + self.bias.view(shape) if self.affine else out


def _update_statistics(norm: BatchNorm, mean: Tensor, var: Tensor, count: float) -> None:
    assert norm.num_batches_tracked is not None  # for the type checker: it tracks statistics
    assert norm.running_mean is not None and norm.running_var is not None
    norm.num_batches_tracked = norm.num_batches_tracked + 1
    # momentum=None asks for the plain average over all batches seen.
    seen = norm.num_batches_tracked.double()  # An integer's reciprocal would be float32.
    new = 1 / seen if norm.momentum is None else norm.momentum
    unbiased = var * (count / (count - 1))
    norm.running_mean = (1 - new) * norm.running_mean + new * mean
    norm.running_var = (1 - new) * norm.running_var + new * unbiased
