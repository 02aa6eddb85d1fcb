"""Rooms import only those below them, and none imports in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAME = "hyperdescent"
# Of each room, those it may import beside itself; a layer means all of its rooms. The room of a
# layer is what lies in its own folder, its face, which may import all of its rooms; a room imports
# nothing of the face, but for what is a room of its own here.
ROOMS = {
    "inner": "",
    "inner/numerics": "",
    "inner/core": "numerics",
    "inner/fx_graph": "torch_internals",
    "inner/registry": "core",
    "inner/torch_internals": "",
    "inner/compose": "core, registry",
    "inner/schedules": "core",
    "inner/rules": "core, numerics, registry, compose",
    "inner/wrappers": "core, numerics, registry, compose",
    "inner/torch_form": "core, numerics, registry, fx_graph, torch_internals",
    "meta": "inner",
    "meta/problems": "inner",
    "meta/training": "inner, problems",
    "meta/tracing": "inner, problems, training",
    "meta/reverse": "inner, problems, training, tracing",
    "meta/forward": "inner, problems, training, tracing",
    "meta/implicit": "inner, problems, training, tracing",
    "meta/bilevel": "inner, problems, training, tracing, reverse, implicit",
    "meta/sampling": "inner, problems, training, tracing, reverse, forward",
    "search": "inner, meta",
    "studies": "inner, meta, search",
    "studies/measure": "search",
    "studies/engine": "inner, meta, search, studies",
    "studies/benchmarks": "inner, meta, search, studies, measure",
    "studies/library": "inner, meta, search, studies, measure, engine, benchmarks",
    "testing": "inner, meta, search, studies",
    "scripts": "inner, meta, search, studies",
}
LAYERS = ("inner", "meta", "search", "studies", "testing", "scripts")
MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix().removesuffix("/__init__"): path
    for layer in LAYERS
    for path in sorted((ROOT / layer).rglob("*.py"))
}


def room_of(module):
    """The innermost room that a module lies in, by its path; "" for the public face."""
    parts = module.split("/")
    around = ("/".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((room for room in around if room in ROOMS), "")


def targets(module, source):
    """(line, module) of every import from this project, however and wherever it is written."""
    package = (
        module
        if MODULES.get(module, ROOT).name == "__init__.py"
        else "/".join([*module.split("/")[:-1]])
    )
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            # One dot is the package the module lies in.
            parts = package.split("/") if package else []
            base = [*parts[: len(parts) - node.level + 1], *(node.module or "").split(".")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == NAME:
            base = node.module.split(".")[1:]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == NAME:
                    yield node.lineno, "/".join(alias.name.split(".")[1:])
            continue
        else:
            continue
        base = [part for part in base if part]
        for alias in node.names:
            named = "/".join([*base, alias.name])
            yield node.lineno, named if named in MODULES else "/".join(base)


def allowed(room, other):
    if room == other:
        return True
    layer, theirs = room.split("/")[0], other.split("/")[0]
    may = [name for name in ROOMS[room].split(", ") if name]
    if layer == theirs and room == layer:
        return True
    if other == layer:
        return other in may
    return (other.split("/")[-1] if layer == theirs else theirs) in may


def upward(module, source):
    return [
        f"{module}:{line} imports {target or NAME}"
        for line, target in targets(module, source)
        if not target or not allowed(room_of(module), room_of(target))
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_what_they_may(room):
    inside = {m: path for m, path in MODULES.items() if room_of(m) == room}
    assert inside
    assert [each for m, path in inside.items() for each in upward(m, path.read_text())] == []


@pytest.mark.parametrize("room", [room for room in ROOMS if (ROOT / room).is_dir()])
def test_a_room_says_what_it_may_import(room):
    said = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))
    assert f"\n\nMay import: {ROOMS[room] or 'nothing'}." in said


def test_no_module_imports_itself_in_a_circle():
    """Late imports and those for types included."""
    graph = {
        module: {
            to for _, to in targets(module, path.read_text()) if to in MODULES and to != module
        }
        for module, path in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("meta/reverse/replay", "from ...search.space import Space"),
        ("meta/reverse/replay", "from ... import search"),
        ("meta/training/training", "from ..reverse.replay import Replay"),
        ("meta/training/training", "from ..auto import Auto"),
        ("inner/core/rule", "from ..registry import find_rule"),
        ("inner/core/rule", "def later():\n    from ..registry import find_rule"),
        ("inner/rules/adam", "from ...meta.training.outcome import Outcome"),
        ("inner/rules/adam", "from ..torch_form.optimizer import torch_form"),
        ("inner/rules/adam", "from ... import tune"),
        ("search/tune", "from hyperdescent.studies import engine"),
        ("search/tune", "import hyperdescent.scripts.command"),
        ("search/tune", "def later():\n    from ..studies.engine.run import run_study"),
    ],
)
def test_an_upward_import_would_be_found(where, line):
    assert where in MODULES
    assert upward(where, line)


def test_a_downward_import_is_none():
    source = "import torch\nfrom ..inner.core.hyper import Hyper\nfrom .space import Space"
    assert upward("search/tune", source) == []
