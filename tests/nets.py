"""What the tests of metagradients train: small nets in float64, seeded data, telling values."""

import torch
from torch import nn

# At these every hyper moves the loss by well more than rounding.
VALUES = {
    "lr": 0.03,
    "beta1": 0.8,
    "beta2": 0.9,
    "eps": 1e-3,
    "momentum": 0.7,
    "dampening": 0.2,
    "alpha": 0.9,
    "weight_decay": 0.1,
    "lr_decay": 0.1,
    "initial_accumulator_value": 0.05,
    "momentum_decay": 0.1,
}


def examples(count, *shape, seed=0):
    """Normal inputs, and which of their first three numbers is the largest."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, *shape, dtype=torch.float64, generator=generator)
    return inputs, inputs.flatten(1)[:, :3].argmax(1)


def mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def one_layer():
    """One matrix and one vector, where a rule's operations on every tensor are what takes time."""
    return nn.Linear(5, 3).double()


def cnn():
    """For inputs of shape (1, 6, 6)."""
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)
    return nn.Sequential(*layers).double()


class Around:
    """A problem that is another one but for what a subclass changes."""

    def __init__(self, problem):
        self.problem = problem

    def __getattr__(self, name):
        return getattr(self.problem, name)


class Late(Around):
    """A buffer that only step 7 replaces. For mlp."""

    def start(self, seed):
        return self.problem.start(seed)[0], {"mean": torch.zeros(3, dtype=torch.float64)}

    def batch(self, step, seed):
        return step, self.problem.batch(step, seed)

    def inner_loss(self, params, buffers, hypers, batch):
        step, batch = batch
        loss, _ = self.problem.inner_loss(params, {}, hypers, batch)
        if step == 7:
            buffers = {"mean": buffers["mean"] + params["2.bias"]}
        return loss + buffers["mean"].sum() * params["2.bias"].sum(), buffers

    def outer_loss(self, params, buffers, hypers):
        return self.problem.outer_loss(params, {}, hypers) + buffers["mean"].square().sum()
