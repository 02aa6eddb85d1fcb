"""Rules and wrappers by name: found, composed, and pickled.

Both tables are filled by the packages that hold the files, `rules` and `wrappers`, which `inner`
imports; what only looks names up needs neither.
"""

from __future__ import annotations

import ast
import copyreg
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import lru_cache

from .core.catalogue import Catalogue
from .core.messages import unknown
from .core.rule import Rule

RULES = Catalogue[Rule]("rule", 'Every update rule by name: rules.adamw, or rules["adamw"].')
WRAPPERS: dict[str, Callable[..., Rule]] = {}


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


def _reduced(rule: Rule) -> tuple[Callable[..., Rule], tuple[object, ...]]:
    # By name: under the name of its function, pickle would find the rule instead.
    found = _registered(rule.name)
    if found is not None and replace(found, chosen={}) == replace(rule, chosen={}):
        return _recall, (rule.name, dict(rule.chosen))
    return Rule, tuple(getattr(rule, each.name) for each in fields(rule))


def _registered(name: str) -> Rule | None:
    try:
        return find_rule(name)
    except (TypeError, ValueError):
        return None


def _recall(name: str, chosen: Mapping[str, object]) -> Rule:
    found = _registered(name)
    if found is None:
        raise ValueError(f"there is no rule {name!r} here; it was pickled by another version")
    return found.choose(**chosen) if chosen else found


copyreg.pickle(Rule, _reduced)
