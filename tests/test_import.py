"""`import hyperdescent`: light, complete, and honest about what it does not have."""

import subprocess
import sys

import pytest

import hyperdescent

HEAVY = (
    *("ray", "optuna", "sklearn", "higher", "matplotlib", "pydantic", "rich", "typer"),
    # Of torch's own, what `import torch` does not load.
    *("torch._dynamo", "torch._inductor", "torch._functorch.partitioners"),
    *("torch.fx.experimental.symbolic_shapes", "sympy", "networkx"),
)
STEP = """
p = torch.nn.Parameter(torch.ones(3))
optimizer = {name}([p], lr=0.1)
p.sum().backward()
optimizer.step()
"""


def loaded_by(code):
    """The heavy modules, those of torch's compiler among them, that a program ends with."""
    code = f"import sys, torch\n{code}\nprint(*(m for m in {HEAVY} if m in sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return told.stdout.split()


def test_nothing_heavy_is_loaded():
    assert loaded_by("") == loaded_by("import hyperdescent") == []


def test_an_optimizer_loads_no_more_of_torch_than_torchs_own():
    """Which loads dynamo, to keep itself out of what it compiles."""
    ours = STEP.format(name="hyperdescent.optim.AdamW")
    theirs = loaded_by(STEP.format(name="torch.optim.AdamW"))
    assert {*loaded_by(f"import hyperdescent\n{ours}")} <= {*theirs}


def test_every_public_name_resolves():
    assert set(hyperdescent.__all__) <= set(dir(hyperdescent))
    for name in hyperdescent.__all__:
        getattr(hyperdescent, name)


def test_public_names_are_sorted_and_unique():
    names = set(hyperdescent.__all__)
    # Acronyms first, as ruff sorts them.
    assert hyperdescent.__all__ == sorted(names, key=lambda name: (not name.isupper(), name))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'hyperdescent' has no attribute 'tunee'"):
        hyperdescent.tunee  # noqa: B018  # the access is the test


def test_optimizers_import_as_torchs_do():
    from hyperdescent.optim import AdamW

    assert AdamW is hyperdescent.optim.AdamW
