"""A bridge to `higher` (Grefenstette et al. 2019, arXiv:1910.01727): its loops, our rules.

After `register()`, `higher.innerloop_ctx(model, hyperdescent.optim.AdamW(...))` unrolls the rule's
own mathematics, so gradients are exact in every hyperparameter given as `override=`. higher's own
Adam cuts the graph to beta2, its AdamW does not exist. For loops that cannot be a Problem; memory
grows with every step. This module alone knows higher, and imports it only when called.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..inner.core.flat import flat_readout, flat_step, joined_slots, split_slots
from ..inner.core.hyper import Tensors
from ..inner.core.layout import Layout
from ..inner.core.messages import unknown
from ..inner.core.rule import Rule
from ..inner.registry import RULES
from ..inner.torch_form.optimizer import torch_form
from ..inner.torch_form.param_groups import betas_of, check_number, chosen_in, values_in


def register() -> None:
    """Make higher accept the torch form of every registered rule; again does no harm.

    override takes hyperparameters by their own names or, for beta1 and beta2, as "betas"; higher
    wants each in a list, one entry or one per param group.
    """
    higher = _higher()
    for rule in RULES.values():
        higher.register_optim(torch_form(rule), differentiable_form(rule))


def differentiable_form(rule: Rule) -> type:
    """The rule as a subclass of higher's DifferentiableOptimizer."""
    namespace = {
        "rule": rule,
        "_apply_override": _apply_override,
        "step": _step,
        "_update": _update,
        "readout": _readout,
        "__doc__": rule.doc,
        "__module__": __name__,
    }
    base = _higher().optim.DifferentiableOptimizer
    return type(f"Differentiable{rule.title}", (base,), namespace)


def _higher() -> ModuleType:
    with warnings.catch_warnings():
        # higher 0.2.1 compares with `is 1`, which Python says once, when it compiles the file.
        warnings.simplefilter("ignore", SyntaxWarning)
        import higher
    return higher  # type: ignore[no-any-return]  # untyped


# Those with self become methods; self is higher's DifferentiableOptimizer.


def _apply_override(self: Any, override: Mapping[str, Sequence[Any]]) -> None:
    rule: Rule = self.rule
    known = [*rule.hypers, *rule.choices, "betas", "maximize"]
    alone: dict[str, Sequence[Any]] = {}
    for name, entries in override.items():
        if name not in known:
            raise TypeError(unknown(f"{rule.title} has no override", name, known))
        if name == "betas":
            for i, beta in enumerate(betas_of(rule)):
                alone[beta] = [pair[i] for pair in entries]
        else:
            alone[name] = entries
    for name in alone.keys() & rule.hypers.keys():
        for value in alone[name]:
            check_number(rule, name, value)
    # Apart, so that either can be overridden.
    for group in self.param_groups:
        if "betas" in group:
            group.update(zip(betas_of(rule), group.pop("betas"), strict=True))
    _higher().optim.DifferentiableOptimizer._apply_override(self, alone)


def _step(self: Any, loss: Tensor, *args: Any, **given: Any) -> Any:
    """One step on a loss, as higher does it; readout() after the last one."""
    self._loss = loss
    return _higher().optim.DifferentiableOptimizer.step(self, loss, *args, **given)


def _update(self: Any, grouped_grads: list[list[Tensor | None]], **_: object) -> None:
    update = _update_model if self.rule.over == "model" else _update_group
    # Without this, higher's test mode would keep a graph through slots that hold weights.
    with torch.set_grad_enabled(self._track_higher_grads):
        for group, slots, grads in zip(self.param_groups, self.state, grouped_grads, strict=True):
            sign = -1 if group["maximize"] else 1
            signed = [g if g is None else sign * g for g in grads]
            update(chosen_in(self.rule, group), group, slots, signed, sign * self._loss)


def _readout(self: Any) -> list[Tensor]:
    """The weights to use, in the order of the param groups, where the rule trains others."""
    read: list[Tensor] = []
    for group, state in zip(self.param_groups, self.state, strict=True):
        rule, values = chosen_in(self.rule, group), values_in(self.rule, group)
        if rule.over == "model":
            layout = _layout(group)
            p = layout.flatten(dict(zip(layout.names, group["params"], strict=True)))
            slots = _joined(rule, layout, p, group, state, values)
            read += layout.split(flat_readout(rule, layout, p, slots, values))
        else:
            for i, p in enumerate(group["params"]):
                one = Layout.alone(p.shape, _name(group, i))
                unit = p.reshape(one.shapes[0])
                if rule.readout and state[i]:
                    p = rule.readout(unit, state[i], values, one).view_as(p)
                read.append(p)
    return read


def _name(group: dict[str, Any], i: int) -> str:
    names: list[str] = group.get("param_names", [])
    return names[i] if names else str(i)


def _layout(group: dict[str, Any]) -> Layout:
    params = group["params"]
    return Layout.of({_name(group, i): p for i, p in enumerate(params)})


def _update_group(
    rule: Rule,
    group: dict[str, Any],
    state: dict[int, Tensors],
    grads: list[Tensor | None],
    loss: Tensor,
) -> None:
    """One step on one param group, as the torch form does it, but out of place."""
    values, t = values_in(rule, group), group["t"] + 1
    shared = {n: group[n] for n, slot in rule.slots.items() if slot.shared}
    moving = [(i, g) for i, g in enumerate(grads) if g is not None]
    for i, g in moving:
        p = group["params"][i]
        one = Layout.alone(p.shape, _name(group, i))
        unit, g = (x.reshape(one.shapes[0]) for x in (p, g))
        before = {**(state[i] or rule.init(unit, values, one)), **shared}
        stepped, after = rule(unit, g, before, t, values, loss=loss, layout=one)
        group["params"][i] = stepped.view_as(p)
        state[i] = {n: x for n, x in after.items() if n not in shared}
    if moving:
        group.update(t=t, **{n: after[n] for n in shared})


def _update_model(
    rule: Rule,
    group: dict[str, Any],
    state: dict[int, Tensors],
    grads: list[Tensor | None],
    loss: Tensor,
) -> None:
    """The same for a rule that takes a param group as one vector."""
    values, t = values_in(rule, group), group["t"] + 1
    params, layout = group["params"], _layout(group)
    full = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
    p, g = (torch.cat([x.reshape(-1) for x in each]) for each in (params, full))
    slots = _joined(rule, layout, p, group, state, values)
    p, slots = flat_step(rule, layout, p, g, slots, t, values, loss=loss)
    for i, (stepped, grad) in enumerate(zip(layout.split(p), grads, strict=True)):
        if grad is not None:
            params[i] = stepped
    each, whole = split_slots(layout, p, slots)
    state.update(enumerate(each))
    group.update(t=t, **whole)


def _joined(
    rule: Rule,
    layout: Layout,
    p: Tensor,
    group: dict[str, Any],
    state: dict[int, Tensors],
    values: Tensors,
) -> Tensors:
    """The slots of a param group in flat vectors, as a rule over models takes them."""
    each = [state[i] for i in range(len(layout.names))]
    whole = {n: group[n] for n in rule.slots if n in group}
    return joined_slots(rule, layout, p, each, whole, values)


__all__ = ["differentiable_form", "register"]
