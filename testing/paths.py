"""Paths of a rule along gradients that depend on the weights, flat and in its torch form."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..inner.core.flat import flat_readout, flat_step, initial_slots
from ..inner.core.hyper import Granularity, Tensors
from ..inner.core.layout import Layout
from ..inner.core.rule import Rule
from ..inner.torch_form.param_groups import betas_of
from .points import allowed, applies, sloped, telling

F64 = torch.float64
# Large enough that a wrong slope in any of them shows in the path; others take the middle of
# their search range.
_COMMON = {
    "lr": 0.1,
    "beta1": 0.8,
    "beta2": 0.9,
    "eps": 0.05,
    "weight_decay": 0.1,
    "momentum": 0.7,
    "dampening": 0.3,
    "alpha": 0.9,
}
LAYOUT = Layout.of(
    {"matrix": torch.zeros(3, 2), "vector": torch.zeros(2), "scalar": torch.zeros(())}
)
SIZE = sum(LAYOUT.sizes)
SHAPES: dict[Granularity, tuple[int, ...]] = {"shared": (), "tensor": (3,), "element": (SIZE,)}
STEPS = 8  # RAdam's adaptive step begins at the sixth for beta2 = 0.9.
Values = Mapping[str, float]


def point(
    rule: Rule, values: Values, granularity: Granularity = "shared", **changed: float
) -> Tensors:
    """A value of every hyperparameter where each of them matters; values: numbers known to."""
    numbers = telling(rule, {**_COMMON, **values}) | changed
    return defaults(rule) | {
        name: torch.full(SHAPES[allowed(rule.hypers[name], granularity)], number, dtype=F64)
        for name, number in numbers.items()
        if name in rule.hypers
    }


def defaults(rule: Rule) -> Tensors:
    return {name: torch.tensor(h.default, dtype=F64) for name, h in rule.hypers.items()}


def noise(seed: int, shape: Sequence[int], dtype: torch.dtype = F64) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=draw, dtype=F64).to(dtype)


def loss_of(p: Tensor, drift: Tensor) -> Tensor:
    """Positive, with the gradient sin(p) + drift."""
    return (1 - torch.cos(p)).sum() + (drift * p).sum() + 20


def path(
    rule: Rule,
    values: Tensors,
    *,
    alive: Tensor | float = 1.0,
    dtype: torch.dtype = F64,
    steps: int = STEPS,
) -> tuple[Tensor, Tensors]:
    """The flat weights and slots after some steps along a gradient that depends on the weights."""
    p = noise(0, (SIZE,), dtype)
    s = initial_slots(rule, LAYOUT, p, values)
    for step in range(1, steps + 1):
        drift = noise(step, (SIZE,), dtype)
        g, loss = alive * (torch.sin(p) + drift), loss_of(p, drift)
        t = torch.tensor(step, dtype=F64)
        p, s = flat_step(rule, LAYOUT, p, g, s, t, values, loss=loss)
    return p, s


def free_path(rule: Rule, fixed: Tensors, names: Sequence[str], *free: Tensor) -> Tensor:
    """Where a path ends, the weights trained and those to use, from unconstrained coordinates."""
    moved = {n: rule.hypers[n].value(z) for n, z in zip(names, free, strict=True)}
    p, s = path(rule, fixed | moved)
    if rule.readout:
        return torch.cat([p, flat_readout(rule, LAYOUT, p, s, fixed | moved)])
    return p


def free_point(
    rule: Rule, values: Values, granularity: Granularity = "shared", *, rough: bool = False
) -> tuple[Tensors, list[str], list[Tensor]]:
    """The values of a point, and of those that have a derivative (rough: of all) the names and the
    unconstrained coordinates.
    """
    at = point(rule, values, granularity)
    names = [n for n, h in rule.hypers.items() if applies(rule, h)] if rough else sloped(rule)
    free = []
    for n in names:
        spread = 1 + 0.1 * noise(99, SHAPES[allowed(rule.hypers[n], granularity)])
        free.append((rule.hypers[n].free(at[n]) * spread).requires_grad_())
    return at, names, free


def parameters(dtype: torch.dtype = F64) -> list[torch.nn.Parameter]:
    shapes: list[tuple[int, ...]] = [(3, 4), (5,), (), (2, 3, 2, 2)]
    return [torch.nn.Parameter(noise(i, shape, dtype)) for i, shape in enumerate(shapes)]


def descend(optimizers: Sequence[torch.optim.Optimizer], steps: int, start: int = 0) -> None:
    """Steps of optimizers side by side, each along its own weights."""
    for step in range(start, start + steps):
        for optimizer in optimizers:
            losses = []
            for i, p in enumerate(weights(optimizer)):
                drift = noise(1000 * step + i, p.shape, p.dtype)
                losses.append(loss_of(p, drift))
                _set_gradient(optimizer, i, torch.sin(p) + drift)
            if "loss" in inspect.signature(optimizer.step).parameters:
                optimizer.step(loss=sum(losses[1:], losses[0]))  # type: ignore[call-overload]
            else:
                optimizer.step()


def _set_gradient(optimizer: torch.optim.Optimizer, i: int, g: Tensor) -> None:
    [p for group in optimizer.param_groups for p in group["params"]][i].grad = g


def weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


def grouped(rule: Rule, values: Tensors) -> dict[str, object]:
    """Hyperparameters as torch.optim takes them."""
    given: dict[str, object] = {n: float(v) for n, v in values.items()}
    if betas := betas_of(rule):
        given["betas"] = tuple(given.pop(name) for name in betas)
    return given


__all__ = [
    "F64",
    "LAYOUT",
    "SHAPES",
    "SIZE",
    "STEPS",
    "Values",
    "defaults",
    "descend",
    "free_path",
    "free_point",
    "grouped",
    "loss_of",
    "noise",
    "parameters",
    "path",
    "point",
    "weights",
]
