"""Loss functions as people write them, made one number."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature

from torch import Tensor, nn

from ...inner.core.hyper import Tensors

LossFn = Callable[..., Tensor]


def takes(function: Callable[..., object], name: str) -> bool:
    """Whether a function has a parameter of that name."""
    if isinstance(function, nn.Module):
        function = function.forward
    try:
        parameters = signature(function).parameters
    except ValueError:  # A builtin that does not tell.
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def scalar_loss(loss_fn: LossFn, output: object, target: object, **extra: Tensors) -> Tensor:
    """The loss; NaN if loss_fn refuses an output because that is NaN."""
    try:
        loss = loss_fn(output, target, **extra)
    except Exception:
        if not isinstance(output, Tensor) or not bool(output.isnan().any()):
            raise
        return output.sum()
    if isinstance(loss, Tensor) and loss.numel() != 1:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise ValueError(
            f"the loss function {name} returned shape {tuple(loss.shape)}; return a scalar, for "
            "example the mean"
        )
    return loss


def weighted_mean(loss_fn: LossFn, losses: Tensor, weights: Tensor) -> Tensor:
    """The mean of weight times loss of a batch."""
    if losses.shape != weights.shape:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise ValueError(
            f"with data_weights=True the loss function {name} must return one loss per example, "
            f'shape {tuple(weights.shape)}, as with reduction="none"; it returned '
            f"{tuple(losses.shape)}"
        )
    return (weights.to(losses) * losses).mean()


def mean_of(loss_fn: LossFn, output: object, target: Tensor) -> Tensor:
    """The mean of the losses of examples."""
    return loss_fn(output, target).mean()


__all__ = ["LossFn", "mean_of", "scalar_loss", "takes", "weighted_mean"]
