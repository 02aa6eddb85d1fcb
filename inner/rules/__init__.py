"""The registry: every rule defined in a module of this package, by name."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from ..rule import Rule, unknown

RULES: dict[str, Rule] = {
    value.name: value
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__))
    for value in vars(import_module(f"{__name__}.{module}")).values()
    if isinstance(value, Rule)
}


def find_rule(name: str | Rule) -> Rule:
    """The rule called name; a Rule is returned as it is."""
    if isinstance(name, Rule):
        return name
    if name not in RULES:
        raise ValueError(unknown("there is no rule", name, RULES))
    return RULES[name]
