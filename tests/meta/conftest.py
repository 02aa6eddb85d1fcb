"""What tests of traced steps share."""

import sys

import pytest

from hyperdescent.inner.numerics.matrix_roots import newton_inverse_root


@pytest.fixture
def few_iterations(monkeypatch):
    """Roots of matrices by three steps, for what costs by its operations: they are the same in all
    of the forty.
    """
    monkeypatch.setattr(
        sys.modules["hyperdescent.inner.rules.shampoo"],
        "newton_inverse_root",
        lambda a, p, *, ridge, steps: newton_inverse_root(a, p, ridge=ridge, steps=3),
    )
