"""torch's private names lie in one file, and without any of them there is a way and a word."""

import ast
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hyperdescent.inner import torch_internals as internals
from hyperdescent.inner.core.hyper import positive
from hyperdescent.inner.registry import find_rule
from hyperdescent.inner.torch_internals import Refused
from hyperdescent.meta.forward.forward import Forward
from hyperdescent.meta.implicit.implicit import Implicit
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.training.training import Training

ROOT = Path(__file__).parents[1]
HOME = ROOT / "inner" / "torch_internals.py"
LAYERS = ("inner", "meta", "search", "studies", "testing", "scripts")
SOURCES = [p for layer in LAYERS for p in sorted((ROOT / layer).rglob("*.py")) if p != HOME]
# Of no use to anyone but torch, though their names begin without an underscore.
UNSTABLE = ("torch.fx.experimental",)
# Of tensors, operations and nodes, which are no names of torch's by themselves.
MEMBERS = {
    "_version",
    "_schema",
    "_rename",
    "_op",
    "_saved_self",
    "_backward_hooks",
    "_make_subclass",
}


def is_private(path):
    """Whether a dotted path into torch is private: a part of it begins with one underscore."""
    parts = path.split(".")
    return any(p.startswith("_") and not p.startswith("__") for p in parts) or any(
        path == name or path.startswith(f"{name}.") for name in UNSTABLE
    )


def private_names(source):
    """(line, path) of every private name of torch's in a source, however it is written."""
    tree = ast.parse(source)
    bound = {"aten": "torch.ops.aten"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    bound[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                    if is_private(alias.name):
                        yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                path = f"{node.module}.{alias.name}"
                bound[alias.asname or alias.name] = path
                if is_private(path):
                    yield node.lineno, path
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        names, inside = [node.attr], node.value
        while isinstance(inside, ast.Attribute):
            names.append(inside.attr)
            inside = inside.value
        if isinstance(inside, ast.Name) and inside.id in bound:
            path = ".".join([bound[inside.id], *reversed(names)])
            if is_private(path):
                yield node.lineno, path
        elif node.attr in MEMBERS or node.attr.startswith("_foreach_"):
            yield node.lineno, node.attr


@pytest.mark.parametrize("layer", LAYERS)
def test_private_names_of_torch_are_in_one_file(layer):
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in SOURCES
        if path.is_relative_to(ROOT / layer)
        for line, name in private_names(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._C._some_switch()",
        "import torch._inductor",
        "import torch.fx.experimental.proxy_tensor as proxies",
        "from torch.fx.experimental.proxy_tensor import make_fx",
        "from torch._guards import tracing",
        "from torch.utils import _pytree",
        "def late():\n    from torch._inductor import config",
        "from torch import jit\njit._fuser.optimized_execution(False)",
        "from torch.autograd import forward_ad as fad\nfad._current_level",
        "import torch as t\nt._foreach_add_([x], 1)",
        "from .fx_graph import aten\naten._to_copy.default",
        "x._version",
    ],
)
def test_a_private_name_would_be_found(source):
    assert [*private_names(source)]


@pytest.mark.parametrize(
    "source",
    ["import torch\ntorch.func.grad", "self._torch", "from ._torch import x", "torch.__version__"],
)
def test_others_are_none(source):
    assert not [*private_names(source)]


def test_importing_the_file_names_nothing_of_torch():
    """But in functions, or for types."""
    tree = ast.parse(HOME.read_text())
    outside = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert all(not is_private(a.name) for n in outside for a in n.names)


# What is looked up for steps that are not autograd's: where it lies in torch, and its name.
TRACED = {
    "make_fx": "torch.fx.experimental.proxy_tensor",
    "fx_graph_cse": "torch._functorch.compile_utils",
    "tree_flatten": "torch.utils._pytree",
    "tree_unflatten": "torch.utils._pytree",
}
COMPILED = {
    "min_cut_rematerialization_partition": "torch._functorch.partitioners",
    "patch": "torch._functorch.config",
    "compile": "torch._inductor",
    "TracingContext": "torch._guards",
    "tracing": "torch._guards",
    "ShapeEnv": "torch.fx.experimental.symbolic_shapes",
    "FakeTensorMode": "torch._subclasses.fake_tensor",
}


def training():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, generator=draw, dtype=torch.float64)
    data = x, (x[:, 0] > 0).long()
    of = problem_from_module(
        lambda: nn.Linear(3, 2).double(), F.cross_entropy, data, data, batch_size=4
    )
    return Training(of, find_rule("adam"), 4)


@pytest.fixture
def run():
    return training()


@pytest.fixture
def lacking(monkeypatch):
    """Makes a torch that lacks a name, as who imports it from now on sees it: torch's own
    functions, which need it, have it.
    """

    def lack(module, name):
        whole = import_module(module)
        assert hasattr(whole, name)
        rest = ModuleType(module)
        rest.__dict__.update({n: x for n, x in vars(whole).items() if n != name})
        monkeypatch.setitem(sys.modules, module, rest)

    return lack


def assert_by_autograd(method, run, why, **options):
    point = run.start(["lr", "beta1"])
    expected, _ = method(compile=False, **options)(run, point, seed=0)
    # Of this project's lookup or, if that is sooner, of one inside torch.
    with pytest.warns(UserWarning, match=rf"{why}.*; its steps are done by autograd"):
        found, _ = method(compile=True, **options)(run, point, seed=0)
    assert "by autograd: " in found.note.how and why in found.note.how
    assert found.loss == expected.loss
    assert all(torch.equal(found.grad[n], expected.grad[n]) for n in point)


@pytest.mark.parametrize("name", [*TRACED, *COMPILED])
def test_steps_are_autograds_without(run, lacking, name):
    module = (TRACED | COMPILED)[name]
    lacking(module, name)
    assert_by_autograd(Replay, run, name, graphs="keep")


@pytest.mark.parametrize("name", [*TRACED, "compile"])
def test_forward_steps_are_autograds_without(run, lacking, name):
    module = (TRACED | COMPILED)[name]
    lacking(module, name)
    assert_by_autograd(Forward, run, name)


@pytest.mark.parametrize("name", [*TRACED, "compile"])
def test_unasked_steps_are_autograds_without(run, lacking, name, monkeypatch):
    """Even where compiling would pay."""
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    module = (TRACED | COMPILED)[name]
    lacking(module, name)
    point = run.start(["lr"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _ = Replay(compile="auto", expect=1e4)(run, point, seed=0)
    expected, _ = Replay(compile=False)(run, point, seed=0)
    assert "by autograd: " in found.note.how
    assert f"this torch has no {module}.{name}" in found.note.how
    assert torch.equal(found.grad["lr"], expected.grad["lr"])


def test_a_compiler_that_fails_to_load_is_none(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._inductor", None)
    assert_by_autograd(Replay, run, "torch._inductor")


def test_a_partitioner_that_is_called_otherwise_is_none(run, monkeypatch):
    from torch._functorch import partitioners

    def other(joint, *, outputs):
        raise AssertionError("it was called")

    monkeypatch.setattr(partitioners, "min_cut_rematerialization_partition", other)
    with pytest.warns(UserWarning, match="this torch has no such partitioner"):
        found, _ = Replay(compile=True, graphs="keep")(run, run.start(["lr"]), seed=0)
    assert "by autograd" in found.note.how


def test_a_partitioner_without_its_newest_argument_will_do(run, monkeypatch):
    from torch._functorch import partitioners

    cut = partitioners.min_cut_rematerialization_partition

    def older(joint, inputs, *, num_fwd_outputs):
        return cut(joint, inputs, num_fwd_outputs=num_fwd_outputs)

    monkeypatch.setattr(partitioners, "min_cut_rematerialization_partition", older)
    point = run.start(["lr"])
    found, _ = Replay(compile="trace", graphs="keep")(run, point, seed=0)
    expected, _ = Replay(compile=False)(run, point, seed=0)
    assert found.note.how.endswith("graphs kept, traced")
    assert found.grad["lr"] == pytest.approx(float(expected.grad["lr"]), rel=1e-12)


@pytest.mark.parametrize("name", [*TRACED, "compile"])
@pytest.mark.filterwarnings("ignore:.*has not converged")
def test_products_are_autograds_without(lacking, name):
    def penalized(output, target, *, hypers, params):
        penalty = sum(x.square().sum() for x in params.values())
        return F.cross_entropy(output, target) + hypers["l2"] * penalty

    data = torch.eye(3, dtype=torch.float64), torch.tensor([0, 1, 0])
    of = problem_from_module(
        lambda: nn.Linear(3, 2).double(),
        penalized,
        data,
        data,
        batch_size=3,
        hypers={"l2": positive(0.1, search=(1e-3, 10.0))},
        outer_loss_fn=F.cross_entropy,
    )
    run = Training(of, find_rule("sgd"), 50, values={"lr": 1.0})
    module = (TRACED | COMPILED)[name]
    lacking(module, name)
    point = run.start(["l2"])
    with pytest.warns(
        UserWarning, match=rf"this torch has no {module}.{name}.*; its steps are done"
    ):
        found, _ = Implicit(compile=True)(run, point, seed=0)
    expected, _ = Implicit(compile=False)(run, point, seed=0)
    assert "by autograd: " in found.note.how and f"{module}.{name}" in found.note.how
    assert torch.equal(found.grad["l2"], expected.grad["l2"])


def test_traced_operations_are_run_by_python_without_torchscripts_switch(run, lacking):
    point = run.start(["lr"])
    expected, _ = Replay(compile="trace")(run, point, seed=0)
    assert expected.note.how.endswith("traced")
    lacking("torch.jit._fuser", "optimized_execution")
    found, _ = Replay(compile="trace")(training(), point, seed=0)
    why = "some of it as Python: this torch has no torch.jit._fuser.optimized_execution"
    assert found.note.how.endswith(why)
    assert torch.equal(found.grad["lr"], expected.grad["lr"])


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (torch._C, "_are_functorch_transforms_active"),
        (torch.autograd.forward_ad, "_current_level"),
    ],
)
def test_a_batch_in_parts_is_one_graph_without(monkeypatch, place, name):
    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = x, (x[:, 0] > 0).long()

    def answer():
        of = problem_from_module(
            lambda: nn.Linear(3, 2).double(),
            F.cross_entropy,
            data,
            data,
            batch_size=4,
            accumulate=2,
        )
        run = Training(of, find_rule("sgd"), 3)
        return Replay(compile=False)(run, run.start(["lr"]), seed=0)[0]

    expected = answer()
    monkeypatch.delattr(place, name)
    with pytest.warns(
        RuntimeWarning, match=f"this torch has no .*{name}: accumulate= saves no mem"
    ):
        found = answer()
    torch.testing.assert_close(found.grad["lr"], expected.grad["lr"], rtol=1e-13, atol=0)


def test_tensors_that_count_no_versions():
    assert internals.version_of(torch.zeros(2).add_(1)) == 1
    with pytest.warns(RuntimeWarning, match="no Tensor._version: a carry that is used twice"):
        assert internals.version_of(object()) == 0


@pytest.mark.parametrize("name", ["_AutoDispatchBelowAutograd", "_ExcludeDispatchKeyGuard"])
def test_views_without_the_switch(monkeypatch, name):
    x = torch.arange(6.0)
    monkeypatch.delattr(torch._C, name)
    with (
        pytest.warns(RuntimeWarning, match=f"this torch has no torch._C.{name}"),
        internals.below_autograd(),
    ):
        assert x.view(2, 3)[1, 0] == 3


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (torch._utils, "_flatten_dense_tensors"),
        (torch._utils, "_unflatten_dense_tensors"),
        (torch, "_foreach_copy_"),
        (torch, "_foreach_sub_"),
    ],
)
def test_many_tensors_in_one_call_are_taken_one_by_one_without(monkeypatch, place, name):
    def done():
        like = [torch.zeros(2, 3), torch.zeros(()), torch.zeros(0), torch.zeros(4)]
        flat = internals.flatten_dense([x + k for k, x in enumerate(like)])
        parts = internals.unflatten_dense(flat, like)
        internals.foreach_copy(like, parts)
        internals.foreach_sub(like, [torch.ones_like(x) for x in like])
        return [flat, *parts, *like]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = done()
    monkeypatch.delattr(place, name)
    with pytest.warns(RuntimeWarning, match=f"this torch has no .*{name}"):
        found = done()
    assert all(x.shape == y.shape and x.equal(y) for x, y in zip(found, expected, strict=True))


def test_what_is_missing_is_named():
    with pytest.raises(Refused, match=r"this torch has no torch\.func\.nothing$"):
        internals._find("torch.func", "nothing")
    with pytest.raises(Refused, match=r"this torch has no torch\._nothing \(ModuleNotFoundError"):
        internals._find("torch._nothing", "at_all")
