"""The registry: every rule defined in a module of this package, by name."""

from __future__ import annotations

import ast
import pkgutil
from functools import lru_cache
from importlib import import_module

from ..rule import Rule, unknown


def find_rule(name: str | Rule) -> Rule:
    """The rule called name, or made of others, as "clip_norm(adamw, max_norm=0.5)" says; a Rule is
    returned as it is.
    """
    if isinstance(name, Rule):
        return name
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
            if name not in RULES:
                raise ValueError(unknown("there is no rule", name, RULES))
            return RULES[name]
        case ast.Call(func=ast.Name(id=name), args=inside, keywords=given):
            if name not in WRAPPERS:
                raise ValueError(unknown("there is no wrapper of rules", name, WRAPPERS))
            rules = [_read(each) for each in inside]
            defaults = {each.arg or "**": ast.literal_eval(each.value) for each in given}
            return WRAPPERS[name](*rules, **defaults)
    raise ValueError(
        f"{ast.unparse(said)!r} is no rule; write a name, or wrappers around one: "
        "clip_norm(adamw, max_norm=0.5)"
    )


# Last, because some rules are made of others, which are found by the functions above.
RULES: dict[str, Rule] = {
    value.name: value
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__))
    for value in vars(import_module(f"{__name__}.{module}")).values()
    if isinstance(value, Rule)
}
