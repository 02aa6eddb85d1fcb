"""The tensors of a model, or of a part of it, as they lie in one flat vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .hyper import Tensors


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors in a flat vector, in order."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @staticmethod
    def of(params: Mapping[str, Tensor]) -> Layout:
        return Layout(tuple(params), tuple(p.shape for p in params.values()))

    @staticmethod
    def alone(shape: torch.Size, name: str = "") -> Layout:
        """That of one tensor. A number is a vector of one: a rule must not see 0-dim weights, which
        would take the float64 of hypers.
        """
        return Layout((name,), (shape or torch.Size([1]),))

    @cached_property
    def sizes(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    @cached_property
    def units(self) -> list[Layout]:
        """Each tensor's own."""
        pairs = zip(self.names, self.shapes, strict=True)
        return [Layout.alone(shape, name) for name, shape in pairs]

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([params[name].reshape(-1) for name in self.names])

    def unflatten(self, flat: Tensor) -> Tensors:
        return dict(zip(self.names, self.split(flat), strict=True))

    def split(self, flat: Tensor) -> list[Tensor]:
        """The same without names."""
        # One split, not a slice per tensor: the backward of a slice fills a whole vector of zeros.
        return [x.view(n) for x, n in zip(flat.split(self.sizes), self.shapes, strict=True)]

    def per_element(self, value: Tensor, like: Tensor) -> Tensor:
        """A hyperparameter (shared, per tensor or per element) against a flat vector."""
        if value.ndim == 0:
            return value
        if value.numel() != like.numel():
            value = value.repeat_interleave(
                torch.tensor(self.sizes, device=value.device), output_size=like.numel()
            )
        return value.to(like)

    def all_per_element(self, values: Tensors, like: Tensor) -> Tensors:
        return {name: self.per_element(v, like) for name, v in values.items()}

    def per_tensor(self, value: Tensor) -> list[Tensor]:
        """A hyperparameter as each tensor's own: one number, or one per element."""
        if value.ndim == 0:
            return [value] * len(self.names)
        if value.numel() != len(self.names) or value.numel() == sum(self.sizes):
            shapes = [unit.shapes[0] for unit in self.units]
            return [x.view(s) for x, s in zip(value.split(self.sizes), shapes, strict=True)]
        return list(value.unbind())


__all__ = ["Layout"]
