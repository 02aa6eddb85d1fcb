"""Files, functions and classes stay small enough to be read at once."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("inner", "meta", "search", "studies", "testing", "scripts")
PATHS = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
LINES, OF_FUNCTION, METHODS = 400, 70, 12


def length(function):
    """In lines, without the docstring, whose list of arguments is as long as they are many."""
    whole = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return whole
    return whole - (function.body[0].end_lineno - function.body[0].lineno + 1)


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_is_too_long(layer):
    found = []
    for path in PATHS:
        if path.relative_to(ROOT).parts[0] != layer:
            continue
        source, name = path.read_text(), path.relative_to(ROOT)
        if source.count("\n") > LINES:
            found.append(f"{name} has more than {LINES} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and length(node) > OF_FUNCTION:
                found.append(f"{name}:{node.name} has {length(node)} lines")
            if isinstance(node, ast.ClassDef):
                methods = sum(isinstance(each, ast.FunctionDef) for each in node.body)
                if methods > METHODS:
                    found.append(f"{name}:{node.name} has {methods} methods")
    assert found == []
