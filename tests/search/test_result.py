"""A result: read back equal, and usable by plain torch code that never heard of this project."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from hyperdescent.inner.registry import RULES, find_rule
from hyperdescent.inner.schedules.schedule import find_schedule
from hyperdescent.inner.torch_form import optimizer as optim
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.training.loop import run_training
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training
from hyperdescent.search.result import Result
from hyperdescent.search.tune import tune

SEED, STEPS = 3, 6


@pytest.fixture
def tuned(problem, ticking):
    def make(rule="adamw", **more):
        return tune(problem, rule, **{"steps": 4, "budget": "0.3s", "progress": False, **more})

    return make


class Recorder:
    """A dataset that remembers which examples it was asked for."""

    def __init__(self, dtype):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(60, 5, generator=generator, dtype=torch.float64).to(dtype)
        self.y = self.x[:, :3].argmax(1)
        self.asked = []

    def __len__(self):
        return 60

    def __getitem__(self, i):
        self.asked.append(i)
        return self.x[i], self.y[i]


def made(training, point):
    """The result of learning exactly this point."""
    in_force = training.resolve(point)
    return Result(
        rule=training.rule,
        hypers=point,
        options=training.rule.options(),
        loss=1.0,
        losses=[1.0],
        outcome=Outcome.OK,
        route="gradient",
        reason="",
        in_force=in_force.varying | in_force.constant,
        scheduled=list(training.schedules),
        defaults={},
    )


def both_ways(rule, point, *, schedules=None, granularity=None, values=None, dtype=torch.float64):
    """(weights by training.run, weights by a plain torch loop with the result's optimizer)."""
    data = Recorder(dtype)

    def model():
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)

    problem = problem_from_module(model, functional.cross_entropy, data, data, batch_size=20)
    found = {name: find_schedule(spec) for name, spec in (schedules or {}).items()}
    rule = find_rule(rule) if isinstance(rule, str) else rule
    training = Training(problem, rule, STEPS, found, granularity or {}, values or {})
    point = {name: torch.tensor(value, dtype=torch.float64) for name, value in point.items()}
    end = run_training(training, training.resolve(point), SEED).state
    batches = [data.asked[20 * i : 20 * i + 20] for i in range(STEPS)]
    assert len(data.asked) == 20 * STEPS

    result = made(training, point)
    net = model()
    net.load_state_dict(problem.start(SEED)[0])
    optimizer = result.optimizer(net)
    scheduler = result.scheduler(optimizer) if schedules else None
    for batch in batches:
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(data.x[batch]), data.y[batch])
        loss.backward()
        optimizer.step(loss=loss)
        if scheduler:
            scheduler.step()
    return end.p, torch.cat([p.detach().flatten() for p in net.parameters()])


# float32: six steps of a handful of roundings each.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


class TestTorchForm:
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("rule", RULES)
    def test_constant_values_train_alike(self, rule, dtype):
        point = {"lr": 0.05} | ({"beta1": 0.7} if "beta1" in RULES[rule].hypers else {})
        one, two = both_ways(rule, point, dtype=dtype)
        torch.testing.assert_close(one, two, rtol=0, atol=TOLERANCE[dtype])

    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_schedules_of_lr_and_beta1_train_alike(self, dtype):
        one, two = both_ways(
            "adamw",
            {"lr.knots": [0.1, 0.01, 0.05], "beta1.peak": 0.8, "beta1.floor": 0.3, "beta2": 0.9},
            schedules={"lr": "piecewise:3", "beta1": "cosine"},
            dtype=dtype,
        )
        torch.testing.assert_close(one, two, rtol=0, atol=TOLERANCE[dtype])

    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_a_value_per_tensor_trains_alike(self, dtype):
        one, two = both_ways(
            "alphagrad",
            {"alpha": [0.5, 3.0, 10.0, 100.0], "lr": 0.05, "momentum": 0.6},
            granularity={"alpha": "tensor"},
            dtype=dtype,
        )
        torch.testing.assert_close(one, two, rtol=0, atol=TOLERANCE[dtype])

    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_a_schedule_per_tensor_trains_alike(self, dtype):
        knots = [[0.1, 0.02, 0.03, 0.04], [0.01, 0.2, 0.03, 0.01]]
        one, two = both_ways(
            "alphagrad",
            {"lr.knots": knots, "alpha": [0.5, 3.0, 10.0, 100.0], "momentum.steps": [0.5] * STEPS},
            schedules={"lr": "piecewise:2", "momentum": "free"},
            granularity={"alpha": "tensor", "lr": "tensor"},
            dtype=dtype,
        )
        torch.testing.assert_close(one, two, rtol=0, atol=TOLERANCE[dtype])

    def test_options_reach_the_optimizer(self):
        rule = find_rule("sgd").choose(nesterov=True)
        one, two = both_ways(rule, {"lr": 0.1, "momentum": 0.8})
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
        plain, _ = both_ways("sgd", {"lr": 0.1, "momentum": 0.8})
        assert not torch.allclose(one, plain)

    def test_given_values_count_as_learned_ones(self):
        one, two = both_ways("sgd", {"momentum": 0.8}, values={"lr": 0.2})
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)

    def test_tuned_results_make_an_optimizer_and_a_scheduler(self, tuned):
        result = tuned(learn="lr,beta1", schedules={"lr": "piecewise:3"}, values={"beta2": 0.95})
        optimizer = result.optimizer(nn.Linear(2, 2))
        (group,) = optimizer.param_groups
        assert type(optimizer).__name__ == "AdamW"
        assert group["betas"] == (result.hypers["beta1"].item(), 0.95)
        scheduler, seen = result.scheduler(optimizer), []
        for _ in range(6):
            seen.append(group["lr"])
            optimizer.step()
            scheduler.step()
        expected = result.in_force["lr"].tolist()
        # After the last step the last value stays.
        assert seen == pytest.approx([*expected, expected[-1], expected[-1]])

    def test_groups_and_lists_of_parameters_are_taken(self, tuned):
        result, net = tuned(), nn.Linear(2, 2)
        for params in (net, net.parameters(), list(net.parameters()), [{"params": [net.weight]}]):
            assert result.optimizer(params).param_groups[0]["lr"] == result.hypers["lr"].item()

    def test_nothing_scheduled_says_so(self, tuned):
        result = tuned()
        with pytest.raises(ValueError, match="nothing is scheduled"):
            result.scheduler(result.optimizer(nn.Linear(2, 2)))

    def test_another_model_is_refused_where_values_are_per_tensor(self, tuned):
        result = tuned("alphagrad", learn="alpha", granularity={"alpha": "tensor"})
        with pytest.raises(
            ValueError, match="alpha holds 4 values for 6 parameter tensors"
        ) as told:
            result.optimizer(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)))
        assert "the model it was learned on" in str(told.value)

    def test_a_value_per_weight_has_no_torch_form(self, tuned):
        result = tuned("sgd", learn="weight_decay", granularity={"weight_decay": "element"})
        with pytest.raises(ValueError, match="weight_decay has a value for each of"):
            result.optimizer(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)))

    def test_frozen_parameters_are_left_out_per_tensor(self):
        data = Recorder(torch.float64)

        def model():
            net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
            net[0].bias.requires_grad_(False)
            return net

        problem = problem_from_module(model, functional.cross_entropy, data, data, batch_size=20)
        training = Training(problem, find_rule("sgd"), 2, granularity={"lr": "tensor"})
        point = {"lr": torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)}
        groups = made(training, point).optimizer(model()).param_groups
        assert [group["lr"].item() for group in groups] == pytest.approx([0.1, 0.2, 0.3])
        assert [len(group["params"]) for group in groups] == [1, 1, 1]


class TestFile:
    @pytest.mark.parametrize(
        ("rule", "more"),
        [
            ("adamw", {"learn": "lr,beta1", "schedules": {"lr": "piecewise:3"}}),
            ("sgd", {"learn": "momentum,nesterov,width,activation"}),
            ("alphagrad", {"learn": "alpha", "granularity": {"alpha": "tensor"}}),
        ],
    )
    def test_what_is_read_back_is_equal(self, tuned, tmp_path, rule, more):
        result = tuned(rule, out=tmp_path / "run", **more)
        result.save(tmp_path / "result.json")
        back = Result.load(tmp_path / "result.json")
        assert back.plain() == result.plain()
        assert (back.rule.name, back.rule.options()) == (result.rule.name, result.rule.options())
        assert back.outcome is result.outcome
        assert back.losses == result.losses and back.curves == result.curves
        for tensors in ("hypers", "in_force", "defaults"):
            torch.testing.assert_close(getattr(back, tensors), getattr(result, tensors))
        optimizers = [r.optimizer(r_model()) for r in (result, back)]
        one, two = ([dict(g, params=None) for g in o.param_groups] for o in optimizers)
        assert str(one) == str(two)

    def test_the_optimizer_of_a_result_read_back_is_the_registered_class(self, tuned, tmp_path):
        tuned().save(tmp_path / "result.json")
        optimizer = Result.load(tmp_path / "result.json").optimizer(nn.Linear(2, 2))
        assert type(optimizer) is optim.AdamW

    def test_what_json_lacks_is_null_and_comes_back_infinite(self, tuned, tmp_path):
        result = replace(
            tuned(), loss=math.inf, losses=[1.0, math.nan], curves={"learned": [(0, math.inf)]}
        )
        result.save(tmp_path / "result.json")
        plain = json.loads((tmp_path / "result.json").read_text())
        assert (plain["loss"], plain["losses"]) == (None, [1.0, None])
        back = Result.load(tmp_path / "result.json")
        assert (back.loss, back.losses) == (math.inf, [1.0, math.inf])
        assert back.curves == {"learned": [(0, math.inf)]}

    def test_it_prints_without_its_history(self, tuned):
        assert "seconds" not in repr(tuned())


def r_model():
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
