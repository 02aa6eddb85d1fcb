"""Our rules inside higher's loops: against finite differences and against Replay."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from points import EVERY_RULE, values_in_nets
from torch import nn

from hyperdescent.inner.registry import RULES, find_rule
from hyperdescent.inner.torch_form import optimizer as optim
from hyperdescent.meta.higher_bridge import differentiable_form, register
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.training.training import Training

higher = pytest.importorskip("higher")
register()

DOUBLE = torch.float64
STEPS = 10
# eps is large enough to move the loss by more than rounding.
VALUES = {
    "adamw": {"lr": 0.05, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.1},
    "alphagrad": {
        "lr": 0.05,
        "alpha": 3.0,
        "eps": 1e-3,
        "momentum": 0.7,
        "dampening": 0.2,
        "weight_decay": 0.1,
    },
    "nadam": {"lr": 0.05, "beta1": 0.8, "beta2": 0.9, "momentum_decay": 0.1},
    "adagrad": {"lr": 0.2, "initial_accumulator_value": 0.05, "lr_decay": 0.1},
}


def examples(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(30, 4, dtype=DOUBLE, generator=generator)
    return inputs, inputs[:, :3].argmax(1)


TRAIN, VALID = examples(0), examples(1)


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def model(seed=0):
    """The network from the start that our problem gives it."""
    params, _ = problem().start(seed)
    made = net()
    made.load_state_dict(params)
    return made


def problem():
    return problem_from_module(net, F.cross_entropy, TRAIN, VALID, batch_size=30)


def tensors(values, grad=True):
    return {
        n: torch.tensor(v, dtype=DOUBLE, requires_grad=grad) if isinstance(v, float) else v
        for n, v in values.items()
    }


def loss_after(opt, override, made, steps=STEPS):
    with higher.innerloop_ctx(made, opt, override=override) as (fmodel, diffopt):
        for _ in range(steps):
            diffopt.step(F.cross_entropy(fmodel(TRAIN[0]), TRAIN[1]))
        return F.cross_entropy(fmodel(VALID[0], params=diffopt.readout()), VALID[1])


def torch_step(opt, made):
    opt.zero_grad()
    loss = F.cross_entropy(made(TRAIN[0]), TRAIN[1])
    loss.backward()
    opt.step(loss=loss)


def unrolled(rule, values):
    made = model()
    opt = optim.torch_form(RULES[rule.name])(made.parameters(), **rule.chosen)
    return loss_after(opt, {n: [v] for n, v in values.items()}, made)


@pytest.mark.parametrize("name", VALUES)
class TestGradients:
    def test_against_finite_differences(self, name):
        values = tensors(VALUES[name])
        exact = torch.autograd.grad(unrolled(RULES[name], values), list(values.values()))
        for (hyper, value), slope in zip(VALUES[name].items(), exact, strict=True):
            h = 2e-3 * (value * (1 - value) if "beta" in hyper else value)

            def loss(moved, hyper=hyper):
                values = tensors(VALUES[name] | {hyper: moved}, grad=False)
                return float(unrolled(RULES[name], values).detach())

            def central(h, value=value, loss=loss):
                return (loss(value + h) - loss(value - h)) / (2 * h)

            expected = (4 * central(h / 2) - central(h)) / 3
            assert expected != 0
            assert float(slope) == pytest.approx(expected, rel=1e-7), hyper


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
class TestEveryRule:
    def test_is_replay(self, rule):
        rule = EVERY_RULE[rule.name]
        values = tensors(values_in_nets(rule))
        loss = unrolled(rule, values)
        exact = torch.autograd.grad(loss, list(values.values()), materialize_grads=True)
        run = Training(problem(), rule, STEPS, values=values_in_nets(rule))
        estimate, _ = Replay()(run, {n: v.detach() for n, v in values.items()}, seed=0)
        assert float(loss.detach()) == pytest.approx(estimate.loss, rel=1e-12)
        for hyper, slope in zip(values, exact, strict=True):
            torch.testing.assert_close(
                slope, estimate.grad[hyper], rtol=1e-9, atol=1e-13, msg=hyper
            )

    def test_takes_the_steps_of_the_torch_form(self, rule):
        made, twin = model(), model()
        # What is below a loss of the other sign, for rules that know such a number.
        below = {"c": 10.0, "floor": -9.0, "f_star": -9.0}
        options = {"lr": 0.01, "maximize": True}
        options |= {name: value for name, value in below.items() if name in rule.hypers}
        opt = optim.torch_form(rule)(twin.parameters(), **options)
        with higher.innerloop_ctx(made, optim.torch_form(rule)(made.parameters(), **options)) as (
            fmodel,
            diffopt,
        ):
            for _ in range(4):
                diffopt.step(F.cross_entropy(fmodel(TRAIN[0]), TRAIN[1]))
                torch_step(opt, twin)
            for ours, torchs in zip(fmodel.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-14)

    def test_goes_on_from_a_started_optimizer(self, rule):
        made, twin = model(), model()
        opts = [optim.torch_form(rule)(m.parameters(), lr=0.01) for m in (made, twin)]
        for step in range(5):
            for m, opt in zip((made, twin), opts, strict=True):
                if step < 3 or m is twin:
                    torch_step(opt, m)
        opts[1].eval()
        expected = F.cross_entropy(twin(VALID[0]), VALID[1])
        torch.testing.assert_close(loss_after(opts[0], None, made, 2), expected, rtol=1e-12, atol=0)
        assert opts[0].param_groups[0]["t"] == 3  # higher works on copies

    def test_reaches_the_starting_weights(self, rule):
        made = model()
        opt = optim.torch_form(rule)(made.parameters(), lr=0.01)
        with higher.innerloop_ctx(made, opt, copy_initial_weights=False) as (fmodel, diffopt):
            diffopt.step(F.cross_entropy(fmodel(TRAIN[0]), TRAIN[1]))
            loss = F.cross_entropy(fmodel(VALID[0]), VALID[1])
            grads = torch.autograd.grad(loss, list(made.parameters()))
        assert all(bool(g.isfinite().all()) and bool(g.any()) for g in grads)


class TestOverride:
    def test_betas_are_a_pair_or_apart(self):
        made = model()
        opt = optim.AdamW(made.parameters(), lr=0.05)
        beta1, beta2 = (torch.tensor(b, dtype=DOUBLE, requires_grad=True) for b in (0.8, 0.9))
        pair = loss_after(opt, {"betas": [(beta1, beta2)]}, made)
        apart = loss_after(opt, {"beta2": [beta2], "beta1": [beta1]}, made)
        assert torch.equal(pair, apart)
        slopes = [torch.autograd.grad(loss, [beta1, beta2]) for loss in (pair, apart)]
        assert slopes[0] == slopes[1] and all(slopes[0])

    def test_one_of_the_pair_leaves_the_other(self):
        made = model()
        opt = optim.AdamW(made.parameters(), lr=0.05, betas=(0.7, 0.9))
        alone = loss_after(opt, {"beta2": [torch.tensor(0.8, dtype=DOUBLE)]}, made)
        pair = loss_after(opt, {"betas": [(0.7, 0.8)]}, made)
        assert torch.equal(alone, pair)

    def test_a_step_overrides_the_context(self):
        made = model()
        opt = optim.AdamW(made.parameters(), betas=(0.7, 0.9))
        rates = torch.tensor([0.1, 0.01, 0.05], dtype=DOUBLE, requires_grad=True)
        with higher.innerloop_ctx(made, opt, override={"beta1": [0.8]}) as (fmodel, diffopt):
            for rate in rates:
                loss = F.cross_entropy(fmodel(TRAIN[0]), TRAIN[1])
                diffopt.step(loss, override={"lr": [rate]})
            (slope,) = torch.autograd.grad(F.cross_entropy(fmodel(VALID[0]), VALID[1]), rates)
        assert bool(slope.all()) and len(slope.unique()) == 3

    def test_a_group_each(self):
        made = model()
        opt = optim.SGD([{"params": made[0].parameters()}, {"params": made[2].parameters()}])
        rates = [torch.tensor(v, dtype=DOUBLE, requires_grad=True) for v in (0.5, 0.1)]
        slopes = torch.autograd.grad(loss_after(opt, {"lr": rates}, made), rates)
        assert slopes[0] != slopes[1] and all(slopes)

    def test_highers_own_trainable_dictionary(self):
        made = model()
        opt = optim.AdamW(made.parameters(), lr=0.05)
        override = higher.optim.get_trainable_opt_params(opt)
        loss = loss_after(opt, override, made)
        lr, (beta1, beta2) = override["lr"][0], override["betas"][0]
        assert all(torch.autograd.grad(loss, [lr, beta1, beta2]))

    def test_what_does_not_exist_is_refused(self):
        made = model()
        opt = optim.AdamW(made.parameters())
        with pytest.raises(TypeError, match="AdamW has no override 'learning_rate'"):
            loss_after(opt, {"learning_rate": [0.1]}, made)
        with pytest.raises(ValueError, match=r"beta1=1.5 is outside \[0, 1\)"):
            loss_after(opt, {"betas": [(1.5, 0.9)]}, made)
        with pytest.raises(ValueError, match=r"lr has shape \(2,\)"):
            loss_after(opt, {"lr": [torch.ones(2)]}, made)


class TestParameters:
    def test_frozen_ones_stay(self):
        made = model()
        made[0].requires_grad_(False)
        opt = optim.AdamW(made.parameters(), lr=0.05)
        with higher.innerloop_ctx(made, opt) as (fmodel, diffopt):
            for _ in range(2):
                diffopt.step(F.cross_entropy(fmodel(TRAIN[0]), TRAIN[1]))
            first, *_, last = fmodel.parameters()
        assert torch.equal(first, made[0].weight) and not torch.equal(last, made[2].bias)

    def test_single_numbers_and_float32(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.tensor(1.5))

            def forward(self, x):
                return self.scale * x

        for name in RULES:
            made = Scaled()
            opt = optim.torch_form(RULES[name])(made.parameters(), lr=0.1)
            with higher.innerloop_ctx(made, opt) as (fmodel, diffopt):
                for _ in range(2):
                    diffopt.step(fmodel(torch.ones(3)).square().sum())
                (scale,) = fmodel.parameters()
            assert scale.shape == () and scale.dtype == torch.float32
            assert float(scale.detach()) < 1.5

    def test_test_mode_keeps_no_graph(self):
        made = model()
        opt = optim.Adam(made.parameters(), lr=0.05, weight_decay=0.1)
        with higher.innerloop_ctx(made, opt, track_higher_grads=False) as (fmodel, diffopt):
            diffopt.step(F.cross_entropy(fmodel(TRAIN[0]), TRAIN[1]))
            slots = [x for state in diffopt.state[0].values() for x in state.values()]
        assert slots and not any(x.requires_grad for x in slots)


def test_registering_again_does_no_harm():
    register()
    assert differentiable_form(RULES["adamw"]).__name__ == "DifferentiableAdamW"


def test_importing_the_bridge_does_not_import_higher():
    code = "import sys, hyperdescent.meta.higher_bridge; assert 'higher' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_rule_over_models_with_a_shared_number_begins():
    """Its group has the number before the first step."""
    made, twin = model(), model()
    form = optim.torch_form(find_rule("clip_norm(nadam)"))
    opt = form(twin.parameters(), lr=0.01)
    differentiable = differentiable_form(form.rule)(
        form(made.parameters(), lr=0.01), made.parameters()
    )
    params = list(made.parameters())
    for _ in range(3):
        loss = F.cross_entropy(
            torch.func.functional_call(made, named(made, params), TRAIN[0]), TRAIN[1]
        )
        params = differentiable.step(loss, params=params)
        opt.zero_grad()
        F.cross_entropy(twin(TRAIN[0]), TRAIN[1]).backward()
        opt.step()
    for ours, torchs in zip(params, twin.parameters(), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-14)


def named(made, params):
    return dict(zip(dict(made.named_parameters()), params, strict=True))
