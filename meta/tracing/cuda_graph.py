"""Steps on a GPU as CUDA graphs: all kernels of a step are launched at once.

Python takes about ten microseconds to launch a kernel, and most kernels of a small model are done
sooner than that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...inner.torch_internals import Run, foreach_copy

# Bytes that go in and come out, beyond which copying them takes longer than it saves.
_LARGEST = 2**28
# Calls after which what is made when first used is there: TorchScript looks at two.
_CALLS = 3


def captured(run: Run) -> Run:
    """The same function, as one CUDA graph where its tensors are on a GPU and not too large.

    It is captured at the first call, whose shapes all others must have. run may not draw random
    numbers. Each call returns tensors of its own.
    """
    made: list[Run] = []

    def call(*inputs: Tensor) -> Sequence[Tensor]:
        if not made:
            made.append(_captured(run, inputs))
        return made[0](*inputs)

    return call


def _captured(run: Run, given: Sequence[Tensor]) -> Run:
    device = given[0].device
    if device.type != "cuda" or any(x.device != device for x in given) or _too_large(given):
        return run
    into = [x.clone() for x in given]
    with torch.no_grad(), torch.cuda.device(device):
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(_CALLS):
                out = run(*into)
        torch.cuda.current_stream().wait_stream(beside)
        if _too_large([*into, *out]):
            return run
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                out = run(*into)
        except RuntimeError:  # It waits for the GPU somewhere, which a graph cannot.
            return run

    def replay(*inputs: Tensor) -> Sequence[Tensor]:
        with torch.no_grad(), torch.cuda.device(device):
            _copy(inputs, into)
            graph.replay()
            # The graph writes to the same memory again, and what is kept must stay.
            made = [torch.empty_like(x) for x in out]
            _copy(out, made)
        return made

    return replay


def _too_large(tensors: Sequence[Tensor]) -> bool:
    return sum(x.nbytes for x in tensors) > _LARGEST


def _copy(source: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    """In one launch for every type, which are few."""
    for dtype in {x.dtype for x in source}:
        pairs = [(x, y) for x, y in zip(source, into, strict=True) if x.dtype == dtype]
        foreach_copy([y for _, y in pairs], [x for x, _ in pairs])
