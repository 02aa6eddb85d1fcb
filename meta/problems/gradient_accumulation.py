"""Gradient accumulation: a batch in parts, and the graph of one part at a time, there and back.

torch.utils.checkpoint would not do: it makes a part's graph anew on the way back, but the graph of
that way, which a metagradient needs, then holds all parts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...inner.core.hyper import Tensors
from ...inner.numerics.pullback import vjp
from ...inner.torch_internals import only_reverse_mode
from .data import Batch, each_tensor
from .seeding import generators_of, preserve_rng

Loss = Callable[[Tensors, Tensors, Tensors, Batch], tuple[Tensor, Tensors]]


def mean_loss(
    loss_of: Loss, params: Tensors, buffers: Tensors, hypers: Tensors, batch: Batch, parts: int
) -> tuple[Tensor, Tensors]:
    """The mean of the parts' losses, and the buffers after the last of them.

    Every way back does the parts' losses again: its memory is that of one. Not so under torch.func,
    forward mode and tracing, where all are one graph.
    """
    if parts == 1:
        return loss_of(params, buffers, hypers, batch)
    mean: Tensor | float = 0.0
    for part in _divided(batch, parts):
        loss, buffers = _apart(loss_of, params, buffers, hypers, part)
        mean = mean + loss / parts
    return mean, buffers  # type: ignore[return-value]  # there are parts


def _divided(batch: Batch, parts: int) -> list[Batch]:
    inputs, target = batch
    columns = [*((inputs,) if isinstance(inputs, Tensor) else inputs), target]
    odd = [len(x) for x in columns if len(x) % parts or not len(x)]
    if odd:
        raise ValueError(
            f"a batch of {odd[0]} examples cannot be divided by accumulate={parts}; make batches "
            "that can, all of one size"
        )
    rows = zip(*(x.split(len(x) // parts) for x in columns), strict=True)
    return [(x[0] if isinstance(inputs, Tensor) else tuple(x), y) for *x, y in rows]


def _apart(
    loss_of: Loss, params: Tensors, buffers: Tensors, hypers: Tensors, part: Batch
) -> tuple[Tensor, Tensors]:
    """loss_of, without keeping its graph."""
    everything = [x for part in (params, buffers, hypers) for x in part.values()]
    live = [k for k, x in enumerate(everything) if x.requires_grad]
    if not live or not torch.is_grad_enabled() or not _plain(everything):
        return loss_of(params, buffers, hypers, part)
    names: list[str] = []
    outside = params, buffers, hypers

    def flat(*given: Tensor) -> tuple[Tensor, ...]:
        inside = dict(zip(live, given, strict=True))
        every = (inside.get(k, x) for k, x in enumerate(everything))
        params, buffers, hypers = ({n: next(every) for n in part} for part in outside)
        # A model may write into its inputs, and they are read again.
        loss, after = loss_of(params, buffers, hypers, each_tensor(part, Tensor.clone))
        # What no step replaces stays the same object, and is no output.
        names[:] = [n for n, x in after.items() if x is not buffers.get(n)]
        return loss, *(after[n] for n in names)

    again = _Again(flat, everything[0].device)
    loss, *after = _There.apply(  # type: ignore[no-untyped-call]  # torch's own
        again, *(everything[k] for k in live)
    )
    return loss, {**buffers, **dict(zip(names, after, strict=True))}


def _plain(tensors: Sequence[Tensor]) -> bool:
    """Whether only reverse mode looks on."""
    return all(type(x) in (Tensor, nn.Parameter) for x in tensors) and only_reverse_mode()


class _Again:
    """A function that draws the same random numbers whenever it is called."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], device: torch.device) -> None:
        self._function = function
        self._states = [(g, g.get_state()) for g in generators_of(device)]
        self._called = False

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if not self._called:
            self._called = True
            return self._function(*tensors)
        with preserve_rng(g for g, _ in self._states):
            for generator, state in self._states:
                generator.set_state(state)
            return self._function(*tensors)


class _There(torch.autograd.Function):
    """again(*tensors), of which only the inputs are kept."""

    @staticmethod
    def forward(ctx: Any, again: _Again, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.again = again
        ctx.save_for_backward(*tensors)
        # With a graph all the same: a loss may differentiate inside.
        with torch.enable_grad(), _unseen():
            return tuple(x.detach() for x in again(*_leaves(tensors)))

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> Any:
        back = _Back.apply(  # type: ignore[no-untyped-call]  # torch's own
            ctx.again, len(bars), *bars, *ctx.saved_tensors
        )
        return None, *back


class _Back(torch.autograd.Function):
    """The pullback of again at tensors, of which only the inputs are kept."""

    @staticmethod
    def forward(ctx: Any, again: _Again, many: int, *flat: Tensor) -> tuple[Tensor, ...]:
        ctx.again, ctx.many = again, many
        ctx.save_for_backward(*flat)
        with torch.enable_grad(), _unseen():
            leaves = _leaves(flat[many:])
            return _pulled(again(*leaves), flat[:many], leaves, graph=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *bars: Tensor) -> Any:
        with torch.enable_grad():
            flat = _leaves(ctx.saved_tensors)
            around, leaves = flat[: ctx.many], flat[ctx.many :]
            grads = _pulled(ctx.again(*leaves), around, leaves, graph=True)
        return None, None, *_pulled(grads, bars, flat, graph=False)


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]


@contextmanager
def _unseen() -> Iterator[None]:
    """For graphs that are gone at the end: whoever measures graphs need not count these."""
    kept: list[Tensor] = []

    def pack(x: Tensor) -> int:
        # Not x itself: a node that holds its own output is never freed.
        kept.append(x)
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, kept.__getitem__):
        yield
    kept.clear()


def _pulled(
    outputs: Sequence[Tensor], bars: Sequence[Tensor], inputs: Sequence[Tensor], *, graph: bool
) -> tuple[Tensor, ...]:
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(vjp(outputs, wanted, bars, keep=False, graph=graph))
    return tuple(next(found) if x.requires_grad else None for x in inputs)  # type: ignore[misc]


__all__ = ["mean_loss"]
