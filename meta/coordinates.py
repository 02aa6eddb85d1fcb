"""Learned values as one unconstrained vector, the space in which the meta-optimizer moves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..inner.flat import Layout
from ..inner.hyper import Hyper, Tensors


class Coordinates:
    """The map between a point (values by full name) and a flat float64 vector, entry by entry."""

    def __init__(self, hypers: Mapping[str, Hyper]) -> None:
        self.hypers = dict(hypers)
        self.layout = Layout(tuple(hypers), tuple(torch.Size(h.shape) for h in hypers.values()))
        boxes = [h.box() for h in self.hypers.values()]
        self._low, self._high = (
            torch.cat(
                [
                    torch.full((size,), box[side], dtype=torch.float64)
                    for size, box in zip(self.layout.sizes, boxes, strict=True)
                ]
            )
            for side in (0, 1)
        )

    def free(self, point: Tensors) -> Tensor:
        """The coordinates of a point."""
        return self.layout.flatten(
            {name: hyper.free(point[name].double()) for name, hyper in self.hypers.items()}
        )

    def point(self, z: Tensor) -> Tensors:
        """The values at coordinates z; differentiable."""
        parts = self.layout.unflatten(z)
        return {name: hyper.value(parts[name]) for name, hyper in self.hypers.items()}

    def pull(self, z: Tensor, grad: Tensors) -> Tensor:
        """The gradient in z from the gradient in the values there, by the chain rule."""
        z = z.detach().requires_grad_()
        values = self.point(z)
        (pulled,) = torch.autograd.grad(
            list(values.values()), z, [grad[name].double() for name in values]
        )
        return pulled

    def inside(self, z: Tensor) -> Tensor:
        """The nearest coordinates inside every hyper's search range."""
        return torch.minimum(torch.maximum(z, self._low), self._high)
