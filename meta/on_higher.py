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

from ..inner.hyper import Tensors
from ..inner.optim import betas_of, torch_form
from ..inner.rule import Rule, unknown
from ..inner.rules import RULES


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
        "_update": _update,
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


# These two become methods; self is higher's DifferentiableOptimizer.


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
        for value in map(torch.as_tensor, alone[name]):
            if value.numel() != 1:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; a param group takes one number, so "
                    "give the parameters groups of their own"
                )
            rule.hypers[name].check(name, value.detach())
    _split_betas(self.param_groups, rule)
    _higher().optim.DifferentiableOptimizer._apply_override(self, alone)


def _update(self: Any, grouped_grads: list[list[Tensor | None]], **_: object) -> None:
    _split_betas(self.param_groups, self.rule)
    # Without this, higher's test mode would keep a graph through slots that hold weights.
    with torch.set_grad_enabled(self._track_higher_grads):
        for group, slots, grads in zip(self.param_groups, self.state, grouped_grads, strict=True):
            _update_group(self.rule, group, slots, grads)


def _update_group(
    rule: Rule, group: dict[str, Any], state: dict[int, Tensors], grads: list[Tensor | None]
) -> None:
    """One step on one param group, as the torch form does it, but out of place."""
    rule = rule.choose(**{name: group[name] for name in rule.choices})
    values = {n: torch.as_tensor(group[n], dtype=torch.float64).reshape(()) for n in rule.hypers}
    shared = {n: group[n] for n, slot in rule.slots.items() if slot.shared}
    moving = [(i, g) for i, g in enumerate(grads) if g is not None]
    t = group["t"] + 1
    for i, g in moving:
        p = group["params"][i]
        # A number is shown to rules as a vector of one, as in the torch form.
        unit, g = (x.reshape(x.shape or (1,)) for x in (p, -g if group["maximize"] else g))
        before = {**(state[i] or rule.init(unit, values)), **shared}
        stepped, after = rule(unit, g, before, t, values)
        group["params"][i] = stepped.view_as(p)
        state[i] = {n: x for n, x in after.items() if n not in shared}
    if moving:
        group.update(t=t, **{n: after[n] for n in shared})


def _split_betas(groups: list[dict[str, Any]], rule: Rule) -> None:
    """Keep beta1 and beta2 apart, so that either can be overridden."""
    for group in groups:
        if "betas" in group:
            group.update(zip(betas_of(rule), group.pop("betas"), strict=True))


__all__ = ["differentiable_form", "register"]
