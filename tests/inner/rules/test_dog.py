"""What DoG adds to a path: the average that is read, and weights shorter than its steps."""

import pytest
import torch

from hyperdescent.inner.registry import RULES
from hyperdescent.inner.torch_form.optimizer import torch_form

both = pytest.mark.parametrize("name", ["dog", "ldog"])


def descend(name, p, steps, **given):
    """The weights after each step of descent on half their square, and those to use at the end."""
    optimizer, path = torch_form(RULES[name])([p], **given), []
    for _ in range(steps):
        p.grad = p.detach().clone()
        optimizer.step()
        path.append(p.detach().clone())
    optimizer.eval()
    return torch.stack(path), p.detach()


def start(dtype=torch.float64):
    made = torch.randn((4, 2, 3, 3), generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.nn.Parameter(made)


@both
def test_the_weights_to_use_are_the_polynomial_decay_average(name):
    path, read = descend(name, start(), 12, reps_rel=0.1, gamma=3.0)
    mean = torch.zeros_like(path[0])
    for t, x in enumerate(path, start=1):
        mean = (1 - 4 / (t + 3)) * mean + 4 / (t + 3) * x
    torch.testing.assert_close(read, mean, rtol=1e-13, atol=0)


@both
def test_without_gamma_they_are_the_plain_mean(name):
    path, read = descend(name, start(), 12, reps_rel=0.1, gamma=0.0)
    torch.testing.assert_close(read, path.mean(0), rtol=1e-13, atol=0)


@both
def test_short_weights_follow_long_ones_from_steps_below_their_rounding(name):
    exact = start(torch.bfloat16).detach().double()
    long, _ = descend(name, torch.nn.Parameter(exact.clone()), 80)
    short, _ = descend(name, torch.nn.Parameter(exact.to(torch.bfloat16)), 80)
    assert torch.equal(short[0].double(), exact), "the first step is lost in rounding"
    moved = (long[-1] - exact).norm()
    assert moved > 0.5 * exact.norm()
    # Weights and gradients are rounded to one part in 2**9, 80 times.
    assert (short[-1].double() - long[-1]).norm() < 0.05 * moved


def test_the_distance_of_ldog_is_that_of_each_tensor():
    """The first step has the length reps_rel * (1 + norm of the tensor)."""
    params = [torch.nn.Parameter(torch.full((n,), 2.0, dtype=torch.float64)) for n in (4, 9)]
    optimizer = torch_form(RULES["ldog"])(params, reps_rel=1e-3, eps=0.0)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    lengths = [float((p.detach() - 2).norm()) for p in params]
    assert lengths == pytest.approx([1e-3 * 5, 1e-3 * 7])
