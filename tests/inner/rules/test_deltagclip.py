"""The limits of delta-GClip."""

import pytest
import torch

from hyperdescent.inner.registry import RULES
from hyperdescent.inner.torch_form.optimizer import torch_form

F64 = torch.float64


def end(optimizer, scale=1.0, clip=None, dead=False, steps=5):
    torch.manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(s, dtype=F64)) for s in ((3, 4), (5,), (2, 3, 2, 2), ())
    ]
    made = optimizer(params)
    for _ in range(steps):
        for p in params:
            p.grad = scale * torch.randn(p.shape, dtype=F64) * (not dead)
        if clip:
            torch.nn.utils.clip_grad_norm_(params, clip)
        made.step()
    return torch.cat([p.detach().reshape(-1) for p in params])


def ours(name, **given):
    return lambda params: torch_form(RULES[name])(params, **given)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


@pytest.mark.parametrize("name", ["deltagclip", "deltagclipc"])
def test_a_floor_of_one_is_plain_descent(name):
    made = ours(name, lr=0.1, gamma=1e-3, delta=1.0)
    torch.testing.assert_close(end(made), end(sgd), rtol=1e-13, atol=0)


def test_no_floor_is_clipping_by_norm():
    # torch adds 1e-6 to a norm of about 6.
    made = ours("deltagclip", lr=0.1, gamma=2.0, delta=0.0)
    torch.testing.assert_close(end(made), end(sgd, clip=2.0), rtol=1e-6, atol=1e-7)


def test_the_step_shrinks_no_further_than_its_floor():
    clipped = ours("deltagclip", lr=0.1, gamma=1.0, delta=1e-3)
    start = end(sgd, steps=0)
    for scale in (1e4, 1e6):
        once = end(clipped, scale, steps=1) - start
        floor = 1e-3 * (end(sgd, scale, steps=1) - start)
        torch.testing.assert_close(once, floor, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["deltagclip", "deltagclipc"])
def test_decay_without_a_gradient_is_the_limit_of_a_small_one(name):
    made = ours(name, lr=0.1, weight_decay=0.5)
    still, small = end(made, dead=True), end(made, 1e-12)
    torch.testing.assert_close(still, small, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(still, 0.95**5 * end(made, steps=0), rtol=1e-13, atol=0)
