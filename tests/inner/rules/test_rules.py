"""Places where one rule needs care, beyond what tests/contracts asks of all of them."""

import copy
import pickle

import pytest
import torch

from hyperdescent.inner.core.hyper import learning_rate
from hyperdescent.inner.core.rule import Rule
from hyperdescent.inner.registry import RULES, find_rule
from hyperdescent.inner.torch_form.optimizer import torch_form

F64 = torch.float64


def number(x):
    return torch.tensor(x, dtype=F64)


def test_radams_waiting_steps_have_slopes_without_eps():
    values = {n: v.requires_grad_() for n, v in RULES["radam"].values({"eps": 0.0}).items()}
    p, g = torch.ones(2, dtype=F64), number([0.0, 1.0])
    end, _ = RULES["radam"](p, g, RULES["radam"].init(p, values), number(1.0), values)
    slopes = torch.autograd.grad(end.sum(), values.values(), materialize_grads=True)
    assert all(slope.isfinite() for slope in slopes)


def test_rmsprops_variance_of_a_constant_gradient_is_not_negative():
    rmsprop = RULES["rmsprop"].choose(centered=True)
    values = rmsprop.values({"alpha": 0.5})
    p = torch.zeros(1000, dtype=F64)
    g, s = torch.linspace(0.1, 10, 1000, dtype=F64), rmsprop.init(p, values)
    for step in range(1, 100):
        p, s = rmsprop(p, g, s, number(float(step)), values)
    assert (s["square_avg"] < s["grad_avg"] ** 2).any(), "rounding would make roots NaN"
    assert p.isfinite().all()


def test_dampening_without_momentum_does_nothing():
    def end(optimizer):
        p = torch.nn.Parameter(torch.ones(2))
        sgd = optimizer([p], lr=0.1, dampening=0.5)
        for _ in range(3):
            p.grad = torch.ones(2)
            sgd.step()
        return p.detach()

    assert torch.equal(end(torch_form(RULES["sgd"])), end(torch.optim.SGD))


def test_alphagrad_starts_at_the_root_of_the_size():
    start = RULES["alphagrad"].hypers["alpha"].shaped(2).starting_value(number([1.0, 4096.0]))
    assert torch.equal(start, number([1.0, 64.0]))


def test_alphagrad_is_normalised_descent_at_small_alpha_and_sign_descent_at_large():
    g, p = number([3.0, -4.0]), torch.zeros(2, dtype=F64)
    alphagrad = RULES["alphagrad"]

    def step(alpha):
        values = alphagrad.values({"lr": 1.0, "alpha": alpha, "eps": 0.0})
        return alphagrad(p, g, alphagrad.init(p, values), number(1.0), values)[0]

    torch.testing.assert_close(step(1e-5) / 1e-5, -g / 5, rtol=1e-9, atol=0)
    torch.testing.assert_close(step(1e3), -g.sign(), rtol=1e-9, atol=0)


def test_rules_are_found_by_name():
    assert find_rule("adamw") is RULES["adamw"]
    assert find_rule(RULES["sgd"]) is RULES["sgd"]
    with pytest.raises(
        ValueError, match=r"there is no rule 'alphagrd'; did you mean 'alphagrad'\?"
    ):
        find_rule("alphagrd")


def test_unknown_hyperparameters_and_options_are_named():
    with pytest.raises(TypeError, match="adam has no hyperparameter 'beta3'; did you mean 'beta"):
        RULES["adam"].values({"beta3": 0.9})
    with pytest.raises(TypeError, match="sgd has no option 'nestorov'; did you mean 'nesterov'"):
        RULES["sgd"].choose(nestorov=True)


def test_names_that_do_not_exist_are_answered_with_those_that_do():
    with pytest.raises(ValueError, match=r"there is no rule 'zzz'; known: .*\badam, .*\bsgd"):
        find_rule("zzz")
    with pytest.raises(ValueError, match=r"'adamm'; did you mean 'adam'\? known: .*\badam, "):
        find_rule("adamm")


def test_rules_are_pickled_by_name_with_their_options():
    assert pickle.loads(pickle.dumps(RULES["adam"])) is RULES["adam"]
    chosen = RULES["sgd"].choose(nesterov=True)
    assert pickle.loads(pickle.dumps(chosen)) == chosen


def plain_descent(p, g, s, t, lr):
    return p - lr * g, {}


def test_a_rule_that_is_not_registered_is_pickled_as_its_parts():
    own = Rule("adam", "Adam", {"lr": learning_rate(0.1)}, {}, {}, plain_descent)
    assert pickle.loads(pickle.dumps(own)) == own
    assert copy.deepcopy(own) == own
