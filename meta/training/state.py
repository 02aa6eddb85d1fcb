"""What training carries from one step to the next, and what is in force at each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ...inner.core.hyper import Tensors


class State(NamedTuple):
    """All that training carries from one step to the next."""

    p: Tensor
    slots: Tensors
    buffers: Tensors


def finite(state: State) -> bool:
    """Whether every weight is a number."""
    return bool(state.p.isfinite().all())


@dataclass(frozen=True)
class Resolved:
    """The hyperparameters in force: per step (first dimension time) and constant ones."""

    varying: Tensors
    constant: Tensors

    def at(self, step: int) -> Tensors:
        return {name: table[step] for name, table in self.varying.items()} | self.constant

    def over(self, name: str, steps: int) -> Tensor:
        """A value at each of the steps, the first dimension time."""
        if name in self.varying:
            return self.varying[name]
        return self.constant[name].expand(steps, *self.constant[name].shape)

    def detach(self) -> Resolved:
        return Resolved(
            {name: table.detach() for name, table in self.varying.items()},
            {name: value.detach() for name, value in self.constant.items()},
        )


__all__ = ["Resolved", "State", "finite"]
