"""`import hyperdescent`: light, complete, and honest about what it does not have."""

import subprocess
import sys

import pytest

import hyperdescent

HEAVY = ("ray", "optuna", "sklearn", "higher", "matplotlib", "pydantic", "rich", "typer")


def test_nothing_heavy_is_loaded():
    code = f"import sys, hyperdescent; print([m for m in {HEAVY} if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


@pytest.mark.parametrize("name", hyperdescent.__all__)
def test_every_public_name_resolves(name):
    assert getattr(hyperdescent, name) is not None
    assert name in dir(hyperdescent)


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
