"""Metagradients against another library's, where it differentiates the same thing."""

import pytest
import torch
import torchopt
from torch import nn
from torch.nn.functional import cross_entropy

from hyperdescent.inner.registry import find_rule
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.training.training import Training

STEPS = 8


def data(seed):
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(30, 5, dtype=torch.float64, generator=draw)
    return inputs, inputs[:, :3].argmax(1)


def make_model():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


@pytest.fixture
def problem():
    train, valid = data(0), data(1)
    return problem_from_module(make_model, cross_entropy, train, valid, batch_size=30)


@pytest.mark.parametrize("name", ["lr", "momentum"])
def test_torchopt_agrees_on_sgd(problem, name):
    values = {"lr": 0.3, "momentum": 0.8}
    training = Training(problem, find_rule("sgd"), STEPS, values=values)
    estimate, _ = Replay()(training, training.start([name]), seed=0)

    params, _ = problem.start(0)
    model = make_model()
    model.load_state_dict(params)
    hyper = torch.tensor(values[name], dtype=torch.float64, requires_grad=True)
    optimizer = torchopt.MetaSGD(model, **{**values, name: hyper})
    for _ in range(STEPS):
        # The whole training set is the batch, so its order does not matter.
        optimizer.step(cross_entropy(model(data(0)[0]), data(0)[1]))
    held_out = cross_entropy(model(data(1)[0]), data(1)[1])
    (expected,) = torch.autograd.grad(held_out, hyper)
    assert held_out.item() == pytest.approx(estimate.loss, rel=1e-12)
    assert expected.item() == pytest.approx(estimate.grad[name].item(), rel=1e-10)
