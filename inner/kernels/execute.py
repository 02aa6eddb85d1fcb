"""A plan at one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core.hyper import Tensors
from ..numerics.elementwise import at_least_float32
from .codegen import Buffers, Code
from .trace import Plan

# Elements at a time: what a step makes on its way stays in a cache, but not in the fastest, whose
# gain is less than the microseconds of so many more calls.
BLOCK = 2**18
# From so many on, steps in place save more than they cost.
LONG = 2**14


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
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        self.on()

    def on(self) -> bool:
        """Go on to the next pass; whether there is one."""
        sums = zip(*self._sums, strict=True)
        self._given += [x[0] if len(x) == 1 else _total(x) for x in sums]
        self._sums = []
        stage = next(self._stages, None)
        if stage is None:
            return False
        made = stage.numbers(*self._given)
        self.shared |= dict(zip(stage.shared, made, strict=False))
        self._tensors = made[len(stage.shared) :]
        self._numbers = [x.item() for x in self._tensors]
        self._stage = stage
        self.writes = bool(stage.trace.outputs)
        return self.writes or bool(stage.trace.sums)

    @property
    def weights(self) -> bool:
        """Whether the pass over gathered vectors takes weights. If the last one does not, it has
        what is to be taken off them in the place of the gradients.
        """
        return self._code(gathered=True).weights

    def _code(self, *, gathered: bool) -> Code:
        return self._stage.code(self._numbers, fused=self._fused, gathered=gathered)

    def step(self, vectors: Sequence[Tensor], *, gathered: bool = False) -> None:
        """Pass over vectors, all of one length: the weights, gradients and slots. The last pass
        changes weights and slots where they are. gathered: gradients are overwritten.
        """
        code = self._code(gathered=gathered)
        size, device = vectors[0].numel(), vectors[0].device
        block = BLOCK if device.type == "cpu" else size
        tensors = [x.to(device) for x in self._tensors]
        blocks = (
            [vectors] if size <= block else zip(*(x.split(block) for x in vectors), strict=True)
        )
        for each in blocks:
            room = self._room(code.buffers, each[0].numel(), device)
            self._sums.append(code.run(each, self._numbers, tensors, room))

    def _room(self, counts: Mapping[torch.dtype, int], size: int, device: torch.device) -> Buffers:
        """So many buffers of so many elements."""
        room: dict[torch.dtype, list[Tensor]] = {}
        for dtype, count in counts.items():
            held = self._buffers.setdefault(dtype, [])
            if len(held) < count or held[0].numel() < size:
                held[:] = [torch.empty(size, dtype=dtype, device=device) for _ in range(count)]
            room[dtype] = held if held[0].numel() == size else [x[:size] for x in held]
        return room


def _total(parts: Sequence[Tensor]) -> Tensor:
    """Of a sum in blocks."""
    dtype = parts[0].dtype
    long = at_least_float32(dtype) if dtype.is_floating_point else dtype
    return torch.stack([*parts]).sum(dtype=long).to(dtype)


__all__ = ["Running"]
