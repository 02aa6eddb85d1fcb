"""A rule's hypers and options as torch.optim has them: arguments of a class, and param groups."""

from __future__ import annotations

import re
from collections.abc import Mapping
from inspect import Parameter, Signature
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..core.hyper import Hyper, Tensors
from ..core.rule import Rule

_ABOUT_GROUPS = """\
Hyperparameters are read from the param groups at every step, so that schedulers and edits of
group["lr"] or group["betas"] act; numbers and one-element tensors both do. Slots have the dtype of
the weights, and a parameter whose gradient is None is left alone.

The step counter belongs to the param group: it counts the steps in which any parameter of the
group had a gradient. A parameter whose first gradient comes later has the averages of gradients
that were zero until then; torch.optim would count its steps from its first. To start its count at
1, add it as a group of its own."""


# lr over a group's "initial_lr" is no factor to scale them by: OneCycleLR has another rate than was
# given there, ReduceLROnPlateau none, and a learned schedule writes every rate itself.
_ABOUT_RATES = """

torch's schedulers change group["lr"] alone, and {names} stays where it is. To keep the ratio of the
two, after every step of the scheduler: group["{name}"] = ratio * group["lr"]."""


def betas_of(rule: Rule) -> tuple[str, ...]:
    """The hyperparameters kept as torch's tuple `betas`; none where there is only one beta."""
    names = tuple(name for name in rule.hypers if re.fullmatch(r"beta\d", name))
    return names if len(names) > 1 else ()


def defaults_of(rule: Rule) -> dict[str, object]:
    """What the param groups hold where nothing is given, in torch.optim's order of arguments."""
    betas = betas_of(rule)
    defaults: dict[str, object] = {}
    for name, hyper in rule.hypers.items():
        if name in betas:
            defaults["betas"] = tuple(rule.hypers[beta].default for beta in betas)
        else:
            defaults[name] = hyper.default
    return {**defaults, **rule.options(), "maximize": False}


def signature_of(rule: Rule) -> Signature:
    named, alone = Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY
    given = [
        Parameter(name, alone if name == "maximize" else named, default=default)
        for name, default in defaults_of(rule).items()
    ]
    betas = [Parameter(name, alone, default=rule.hypers[name].default) for name in betas_of(rule)]
    own = [*betas, Parameter("compile", alone, default=False)]
    return Signature([Parameter("params", named), *given, *own], return_annotation=None)


def doc_of(rule: Rule) -> str:
    lines = [f"    {name}: {_explain(hyper)}" for name, hyper in rule.hypers.items()]
    for name, choice in rule.choices.items():
        lines.append(f"    {name}: {choice.default!r} unless given")
    lines.append("    maximize: ascend instead of descend")
    lines.append("    compile: generate code for steps, which takes the first seconds")
    about = _ABOUT_GROUPS
    if rates := [name for name in rule.hypers if name.endswith("_lr")]:
        about += _ABOUT_RATES.format(names=" and ".join(rates), name=rates[0])
    return "\n".join([rule.doc.strip(), "", "Args:", *lines, "", about])


def _explain(hyper: Hyper) -> str:
    low, high = hyper.search
    return f"{hyper.default:g} unless given; in {hyper.legal()}, tuned in [{low:g}, {high:g}]"


def grouped(
    rule: Rule, given: Mapping[str, object], defaults: Mapping[str, object]
) -> dict[str, object]:
    """The arguments of one group, with beta1, beta2, ... kept as torch's tuple betas."""
    group = {**defaults, **given}
    betas = betas_of(rule)
    if betas:
        alone = {i: group.pop(name) for i, name in enumerate(betas) if name in given}
        if alone and "betas" in given:
            both = f"betas and {betas[min(alone)]}"
            raise TypeError(f"{rule.title} got {both}; give one of the two")
        pair = group["betas"]
        if not isinstance(pair, tuple | list) or len(pair) != len(betas):
            raise ValueError(f"betas={pair!r} is not a tuple ({', '.join(betas)})")
        group["betas"] = tuple(alone.get(i, beta) for i, beta in enumerate(pair))
    return group


def hypers_in(rule: Rule, group: Mapping[str, Any]) -> dict[str, Any]:
    """Every hyper of a group under its own name, whether its betas are a pair or apart."""
    apart = dict(zip(betas_of(rule), group["betas"], strict=True)) if "betas" in group else {}
    held = {**group, **apart}
    return {name: held[name] for name in rule.hypers}


def values_in(rule: Rule, group: Mapping[str, Any]) -> Tensors:
    """The same as the numbers that a rule takes."""
    given = hypers_in(rule, group).items()
    return {n: torch.as_tensor(v, dtype=torch.float64).reshape(()) for n, v in given}


def chosen_in(rule: Rule, group: Mapping[str, Any]) -> Rule:
    """The rule with a group's options."""
    return rule.choose(**{name: group[name] for name in rule.choices})


def check_number(rule: Rule, name: str, value: Any) -> None:
    """Raise unless this is a legal number for a hyper of all of a group."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; a param group takes one number, so give the "
            "parameters groups of their own"
        )
    if not isinstance(value, Real | Tensor):
        raise TypeError(f"{name}={value!r} is not a number")
    rule.hypers[name].check(name, value.detach() if isinstance(value, Tensor) else float(value))


def check_group(rule: Rule, group: Mapping[str, Any]) -> None:
    """Raise unless the values of a group are legal, alone and together."""
    given = hypers_in(rule, group)
    for name, value in given.items():
        check_number(rule, name, value)
    chosen_in(rule, group).complain(given)


__all__ = [
    "betas_of",
    "check_group",
    "check_number",
    "chosen_in",
    "defaults_of",
    "doc_of",
    "grouped",
    "hypers_in",
    "signature_of",
    "values_in",
]
