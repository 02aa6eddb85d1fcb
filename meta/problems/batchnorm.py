"""Batch normalization whose running statistics carry gradients.

torch's kernel updates running_mean and running_var outside autograd, and its backward treats them
as constants. They are functions of the weights of every earlier step, and the validation loss
reads them, so a metagradient without that path is wrong. Ioffe & Szegedy 2015, arXiv:1502.03167.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.nn import BatchNorm1d as BatchNorm
else:
    # What all batch norms inherit their forward from.
    BatchNorm = next(kind for kind in nn.BatchNorm1d.__mro__ if "forward" in vars(kind))


class _Carried(BatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        return _normalized(self, x)


def carry_statistics(model: nn.Module) -> None:
    """Make every batch norm of model update its statistics out of place and differentiably.

    A subclass with a forward of its own keeps it, and finds this batch norm at super().forward.
    One that does not ask there (SyncBatchNorm) has statistics that are carried, not differentiated.
    """
    for module in model.modules():
        if isinstance(module, BatchNorm):
            kind = type(module)
            # Python's order of bases puts _Carried behind kind and its parents but for _BatchNorm.
            module.__class__ = type(kind.__name__, (kind, _Carried), {})


def _normalized(norm: BatchNorm, x: Tensor) -> Tensor:
    norm._check_input_dim(x)
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()  # As torch's own kernel, which takes its statistics in float32.
    across = [d for d in range(x.ndim) if d != 1]
    tracking = norm.running_mean is not None and norm.running_var is not None
    if norm.training or not tracking:
        count = x.numel() / x.shape[1]
        if count < 2:
            raise ValueError("batch norm needs more than one value per channel to train on")
        mean, var = x.mean(across), x.var(across, correction=0)
        if norm.training and tracking:
            _update_statistics(norm, mean, var, count)
    else:
        mean, var = norm.running_mean, norm.running_var  # type: ignore[assignment]
    shape = [1, -1] + [1] * (x.ndim - 2)
    scale = torch.rsqrt(var + norm.eps)
    if norm.affine:
        scale = scale * norm.weight
    out = (x - mean.view(shape)) * scale.view(shape)
    return out + norm.bias.view(shape) if norm.affine else out


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
