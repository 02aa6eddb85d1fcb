"""Sums with products in them as one kernel each, as torch.optim has them: one rounding less."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from .simplify import Number, Step, alike, aten

# The step that makes an operand by one of these kernels and for one reader alone.
Once = Callable[..., Step | None]


def fuse(steps: list[Step], ends: set[fx.Node], numbers: Mapping[int, fx.Node]) -> list[Step]:
    """Sums that do products and quotients of theirs themselves, where nobody else reads them.
    numbers: by place.
    """
    readers: dict[fx.Node, int] = {}
    for step in steps:
        for n in step.reads:
            # Twice by one step is not once.
            readers[n] = readers.get(n, 0) + sum(a is n for a in step.args)
    made = {step.node: step for step in steps}
    gone: set[fx.Node] = set()

    def once(a: Any, *kernels: Callable[..., Tensor]) -> Step | None:
        step = made.get(a) if isinstance(a, fx.Node) else None
        mine = step and step.kernel in kernels and not step.kwargs
        return step if mine and readers[a] == 1 and a not in ends else None

    for step in steps:
        if step.kernel not in (torch.add, torch.sub) or step.kwargs:
            continue
        orders = [step.args, step.args[::-1]] if step.kernel is torch.add else [step.args]
        # Those that spare two kernels first.
        ways = (partial(_average, numbers=numbers), _add_product, _add_quotient, _add_multiple)
        any(way(step, a, b, once, gone) for way in ways for a, b in orders)
    return [step for step in steps if step.node not in gone]


def _average(
    step: Step, a: Any, b: Any, once: Once, gone: set[fx.Node], *, numbers: Mapping[int, fx.Node]
) -> bool:
    """(1 - share) * x + share * y, and x + share * (y - x), in one kernel."""
    share, y = _scaled(once(b, torch.mul))
    if share is None or step.kernel is not torch.add or not alike(step, a, b, y):
        return False
    kept, x = _scaled(once(a, torch.mul))
    whole = kept is not None and _make_one(numbers[share.place], numbers[kept.place])
    difference = once(y, torch.sub)
    if whole and alike(step, x):
        gone.update((a, b))
    elif difference is not None and difference.args[1] is a and alike(step, difference.args[0]):
        gone.update((b, y))
        x, y = a, difference.args[0]
    else:
        return False
    step.kernel, step.args = torch.lerp, (x, y, share)
    return True


def _make_one(a: fx.Node, b: fx.Node) -> bool:
    """Whether two numbers make 1, as the trace tells."""
    pairs = ((a, b), (b, a))
    return any(x.target is aten.rsub.Scalar and x.args == (y, 1) for x, y in pairs)


def _add_product(step: Step, a: Any, b: Any, once: Once, gone: set[fx.Node]) -> bool:
    """a + (number * x) * y in one kernel."""
    outer = once(b, torch.mul)
    if outer is None or not alike(step, a, *outer.args):
        return False
    for x, y in (outer.args, outer.args[::-1]):
        number, z = _scaled(once(x, torch.mul))
        if number is not None and alike(step, z):
            value = replace(number, minus=step.kernel is torch.sub)
            step.kernel, step.args, step.kwargs = torch.addcmul, (a, z, y), {"value": value}
            gone.update((b, x))
            return True
    return False


def _add_quotient(step: Step, a: Any, b: Any, once: Once, gone: set[fx.Node]) -> bool:
    """a + number * (x / y) in one kernel, and so if x is divided by another number."""
    number, x = _scaled(once(b, torch.mul))
    inner = once(x, torch.div)
    if number is None or inner is None or not alike(step, a, b, *inner.args):
        return False
    above, below = inner.args
    gone.update((b, x))
    if (divided := once(above, torch.div)) is not None:
        x, by = divided.args
        if isinstance(by, Number) and alike(step, x):
            gone.add(above)
            above, number = x, replace(number, over=by.place)
    value = replace(number, minus=step.kernel is torch.sub)
    step.kernel, step.args, step.kwargs = torch.addcdiv, (a, above, below), {"value": value}
    return True


def _add_multiple(step: Step, a: Any, b: Any, once: Once, gone: set[fx.Node]) -> bool:
    """a + number * x in one kernel."""
    number, x = _scaled(once(b, torch.mul))
    if number is None or not alike(step, a, b, x):
        return False
    gone.add(b)
    step.args, step.kwargs = (a, x), {"alpha": number}
    return True


def _scaled(product: Step | None) -> tuple[Number | None, Any]:
    """(number, vector) of a product of the two; no number otherwise."""
    args = product.args if product is not None else ()
    for number, x in zip(args, args[::-1], strict=True):
        if isinstance(number, Number) and isinstance(x, fx.Node):
            return number, x
    return None, None


__all__ = ["fuse"]
