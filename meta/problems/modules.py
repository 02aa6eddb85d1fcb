"""A model as a problem holds it, and the kernels it runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.backends import cuda

_FUSED: tuple[tuple[Callable[[], bool], Callable[[bool], None]], ...] = (
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
)


def checked_weights(model: nn.Module, name: str) -> list[nn.Parameter]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: make_model returned {type(model).__name__}, not an nn.Module")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"{name}: the model has no parameters to train (requires_grad=True)")
    return trainable


def copy_modules(model: nn.Module) -> nn.Module:
    """Copies of all modules around the same tensors: make_model may return one that it keeps."""
    held = [x for m in model.modules() for x in vars(m).values() if isinstance(x, Tensor)]
    return deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers(), *held)})


@contextmanager
def twice_differentiable(recurrent: bool) -> Iterator[None]:
    """Only kernels whose backward has a derivative: the fused ones of attention have none.

    cuDNN's recurrent layers have none either, but its convolutions do.
    """
    # Not torch's sdpa_kernel, which takes as long as a small layer.
    before = [enabled() for enabled, _ in _FUSED]
    cudnn = torch.backends.cudnn.enabled
    for _, enable in _FUSED:
        enable(False)
    torch.backends.cudnn.enabled = cudnn and not recurrent
    try:
        yield
    finally:
        for (_, enable), state in zip(_FUSED, before, strict=True):
            enable(state)
        torch.backends.cudnn.enabled = cudnn


def autocast_region(
    device: torch.device, autocast: torch.dtype | None
) -> AbstractContextManager[object]:
    """Where torch finds it safe, compute in the type autocast; None changes nothing."""
    if autocast is None:
        return nullcontext()
    # No cache of weights in the lower type. It is for leaves, and the weights are slices of one
    # vector; a cast that it kept from a part without a graph would cut the graph of another.
    return torch.autocast(device.type, autocast, cache_enabled=False)


def check_autocast(autocast: torch.dtype | None, weights: list[nn.Parameter], name: str) -> None:
    if autocast is None:
        return
    if autocast == torch.float16:
        raise ValueError(
            f"{name}: autocast=torch.float16 needs its loss scaled, or small gradients become 0; "
            "give torch.bfloat16"
        )
    if autocast != torch.bfloat16:
        raise ValueError(f"{name}: autocast={autocast} is neither torch.bfloat16 nor None")
    odd = {p.dtype for p in weights} - {torch.float32}
    if odd:
        raise ValueError(
            f"{name}: autocast is for float32 weights and these are {odd.pop()}; make the model "
            "float32 or leave autocast out"
        )


__all__ = [
    "autocast_region",
    "check_autocast",
    "checked_weights",
    "copy_modules",
    "twice_differentiable",
]
