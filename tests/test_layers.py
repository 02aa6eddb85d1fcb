"""The layers import downwards only, scripts > studies > search > meta > inner; rules, tensors."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAME = "hyperdescent"
# Each layer may import itself and those before it.
LAYERS = ("inner", "meta", "search", "studies", "scripts")
MODULES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imported_layers(path, source):
    """(line, layer) of every import from this project, however it is written."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            # One dot is the package the module lies in.
            package = parts[: len(parts) - node.level]
            targets = [(*package, *(node.module or "").split("."))]
            if not any(targets[0]):
                targets = [(alias.name,) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            named = (node.module or "").split(".")
            targets = [tuple(named[1:]) or (a.name,) for a in node.names if named[0] == NAME]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            targets = [tuple(name[1:]) or ("",) for name in names if name[0] == NAME]
        else:
            continue
        yield from ((node.lineno, target[0]) for target in targets)


def upward(path, source):
    layer = path.relative_to(ROOT).parts[0]
    below = LAYERS[: LAYERS.index(layer) + 1]
    return [
        f"{path.relative_to(ROOT)}:{line} imports {target or NAME}"
        for line, target in imported_layers(path, source)
        if target not in below
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    assert upward(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("meta/reverse/replay.py", "from ..search.space import Space"),
        ("meta/reverse/replay.py", "from .. import search"),
        ("inner/rules/adam.py", "from ...meta.outcome import Outcome"),
        ("inner/rules/adam.py", "from ... import tune"),
        ("search/tune.py", "from hyperdescent.studies import run"),
        ("search/tune.py", "import hyperdescent.scripts.command"),
        ("search/tune.py", "def later():\n    from ..studies.run import run"),
    ],
)
def test_an_upward_import_would_be_found(where, line):
    assert upward(ROOT / where, line)


def test_a_downward_import_is_none():
    source = "import torch\nfrom ..inner.hyper import Hyper\nfrom .space import Space"
    assert upward(ROOT / "search/tune.py", source) == []


def test_every_layer_has_modules():
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(LAYERS)


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if path.parent.name == "rules" and path.name != "__init__.py"],
    ids=lambda path: path.stem,
)
def test_a_rule_is_tensors_only(path):
    # Each of these would cut the graph to a hyperparameter, or stop the compiler.
    names = {
        node.id if isinstance(node, ast.Name) else node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name | ast.Attribute)
    }
    assert not names & {"math", "float", "item", "detach", "numpy", "tolist"}
