"""Accelerated rules where they are older ones."""

import pytest
import torch

from hyperdescent.inner.registry import RULES
from hyperdescent.inner.torch_form.optimizer import torch_form

F64 = torch.float64
SHAPES = [(3, 4), (2, 3, 2, 2), ()]


def path(make, steps=20, scale=1.0):
    """The weights that gradients are taken at, all steps, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=F64)) for s in SHAPES]
    optimizer, found = make(params), []
    for _ in range(steps):
        for p in params:
            noise = torch.randn(p.shape, generator=generator, dtype=F64)
            p.grad = scale * torch.sin(p.detach()) * (1 + 0.3 * noise)
        optimizer.step()
        found.append(torch.cat([p.detach().reshape(-1) for p in params]))
    return torch.stack(found), optimizer


def ours(name, **given):
    return lambda params: torch_form(RULES[name])(params, **given)


@pytest.mark.parametrize(
    "make",
    [
        ours("stochasticnesterov", lr=0.1, momentum=0.8, rho=1.0),
        ours("agnes", lr=0.1, momentum=0.8, alpha=0.1),
    ],
    ids=["stochasticnesterov", "agnes"],
)
def test_without_noise_it_is_nesterovs_method_as_torch_has_it(make):
    def nesterov(params):
        return torch.optim.SGD(params, lr=0.1, momentum=0.8, nesterov=True)

    torch.testing.assert_close(path(make)[0], path(nesterov)[0], rtol=1e-12, atol=1e-13)


def test_the_convex_form_without_noise_is_fista():
    found, _ = path(ours("stochasticnesterov", lr=0.1, convex=True))
    generator = torch.Generator().manual_seed(0)
    start = torch.cat([torch.randn(s, generator=generator, dtype=F64).reshape(-1) for s in SHAPES])
    z = w = start
    k = 1.0
    for moved in found:
        noise = [torch.randn(s, generator=generator, dtype=F64).reshape(-1) for s in SHAPES]
        before, w = w, z - 0.1 * torch.sin(z) * (1 + 0.3 * torch.cat(noise))
        following = (1 + (1 + 4 * k * k) ** 0.5) / 2
        z, k = w + (k - 1) / following * (w - before), following
        torch.testing.assert_close(moved, z, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["stochasticnesterov", "agnes"])
def test_the_weights_to_use_are_a_gradient_step_from_the_trained_ones(name):
    found, optimizer = path(ours(name, lr=0.1))
    params = optimizer.param_groups[0]["params"]
    grads = torch.cat([p.grad.reshape(-1) for p in params])
    optimizer.eval()
    read = torch.cat([p.detach().reshape(-1) for p in params])
    torch.testing.assert_close(read, found[-2] - 0.1 * grads, rtol=1e-13, atol=1e-14)
    assert not torch.allclose(read, found[-1])


def test_the_noise_constant_leaves_the_gradient_step_and_slows_the_other_sequence():
    """After one step both sequences are known: w = p - lr g and v = p - lr / (rho x) g."""
    lr, momentum, rho = 0.1, 0.8, 5.0
    x = (1 - momentum) / (1 + momentum)
    p, g = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([0.3, -0.7], dtype=F64)
    rule = RULES["stochasticnesterov"]
    values = rule.values({"lr": lr, "momentum": momentum, "rho": rho})
    moved, s = rule(p, g, rule.init(p, values), torch.tensor(1.0, dtype=F64), values)
    torch.testing.assert_close(s["w"], p - lr * g)
    torch.testing.assert_close(s["v"], p - lr / (rho * x) * g)
    torch.testing.assert_close(moved, (x * s["v"] + s["w"]) / (1 + x))
