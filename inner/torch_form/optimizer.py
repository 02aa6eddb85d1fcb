"""Every registered rule as a drop-in torch.optim.Optimizer, such as `optim.AdamW`.

The classes are made from the rules on first use. How a step changes weights where they are is in
step.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Signature
from operator import is_
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..core.hyper import Tensors
from ..core.layout import Layout
from ..core.messages import unknown
from ..core.rule import Rule
from ..registry import RULES, find_rule
from .buckets import Bucket, StepConfig, buckets
from .param_groups import (
    betas_of,
    check_group,
    chosen_in,
    defaults_of,
    doc_of,
    grouped,
    signature_of,
    values_in,
)
from .step import STEPS, GroupStep

# Where a state_dict has the trained weights, if others are in use.
_TRAINED = "trained"


@dataclass(frozen=True)
class _Gathered:
    """A group's parameters, which of them moved in a step, and in which buckets."""

    params: list[Tensor]
    moving: list[bool]
    buckets: list[Bucket]

    def still(self, params: list[Tensor], moving: list[bool]) -> bool:
        same = len(params) == len(self.params) and all(map(is_, params, self.params))
        return same and moving == self.moving


class RuleOptimizer(torch.optim.Optimizer):
    """A rule applied in place to param groups; made by `torch_form`."""

    rule: ClassVar[Rule]
    config: ClassVar[StepConfig] = StepConfig()
    __signature__: ClassVar[Signature]
    # Whether a state_dict holds the slots; the trained weights while others are used.
    _lent: bool
    _evaluating: dict[Tensor, Tensor]
    # Of each group the parameters as the rule takes them, but only those of the last step, because
    # they hold the memory of slots.
    _gathered: dict[int, _Gathered]
    # Whether steps are compiled, and what users were told of those that are not.
    _compile: bool
    _told: set[str]

    def __setstate__(self, state: dict[str, object]) -> None:
        own = {"_lent": False, "_evaluating": {}, "_gathered": {}, "_told": set()}
        super().__setstate__({**own, "_compile": False, **state})

    def __reduce__(self) -> tuple[object, ...]:
        # By the rule: a class that was made of composed rules is no attribute of a module.
        own = {n: getattr(self, n) for n in ("_lent", "_evaluating", "_compile")}
        return _blank, (self.rule,), {**self.__getstate__(), **own}

    def __init__(self, params: ParamsT, *args: object, **given: object) -> None:
        for name in given:
            if name not in self.__signature__.parameters:
                known = [n for n in self.__signature__.parameters if n != "params"]
                raise TypeError(unknown(f"{type(self).__name__} has no argument", name, known))
        bound = self.__signature__.bind(params, *args, **given).arguments
        del bound["params"]
        self._lent, self._evaluating, self._gathered = False, {}, {}
        self._compile, self._told = bool(bound.pop("compile", False)), set()
        super().__init__(params, grouped(self.rule, bound, defaults_of(self.rule)))

    def add_param_group(self, param_group: dict[str, object]) -> None:
        """Add a group; it may set any argument, and may carry further keys, which are ignored."""
        title = type(self).__name__
        near = [*defaults_of(self.rule), *betas_of(self.rule)]
        for name in param_group:
            # Groups may be tagged freely, but a misspelt argument would silently do nothing.
            close = difflib.get_close_matches(name, near, n=1, cutoff=0.85)
            if name not in near and close:
                raise TypeError(unknown(f"{title} has no group argument", name, near))
        group = grouped(self.rule, param_group, self.defaults)
        check_group(self.rule, group)
        rule, values, one = *_of_group(self.rule, group), torch.zeros(1)
        for name, slot in self.rule.slots.items():
            if slot.shared:
                group[name] = rule.begin(name, one, values, Layout.alone(one.shape))
        super().add_param_group({**group, "t": torch.zeros((), dtype=torch.float64)})
        added = self.param_groups[-1]
        for i, p in enumerate(added["params"]):
            if p.is_complex():
                self.param_groups.pop()
                raise ValueError(
                    f"{title} takes real parameters, and {_called(added, i)} is {p.dtype}; "
                    "optimize torch.view_as_real of it"
                )

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Load what `state_dict` of this class returned; what follows is bit-identical."""
        groups = state_dict["param_groups"]
        if not isinstance(groups, list) or not all("t" in group for group in groups):
            raise ValueError(
                f"this state_dict was not written by hyperdescent's {type(self).__name__}: its "
                "param groups hold no step counter 't'"
            )
        slots = self.rule.slots
        foreign = {n for own in state_dict["state"].values() for n in own if n not in slots}  # type: ignore[attr-defined]  # torch keeps a dict there
        if foreign:
            raise ValueError(
                f"this state_dict is not one of {type(self).__name__}, which has no slot "
                f"{', '.join(sorted(foreign))}; it has {', '.join(slots) or 'none'}"
            )
        given: dict[str, Any] = {}  # As it is after the hooks that users may have on loading.
        last = self.register_load_state_dict_pre_hook(lambda _, loaded: given.update(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        order = [p for group in self.param_groups for p in group["params"]]
        for i, own in given["state"].items():
            # torch would give slots the dtype of the weights; some are kept in a longer one.
            kept = _slot_types(self.rule, order[i])
            self.state[order[i]] = {
                n: x.to(order[i].device, kept.get(n), copy=True) for n, x in own.items()
            }
        for group in self.param_groups:
            for name in slots.keys() & group.keys():
                if not slots[name].shared and isinstance(group[name], Tensor):
                    group[name] = group[name].to(group["params"][0].device)
        for i, trained in given.get(_TRAINED, {}).items():
            self._evaluating[order[i]] = trained.to(order[i].device, copy=True)

    def state_dict(self) -> dict[str, Any]:
        """A snapshot: later steps do not change it. One taken between `eval` and `train` holds the
        weights that are trained, and `train` is due after loading it too.
        """
        self._lent = True
        packed: dict[str, Any] = super().state_dict()
        for group in packed["param_groups"]:
            # Schedulers write into a rate that is a tensor.
            given = {n: x for n, x in group.items() if n in self.rule.hypers}
            group.update({n: x.clone() for n, x in given.items() if isinstance(x, Tensor)})
        if self._evaluating:
            order = [p for group in self.param_groups for p in group["params"]]
            number = {p: i for i, p in enumerate(order)}
            packed[_TRAINED] = {number[p]: x.clone() for p, x in self._evaluating.items()}
        return packed

    def step(  # type: ignore[override]  # torch's overloads say the same
        self,
        closure: Callable[[], float] | None = None,
        *,
        loss: float | Tensor | None = None,
    ) -> float | Tensor | None:
        """One step on every parameter that has a gradient; the closure's loss is returned.

        loss: the value that the gradients are of, for rules that need it where there is no closure.
        """
        if self._evaluating:
            raise RuntimeError(f"call {type(self).__name__}.train() before the next step")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if "loss" in self.rule.needs and loss is None:
            raise ValueError(
                f"{type(self).__name__} needs the loss: call step(closure), or step(loss=loss) "
                "after loss.backward()"
            )
        gradients = [_gradients(group, type(self).__name__) for group in self.param_groups]
        if self._lent:
            for p, slots in self.state.items():
                self.state[p] = {n: x.clone() for n, x in slots.items()}
            self._lent = False
        with torch.no_grad():
            value = None if loss is None else _number(loss)
            for i, (group, grads) in enumerate(zip(self.param_groups, gradients, strict=True)):
                self._step_group(i, group, grads, value)
        return loss if closure is not None else None

    def _step_group(
        self,
        at: int,
        group: dict[str, Any],
        grads: list[Tensor | None],
        loss: Tensor | None,
    ) -> None:
        params, moving = group["params"], [g is not None for g in grads]
        if not any(moving):
            return
        if group["maximize"]:
            grads = [g if g is None else -g for g in grads]
            loss = None if loss is None else -loss
        t = torch.as_tensor(group["t"], dtype=torch.float64) + 1
        before = self._gathered.get(at)
        if before is None or not before.still(params, moving):
            # Groups may have been taken out.
            self._gathered = {i: x for i, x in self._gathered.items() if i < len(self.param_groups)}
            made = _buckets_of(self.rule, group, moving, self.config)
            self._gathered[at] = _Gathered([*params], moving, made)
        step = self._group_step(group, t, loss)
        shared = step.shared
        for bucket in self._gathered[at].buckets:
            shared = step(bucket, [grads[i] for i in bucket.at], self.state)
        group.update(t=t, **shared)

    def _group_step(
        self, group: Mapping[str, Any], t: Tensor | None = None, loss: Tensor | None = None
    ) -> GroupStep:
        rule, values = _of_group(self.rule, group)
        # Slots of a whole model, too, are kept by the group, from its first step on.
        kept = {n: x for n, x in group.items() if n in rule.slots and isinstance(x, Tensor)}
        return STEPS[rule.over](
            rule, values, kept, self.config, t, loss, compiled=self._compile, told=self._told
        )

    @torch.no_grad()
    def eval(self) -> None:
        """Give the parameters the weights to use, where the rule trains others: averages, or those
        before a prediction. Before evaluating or saving a model; `train` takes them back.
        """
        if self.rule.readout is None or self._evaluating:
            return
        for group in self.param_groups:
            step = self._group_step(group)
            begun = [bool(self.state.get(p)) for p in group["params"]]
            made = _buckets_of(self.rule, group, begun, self.config) if any(begun) else []
            for bucket in made:
                for p, read in zip(bucket.params, step.readout(bucket, self.state), strict=True):
                    self._evaluating[p] = p.clone()
                    p.copy_(read)

    @torch.no_grad()
    def train(self) -> None:
        """Give the parameters the weights that are trained back, after `eval`."""
        for p, trained in self._evaluating.items():
            p.copy_(trained)
        self._evaluating.clear()


# Of equal rules, for as long as there is a use of it.
_FORMS: WeakValueDictionary[Rule, type[RuleOptimizer]] = WeakValueDictionary()


def torch_form(rule: str | Rule) -> type[RuleOptimizer]:
    """The rule, or the one of this name, such as "clip_norm(adamw)", as a torch.optim.Optimizer
    class; its options in force become the defaults.

    The same class for equal rules. Optimizers can be pickled, their class only if its rule is a
    registered one.
    """
    rule = find_rule(rule)
    form = _FORMS.get(rule)
    if form is None:
        form = _FORMS[rule] = _build(rule)
    return form


def _build(rule: Rule) -> type[RuleOptimizer]:
    namespace = {
        "rule": rule,
        "__doc__": doc_of(rule),
        "__module__": __name__,
        "__qualname__": rule.title,
        "__signature__": signature_of(rule),
    }
    return type(rule.title, (RuleOptimizer,), namespace)


def _of_group(rule: Rule, group: Mapping[str, object]) -> tuple[Rule, Tensors]:
    """The rule with a group's options, and its hypers."""
    return chosen_in(rule, group), {n: x.detach() for n, x in values_in(rule, group).items()}


def _buckets_of(
    rule: Rule, group: Mapping[str, Any], moving: Sequence[bool], config: StepConfig
) -> list[Bucket]:
    """The parameters that move, or all of a group where the rule takes them as one."""
    params: list[Tensor] = group["params"]
    names: Sequence[str] = group.get("param_names", [""] * len(params))
    return list(buckets(rule, params, names, moving, config))


def _gradients(group: Mapping[str, Any], title: str) -> list[Tensor | None]:
    grads = [p.grad for p in group["params"]]
    layouts = [torch.strided if g is None else g.layout for g in grads]
    if {*layouts} - {torch.strided}:
        at = next(i for i, layout in enumerate(layouts) if layout != torch.strided)
        raise RuntimeError(
            f"{title} does not support sparse gradients, such as that of {_called(group, at)}; "
            "build the layer that made it with sparse=False"
        )
    return grads


def _called(group: Mapping[str, Any], i: int) -> str:
    """A parameter, as users know it."""
    name = group["param_names"][i] if "param_names" in group else f"number {i}"
    return f"parameter {name} of its group"


def _slot_types(rule: Rule, p: Tensor) -> dict[str, torch.dtype]:
    """Those of a parameter's slots, where they depend on its own alone."""
    if rule.over != "element":
        return {}
    begun = rule.init(p.detach().new_zeros(1), rule.values())
    return {n: x.dtype for n, x in begun.items()}


def _number(loss: float | Tensor) -> Tensor:
    dtype = None if isinstance(loss, Tensor) else torch.float64
    return torch.as_tensor(loss, dtype=dtype).detach().reshape(())


def _blank(rule: Rule) -> RuleOptimizer:
    form = torch_form(rule)
    return form.__new__(form)


def __getattr__(name: str) -> type[RuleOptimizer]:
    for rule in RULES.values():
        if rule.title == name:
            return torch_form(rule)
    raise AttributeError(
        unknown(f"module {__name__!r} has no optimizer", name, (r.title for r in RULES.values()))
    )


def __dir__() -> list[str]:
    return sorted([*globals(), *(rule.title for rule in RULES.values())])
