"""Products of a vector with a Jacobian, by autograd, with zeros where nothing leads to an input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge


def vjp(
    outputs: Sequence[Tensor | GradientEdge | None],
    inputs: Sequence[Tensor],
    along: Sequence[Tensor | None],
    *,
    keep: bool = True,
    graph: bool = False,
) -> list[Tensor]:
    """The gradient of sum <output, along> in the inputs, 0 where there is no path to one; None
    stands for 1, an output None for a constant.

    keep: the graph stays for the next product. graph: the result has one too, but for its zeros,
    which torch's own materialize_grads makes leaves that nothing may be added to.
    """
    # Without outputs that are constant in all inputs, which autograd calls an error.
    live = [
        (x, bar)
        for x, bar in zip(outputs, along, strict=True)
        if x is not None and (isinstance(x, GradientEdge) or x.requires_grad)
    ]
    if not live:
        return [torch.zeros_like(x) for x in inputs]
    ends, bars = zip(*live, strict=True)
    grads = torch.autograd.grad(
        ends,
        list(inputs),
        bars,
        retain_graph=keep or graph,
        create_graph=graph,
        allow_unused=True,
    )
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]


__all__ = ["vjp"]
