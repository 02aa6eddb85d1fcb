"""Every registered rule as a drop-in torch.optim.Optimizer, such as `optim.AdamW`.

The classes are made from the rules on first use. This is the only in-place code: the step calls
the rule and copies its answer into the weights.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from functools import cache
from inspect import Parameter, Signature
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .hyper import Hyper, Tensors
from .rule import Rule, unknown
from .rules import RULES

_ABOUT_GROUPS = """\
Hyperparameters are read from the param groups at every step, so that schedulers and edits of
group["lr"] or group["betas"] act; numbers and one-element tensors both do. Slots have the dtype of
the weights, and a parameter whose gradient is None is left alone.

The step counter belongs to the param group: it counts the steps in which any parameter of the
group had a gradient. A parameter whose first gradient comes later has the averages of gradients
that were zero until then; torch.optim would count its steps from its first. To start its count at
1, add it as a group of its own."""


class RuleOptimizer(torch.optim.Optimizer):
    """A rule applied in place to param groups; made by `torch_form`."""

    rule: ClassVar[Rule]
    __signature__: ClassVar[Signature]

    def __init__(self, params: ParamsT, *args: object, **given: object) -> None:
        for name in given:
            if name not in self.__signature__.parameters:
                known = [n for n in self.__signature__.parameters if n != "params"]
                raise TypeError(unknown(f"{type(self).__name__} has no argument", name, known))
        bound = self.__signature__.bind(params, *args, **given).arguments
        del bound["params"]
        super().__init__(params, self._grouped(bound, _defaults(self.rule)))

    def add_param_group(self, param_group: dict[str, object]) -> None:
        """Add a group; it may set any argument, and may carry further keys, which are ignored."""
        title = type(self).__name__
        near = [*_defaults(self.rule), *betas_of(self.rule)]
        for name in param_group:
            # Groups may be tagged freely, but a misspelt argument would silently do nothing.
            close = difflib.get_close_matches(name, near, n=1, cutoff=0.85)
            if name not in near and close:
                raise TypeError(unknown(f"{title} has no group argument", name, near))
        group = self._grouped(param_group, self.defaults)
        self._check(group)
        slots = self.rule.init(torch.zeros(1), self._values(group))
        group |= {n: slots[n] for n, slot in self.rule.slots.items() if slot.shared}
        super().add_param_group({**group, "t": torch.zeros((), dtype=torch.float64)})
        added = self.param_groups[-1]
        for i, p in enumerate(added["params"]):
            if p.is_complex():
                name = added["param_names"][i] if "param_names" in added else f"number {i}"
                self.param_groups.pop()
                raise ValueError(
                    f"{title} takes real parameters, and parameter {name} of its group is "
                    f"{p.dtype}; optimize torch.view_as_real of it"
                )

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Load what `state_dict` of this class returned; what follows is bit-identical."""
        groups = state_dict["param_groups"]
        if not isinstance(groups, list) or not all("t" in group for group in groups):
            raise ValueError(
                f"this state_dict was not written by hyperdescent's {type(self).__name__}: its "
                "param groups hold no step counter 't'"
            )
        super().load_state_dict(state_dict)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch's overloads say the same
        """One step on every parameter that has a gradient; the closure's loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, object]) -> None:
        params: list[Tensor] = group["params"]  # type: ignore[assignment]  # torch keeps a list there
        moving = [(p, self._dense(p.grad)) for p in params if p.grad is not None]
        if not moving:
            return
        rule = self.rule.choose(**{name: group[name] for name in self.rule.choices})
        values = self._values(group)
        shared = {n: group[n] for n, slot in rule.slots.items() if slot.shared}
        t = torch.as_tensor(group["t"]) + 1
        for p, grad in moving:
            unit, g = _unit(p), _unit(-grad if group["maximize"] else grad)
            slots = {**(self.state[p] or rule.init(unit, values)), **shared}
            stepped, slots = rule(unit, g, slots, t, values)
            p.copy_(stepped.view_as(p))
            self.state[p] = {n: x for n, x in slots.items() if n not in shared}
        group.update(t=t, **{n: slots[n] for n in shared})

    def _dense(self, g: Tensor) -> Tensor:
        if g.layout != torch.strided:
            raise RuntimeError(
                f"{type(self).__name__} does not support sparse gradients; build the layer that "
                "made them with sparse=False"
            )
        return g

    def _grouped(
        self, given: Mapping[str, object], defaults: Mapping[str, object]
    ) -> dict[str, object]:
        """The arguments of one group, with beta1, beta2, ... kept as torch's tuple betas."""
        group = {**defaults, **given}
        betas = betas_of(self.rule)
        if betas:
            alone = {i: group.pop(name) for i, name in enumerate(betas) if name in given}
            if alone and "betas" in given:
                both = f"betas and {betas[min(alone)]}"
                raise TypeError(f"{type(self).__name__} got {both}; give one of the two")
            pair = group["betas"]
            if not isinstance(pair, tuple | list) or len(pair) != len(betas):
                raise ValueError(f"betas={pair!r} is not a tuple ({', '.join(betas)})")
            group["betas"] = tuple(alone.get(i, beta) for i, beta in enumerate(pair))
        return group

    def _given(self, group: Mapping[str, object]) -> dict[str, object]:
        """Every hyperparameter of a group under its own name."""
        betas = dict(zip(betas_of(self.rule), group.get("betas", ()), strict=True))  # type: ignore[call-overload]  # a tuple by now
        return {name: betas[name] if name in betas else group[name] for name in self.rule.hypers}

    def _values(self, group: Mapping[str, object]) -> Tensors:
        given = self._given(group).items()
        return {n: torch.as_tensor(v, dtype=torch.float64).detach().reshape(()) for n, v in given}

    def _check(self, group: Mapping[str, object]) -> None:
        """Raise unless the values of a group are legal, alone and together."""
        given = self._given(group)
        for name, value in given.items():
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; a param group takes one number, so "
                    "give the parameters groups of their own"
                )
            if not isinstance(value, Real | Tensor):
                raise TypeError(f"{name}={value!r} is not a number")
            number = value if isinstance(value, Tensor) else float(value)
            self.rule.hypers[name].check(name, number)
        options = {name: group[name] for name in self.rule.choices}
        self.rule.choose(**options).complain(given)


def torch_form(rule: Rule) -> type[RuleOptimizer]:
    """The rule as a torch.optim.Optimizer class; its options in force become the defaults.

    The same class each time for a registered rule, and only those can be pickled.
    """
    return _registered(rule.name) if RULES.get(rule.name) is rule else _build(rule)


@cache
def _registered(name: str) -> type[RuleOptimizer]:
    return _build(RULES[name])


def _build(rule: Rule) -> type[RuleOptimizer]:
    namespace = {
        "rule": rule,
        "__doc__": _doc(rule),
        "__module__": __name__,
        "__qualname__": rule.title,
        "__signature__": _signature(rule),
    }
    return type(rule.title, (RuleOptimizer,), namespace)


def _unit(x: Tensor) -> Tensor:
    # A number is shown to rules as a vector of one: 0-dim weights would take the float64 of hypers.
    return x.view(1) if x.ndim == 0 else x


def betas_of(rule: Rule) -> tuple[str, ...]:
    """The hyperparameters kept as torch's tuple `betas`; none where there is only one beta."""
    names = tuple(name for name in rule.hypers if re.fullmatch(r"beta\d", name))
    return names if len(names) > 1 else ()


def _defaults(rule: Rule) -> dict[str, object]:
    """What the param groups hold where nothing is given, in torch.optim's order of arguments."""
    betas = betas_of(rule)
    defaults: dict[str, object] = {}
    for name, hyper in rule.hypers.items():
        if name in betas:
            defaults["betas"] = tuple(rule.hypers[beta].default for beta in betas)
        else:
            defaults[name] = hyper.default
    return {**defaults, **rule.options(), "maximize": False}


def _signature(rule: Rule) -> Signature:
    named, alone = Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY
    given = [
        Parameter(name, alone if name == "maximize" else named, default=default)
        for name, default in _defaults(rule).items()
    ]
    betas = [Parameter(name, alone, default=rule.hypers[name].default) for name in betas_of(rule)]
    return Signature([Parameter("params", named), *given, *betas], return_annotation=None)


def _doc(rule: Rule) -> str:
    lines = [f"    {name}: {_explain(hyper)}" for name, hyper in rule.hypers.items()]
    for name, choice in rule.choices.items():
        lines.append(f"    {name}: {choice.default!r} unless given")
    lines.append("    maximize: ascend instead of descend")
    return "\n".join([rule.doc.strip(), "", "Args:", *lines, "", _ABOUT_GROUPS])


def _explain(hyper: Hyper) -> str:
    low, high = hyper.search
    return f"{hyper.default:g} unless given; in {hyper.legal()}, tuned in [{low:g}, {high:g}]"


def __getattr__(name: str) -> type[RuleOptimizer]:
    for rule in RULES.values():
        if rule.title == name:
            return torch_form(rule)
    raise AttributeError(
        unknown(f"module {__name__!r} has no optimizer", name, (r.title for r in RULES.values()))
    )


def __dir__() -> list[str]:
    return sorted([*globals(), *(rule.title for rule in RULES.values())])
