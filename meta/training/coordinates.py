"""Learned values as one unconstrained vector, the space in which the meta-optimizer moves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...inner.core.hyper import Hyper, Tensors
from ...inner.core.layout import Layout


class Coordinates:
    """The map between a point (values by full name) and a flat vector, entry by entry; float64
    unless all hypers are float32.
    """

    def __init__(self, hypers: Mapping[str, Hyper]) -> None:
        self.hypers = dict(hypers)
        self.layout = Layout(tuple(hypers), tuple(torch.Size(h.shape) for h in hypers.values()))
        self._boxes = {name: hyper.box() for name, hyper in self.hypers.items()}

    def free(self, point: Tensors) -> Tensor:
        """The coordinates of a point."""
        return self.layout.flatten(
            {name: hyper.free(point[name].to(hyper.dtype)) for name, hyper in self.hypers.items()}
        )

    def point(self, z: Tensor) -> Tensors:
        """The values at coordinates z; differentiable."""
        parts = self.layout.unflatten(z)
        return {n: hyper.value(parts[n]).to(hyper.dtype) for n, hyper in self.hypers.items()}

    def pull(self, z: Tensor, grad: Tensors) -> Tensor:
        """The gradient in z from the gradient in the values there, by the chain rule."""
        z = z.detach().requires_grad_()
        values = self.point(z)
        (pulled,) = torch.autograd.grad(
            list(values.values()), z, [grad[name].to(x.dtype) for name, x in values.items()]
        )
        return pulled

    def inside(self, z: Tensor) -> Tensor:
        """The nearest coordinates inside every hyper's search range."""
        parts = self.layout.unflatten(z)
        return self.layout.flatten({n: x.clamp(*self._boxes[n]) for n, x in parts.items()})
