"""The registry: every rule defined in a module of this package, by name."""

from __future__ import annotations

import ast
import pkgutil
from functools import lru_cache
from importlib import import_module

from ..core.rule import Rule, unknown


def find_rule(name: str | Rule) -> Rule:
    """The rule called name, or made of others, as "clip_norm(adamw, max_norm=0.5)" says; a Rule is
    returned as it is.
    """
    if isinstance(name, Rule):
        return name
    if not isinstance(name, str):
        raise TypeError(f"{name!r} is no rule; give its name, such as 'adamw', or a Rule")
    return RULES[name] if name in RULES else _composed(name)


@lru_cache
def _composed(name: str) -> Rule:
    try:
        return _read(ast.parse(name, mode="eval").body)
    except SyntaxError as error:
        raise ValueError(unknown("there is no rule", name, RULES)) from error


def _read(said: ast.expr) -> Rule:
    from ..wrappers import WRAPPERS  # Here, because some rules are made of others.

    match said:
        case ast.Name(id=name):
            if name in RULES:
                return RULES[name]
            if name in WRAPPERS:
                raise ValueError(f"{name!r} goes around a rule; name that too: {_example(name)}")
            raise ValueError(unknown("there is no rule", name, RULES))
        case ast.Call(func=ast.Name(id=name), args=inside, keywords=given):
            if name in RULES:
                raise ValueError(
                    f"{name!r} in {ast.unparse(said)!r} is a rule and goes around none; write its "
                    "name alone, and give its hypers and options where it is used"
                )
            if name not in WRAPPERS:
                raise ValueError(unknown("there is no wrapper of rules", name, WRAPPERS))
            count = "two rules" if name == "partition" else "one rule"
            if len(inside) != (2 if name == "partition" else 1):
                raise ValueError(
                    f"{name!r} goes around {count}, and {ast.unparse(said)!r} names {len(inside)}; "
                    f"write {_example(name)}"
                )
            rules = [_read(each) for each in inside]
            return WRAPPERS[name](*rules, **{each.arg or "**": _value(each) for each in given})
    raise ValueError(
        f"{ast.unparse(said)!r} is no rule; write a name, or wrappers around one: "
        "clip_norm(adamw, max_norm=0.5)"
    )


def _example(name: str) -> str:
    return f'"{name}({"muon, " * (name == "partition")}adamw)"'


def _value(given: ast.keyword) -> object:
    try:
        return ast.literal_eval(given.value)
    except ValueError as error:
        raise ValueError(
            f"{ast.unparse(given)!r} is no value that a name can hold; write a number, or call the "
            'wrapper: clip_norm("adamw", max_norm=x)'
        ) from error


# Last, because some rules are made of others, which are found by the functions above.
RULES: dict[str, Rule] = {
    value.name: value
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__))
    for value in vars(import_module(f"{__name__}.{module}")).values()
    if isinstance(value, Rule)
}
