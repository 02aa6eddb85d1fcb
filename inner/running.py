"""A plan at one step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .hyper import Tensors
from .plan import Plan
from .written import Buffers

# Elements at a time: what a step makes on its way stays in a cache, but not in the fastest, whose
# gain is less than the microseconds of so many more calls.
BLOCK = 2**18


class Running:
    """A plan at one step. shared: slots after it, as far as they are known."""

    def __init__(
        self,
        plan: Plan,
        t: Tensor,
        loss: Tensor | None,
        values: Tensors,
        shared: Tensors,
        *,
        fused: bool = False,
    ) -> None:
        self.slots, self.shared = plan.slots, Tensors()
        self._given = [t, *(values[n] for n in plan.rule.hypers), *(shared[n] for n in plan.shared)]
        if "loss" in plan.rule.needs:
            assert loss is not None
            self._given.append(loss)
        self._stages, self._fused = iter(plan.stages), fused
        self._sums: list[tuple[Tensor, ...]] = []
        self.on()

    def on(self) -> bool:
        """Go on to the next pass; whether there is one."""
        sums = zip(*self._sums, strict=True)
        self._given += [x[0] if len(x) == 1 else torch.stack(x).sum() for x in sums]
        self._sums = []
        stage = next(self._stages, None)
        if stage is None:
            return False
        made = stage.numbers(*self._given)
        self.shared |= dict(zip(stage.shared, made, strict=False))
        self._tensors = made[len(stage.shared) :]
        self._numbers = [x.item() for x in self._tensors]
        self._code, self._needs = stage.code(self._numbers, fused=self._fused)
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        self._size = 0
        self.writes = bool(stage.trace.outputs)
        return self.writes or bool(stage.trace.sums)

    def step(self, vectors: Sequence[Tensor]) -> None:
        """Pass over vectors, all of one length: the weights, gradients and slots. The last pass
        changes weights and slots where they are.
        """
        size, device = vectors[0].numel(), vectors[0].device
        block = BLOCK if device.type == "cpu" else size
        tensors = [x.to(device) for x in self._tensors]
        blocks = (
            [vectors] if size <= block else zip(*(x.split(block) for x in vectors), strict=True)
        )
        for each in blocks:
            room = self._room(each[0].numel(), device)
            self._sums.append(self._code(each, self._numbers, tensors, room))

    def _room(self, size: int, device: torch.device) -> Buffers:
        """Buffers of so many elements."""
        if size > self._size:
            self._size = size
            self._buffers = {
                dtype: [torch.empty(size, dtype=dtype, device=device) for _ in range(count)]
                for dtype, count in self._needs.items()
            }
        if size == self._size:
            return self._buffers
        return {dtype: [x[:size] for x in each] for dtype, each in self._buffers.items()}


__all__ = ["Running"]
