"""What is public lists its arguments, so that an IDE and the documentation can show them."""

import dataclasses
import inspect
import re

import pytest

import hyperdescent as hd

NAMESPACES = (hd.hypers, hd.slots, hd.estimators, hd.solvers, hd.numerics)


def public():
    """Every public function and dataclass, by name."""
    found = {name: getattr(hd, name) for name in hd.__all__}
    for space in NAMESPACES:
        found |= {
            f"{space.__name__.rpartition('.')[2]}.{n}": getattr(space, n) for n in space.__all__
        }
    kinds = {n: x for n, x in found.items() if inspect.isfunction(x) or inspect.isclass(x)}
    # One argument is what the first line speaks of.
    return {n: x for n, x in kinds.items() if len(parameters(x)) > 1}


def parameters(of):
    if inspect.isclass(of) and not dataclasses.is_dataclass(of):
        return []
    return list(inspect.signature(of).parameters)


def listed(of):
    """The names in the section of arguments, Google's style."""
    _, _, section = (inspect.getdoc(of) or "").partition("\nArgs:\n")
    section = re.split(r"\n(?=\S)", section)[0]
    return [
        name
        for names in re.findall(r"^ {4}([\w*][\w*, ]*):", section, re.M)
        for name in re.split(r",\s*", names.replace("*", ""))
    ]


@pytest.mark.parametrize("name", public())
def test_every_argument_is_listed(name):
    assert listed(public()[name]) == parameters(public()[name])
