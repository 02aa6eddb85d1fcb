"""mini.py, the whole idea in one file: its metagradient is exact, and descending it helps."""

import importlib.util
from itertools import pairwise
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "scripts" / "mini.py"


@pytest.fixture
def mini(monkeypatch):
    """The script as a module, short and in float64."""
    spec = importlib.util.spec_from_file_location("mini", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "STEPS", 12)
    for name in ("TRAIN", "VALID"):
        x, y = getattr(module, name)
        monkeypatch.setattr(module, name, (x.double(), y))
    torch.set_default_dtype(torch.float64)
    yield module
    torch.set_default_dtype(torch.float32)


def coordinates(mini):
    knots = torch.linspace(-5.5, -4.0, mini.KNOTS)
    return torch.cat([knots, torch.tensor([0.8, 0.97]).logit()])


def test_the_metagradient_equals_central_differences(mini):
    z = coordinates(mini)
    loss, grad = mini.metagradient(z, seed=1)

    def at(nudge):
        return mini.metagradient(z + nudge, seed=1)[0]

    h = 1e-4
    for i, nudge in enumerate(torch.eye(len(z)) * h):
        # Richardson, so that only rounding / h (1e-12) and h**4 are left; Adam's sign-like steps
        # where a gradient is as small as its eps make the rest of the error.
        near = (at(nudge / 2) - at(-nudge / 2)) / h
        far = (at(nudge) - at(-nudge)) / (2 * h)
        assert grad[i].item() == pytest.approx((4 * near - far) / 3, rel=1e-5, abs=1e-8)
    assert grad.abs().min() > 0
    assert loss == pytest.approx(at(torch.zeros(())))


def test_values_are_the_knots_and_the_betas(mini):
    *rates, beta1, beta2 = mini.values(coordinates(mini))
    assert len(rates) == mini.STEPS
    assert (beta1.item(), beta2.item()) == pytest.approx((0.8, 0.97))
    assert all(a <= b for a, b in pairwise(rates))


def test_tuning_lowers_the_held_out_loss(mini, monkeypatch, capsys):
    monkeypatch.setattr(mini, "META_STEPS", 10)
    learned, losses = mini.tune()
    assert len(losses) == 10 and learned.shape == (mini.KNOTS + 2,)
    assert losses[-1] < 0.9 * losses[0]
    assert capsys.readouterr().out.count("held-out loss") == 2


def test_it_stands_alone():
    assert "hyperdescent" not in PATH.read_text().split('"""')[2]
    assert len(PATH.read_text().splitlines()) <= 115
