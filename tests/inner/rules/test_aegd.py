"""The energy of AEGD."""

from itertools import pairwise

import pytest
import torch

from hyperdescent.inner.registry import RULES

F64 = torch.float64


def number(x):
    return torch.tensor(x, dtype=F64)


def descend(name, steps, start=3.0, dtype=F64, loss_of=lambda p: (p * p).sum() / 2, **given):
    """The weights, slots and gradients at every step of descent."""
    rule = RULES[name]
    p, values = torch.full((2, 3, 1, 1), start, dtype=dtype), rule.values(given)
    s = rule.init(p, values)
    found = []
    for step in range(1, steps + 1):
        q = p.detach().clone().requires_grad_()
        loss = loss_of(q)
        (g,) = torch.autograd.grad(loss, q)
        p, s = rule(p, g, s, number(float(step)), values, loss=loss.detach())
        found.append((q.detach(), p, s, g, loss.detach()))
    return found


@pytest.mark.parametrize("name", ["aegd", "aegdm"])
def test_the_energy_starts_at_the_root_of_the_first_loss_and_only_falls(name):
    found = descend(name, 30, lr=0.2, c=0.5)
    before = (found[0][4] + 0.5).sqrt() * torch.ones_like(found[0][0])
    for _, _, s, g, loss in found:
        v = g / (2 * (loss + 0.5).sqrt())
        torch.testing.assert_close(s["r"], before / (1 + 0.4 * v * v), rtol=1e-13, atol=0)
        before = s["r"]


def test_what_the_energy_loses_is_the_slope_along_the_step():
    """r' - r = v (p' - p) of every weight: the identity behind its stability at every rate."""
    for lr in (0.1, 10.0):
        found = descend("aegd", 20, lr=lr)
        for (_, _, s, _, _), (p, moved, after, g, loss) in pairwise(found):
            v = g / (2 * (loss + 1).sqrt())
            torch.testing.assert_close(after["r"] - s["r"], v * (moved - p), rtol=1e-9, atol=1e-13)
        # So the squared steps sum to less than lr times the energy squared at the start.
        walked = sum(((moved - p) ** 2 for p, moved, *_ in found))
        assert (walked <= lr * (found[0][4] + 1)).all()


def test_without_momentum_aegdm_is_aegd():
    plain, moving = descend("aegd", 20, lr=0.1), descend("aegdm", 20, lr=0.1, momentum=0.0)
    torch.testing.assert_close(plain[-1][1], moving[-1][1], rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["aegd", "aegdm"])
def test_the_energy_of_short_weights_falls_too(name):
    """By a factor of 1 + 2 lr v², which bfloat16 would round to 1."""
    found = descend(name, 50, start=0.25, dtype=torch.bfloat16, lr=1e-3)
    assert all(bool((b[2]["r"] < a[2]["r"]).all()) for a, b in pairwise(found))
    assert found[-1][1].dtype == torch.bfloat16
