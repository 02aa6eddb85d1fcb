"""What a problem is made from, what it refuses, and that it is a pure function."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hyperdescent.inner.hyper import Choice, positive
from hyperdescent.inner.rules import find_rule
from hyperdescent.inner.schedule import find_schedule
from hyperdescent.meta.data import as_data, mix
from hyperdescent.meta.problem import Problem, problem_from_module
from hyperdescent.meta.training import Training


def net(width=4):
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))


def data(count=20):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, generator=generator), torch.arange(count) % 2


def build(make=net, loss_fn=F.cross_entropy, train=None, valid=None, batch_size=5, **options):
    train = data() if train is None else train
    valid = data() if valid is None else valid
    return problem_from_module(make, loss_fn, train, valid, batch_size=batch_size, **options)


class TestRefusals:
    @pytest.mark.parametrize("split", ["train", "valid", "test"])
    def test_empty_data(self, split):
        with pytest.raises(ValueError, match=f"net: the {split} data are empty"):
            build(**{split: data(0)})

    def test_an_empty_dataset(self):
        with pytest.raises(ValueError, match="the train data are empty"):
            build(train=torch.utils.data.TensorDataset(*data(0)))

    @pytest.mark.parametrize("batch_size", [0, -1, 21])
    def test_a_batch_that_cannot_be_drawn(self, batch_size):
        with pytest.raises(ValueError, match=rf"batch_size={batch_size} is outside \[1, 20\]"):
            build(batch_size=batch_size)

    def test_a_model_without_parameters(self):
        with pytest.raises(ValueError, match="tanh: the model has no parameters to train"):
            build(nn.Tanh, name="tanh")

    def test_a_model_with_only_frozen_parameters(self):
        with pytest.raises(ValueError, match="no parameters to train"):
            build(lambda: net().requires_grad_(False))

    def test_what_is_not_a_module(self):
        with pytest.raises(TypeError, match="make_model returned list, not an nn"):
            build(lambda: [1])

    def test_hypers_without_a_held_out_loss(self):
        with pytest.raises(ValueError, match=r"needs outer_loss_fn\(output, target\)"):
            build(hypers={"l2": positive(1e-2, search=(1e-6, 1.0))})

    def test_lengths_that_differ(self):
        inputs, target = data()
        with pytest.raises(ValueError, match=r"inputs hold \[20\] examples but there are 19"):
            build(train=(inputs, target[:-1]))
        with pytest.raises(ValueError, match=r"inputs hold \[20, 7\] examples"):
            build(train=((inputs, inputs[:7]), target))

    @pytest.mark.parametrize("given", [None, 3, iter([])])
    def test_what_is_not_data(self, given):
        with pytest.raises(TypeError, match=r"must be \(inputs, targets\) or a map-style Dataset"):
            as_data(given)

    def test_a_dataset_that_yields_no_pairs(self):
        whole = [{"x": torch.ones(3), "y": 1}] * 20
        made = build(train=whole)
        with pytest.raises(TypeError, match=r"list must yield \(inputs, target\) tuples"):
            made.inner_loss(*made.start(0), {}, 0, 0)

    def test_an_unknown_split(self):
        made = build()
        with pytest.raises(ValueError, match="net has no split 'test'; it has: train, valid"):
            made.measure(*made.start(0), "test")

    def test_an_unknown_option(self):
        made = build(choices={"width": Choice(4, (4, 8))})
        with pytest.raises(TypeError, match="net has no option 'widht'; did you mean 'width'"):
            made.choose(widht=8)
        with pytest.raises(ValueError, match="width=5 is not one of 4, 8"):
            made.choose(width=5)


class TestTrainingRefusals:
    def test_no_steps(self):
        with pytest.raises(ValueError, match="steps=0 trains nothing"):
            Training(build(), find_rule("sgd"), 0)

    def test_a_name_that_rule_and_loss_share(self):
        made = build(
            loss_fn=lambda output, target, hypers, params: F.cross_entropy(output, target),
            hypers={"lr": positive(1.0, search=(0.1, 1.0))},
            outer_loss_fn=F.cross_entropy,
        )
        with pytest.raises(ValueError, match="lr is a hyperparameter of sgd and of the loss of"):
            Training(made, find_rule("sgd"), 3)

    def test_names_that_do_not_exist(self):
        made, rule = build(), find_rule("sgd")
        with pytest.raises(ValueError, match="no hyper 'momentun'; did you mean 'momentum'"):
            Training(made, rule, 3).start(["momentun"])
        with pytest.raises(ValueError, match="no hyper 'beta1'"):
            Training(made, rule, 3, given={"beta1": 0.9})
        with pytest.raises(ValueError, match="no hyper 'beta1'"):
            Training(made, rule, 3, schedules={"beta1": find_schedule("cosine")})
        with pytest.raises(ValueError, match="lr has no grain 'layer'"):
            Training(made, rule, 3, grains={"lr": "layer"}).start(["lr"])

    def test_values_that_are_illegal(self):
        with pytest.raises(ValueError, match=r"lr=-1 is outside \[0, inf\)"):
            Training(build(), find_rule("sgd"), 3, given={"lr": -1.0})
        with pytest.raises(ValueError, match="momentum=0 has no place on its logit scale"):
            Training(build(), find_rule("sgd"), 3, given={"momentum": 0.0}).start(["momentum"])


class TestPurity:
    def test_is_a_problem(self):
        assert isinstance(build(), Problem)

    def test_a_seed_decides_the_start(self):
        made = build()
        once, again, other = (made.start(seed)[0] for seed in (1, 1, 2))
        assert all(torch.equal(once[n], again[n]) for n in once)
        assert not torch.equal(once["0.weight"], other["0.weight"])

    def test_the_loss_is_a_function_of_its_arguments(self):
        made = build(lambda: nn.Sequential(net(), nn.Dropout(0.5)))
        params, buffers = made.start(0)
        first = made.inner_loss(params, buffers, {}, 3, 0)[0]
        made.inner_loss(params, buffers, {}, 4, 0)
        assert torch.equal(first, made.inner_loss(params, buffers, {}, 3, 0)[0])
        assert not torch.equal(first, made.inner_loss(params, buffers, {}, 4, 0)[0])
        assert not torch.equal(first, made.inner_loss(params, buffers, {}, 3, 1)[0])

    def test_every_step_draws_its_own_mask(self):
        alike = torch.ones(20, 3), torch.zeros(20, dtype=torch.long)
        made = build(lambda: nn.Sequential(net(), nn.Dropout(0.5)), train=alike)
        state = made.start(0)
        losses = [float(made.inner_loss(*state, {}, step, 0)[0].detach()) for step in range(4)]
        assert len(set(losses)) > 1

    def test_a_seed_decides_the_order_of_the_batches(self):
        made = build(loss_fn=lambda output, target: (output.sum(1) * target).sum())
        state = made.start(0)
        once, again, other = (
            [float(made.inner_loss(*state, {}, step, seed)[0].detach()) for step in range(8)]
            for seed in (0, 0, 1)
        )
        assert once == again and len(set(once)) == 8
        assert not set(once) & set(other)

    def test_training_leaves_a_shared_model_alone(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        before = {name: x.clone() for name, x in model.state_dict().items()}
        run = Training(build(lambda: model), find_rule("adamw"), 7)
        assert run.run(run.resolve({}), 0) is not None
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())

    def test_a_module_that_writes_its_buffers_in_place_cannot_touch_the_callers(self):
        class Counting(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(3, 2)
                self.register_buffer("seen", torch.zeros(()))

            def forward(self, x):
                self.seen += 1
                return self.head(x)

        made = build(Counting)
        params, buffers = made.start(0)
        _, after = made.inner_loss(params, buffers, {}, 0, 0)
        assert float(buffers["seen"]) == 0 and float(after["seen"]) == 1
        run = Training(made, find_rule("sgd"), 7)
        assert float(run.run(run.resolve({}), 0).buffers["seen"]) == 7

    def test_seeds_mix_without_collisions(self):
        mixed = {mix(a, b, c) for a in range(30) for b in range(30) for c in range(3)}
        assert len(mixed) == 30 * 30 * 3
        assert all(0 <= number < 2**63 for number in mixed)
        assert mix(1, 2) != mix(2, 1)


class TestOptions:
    def test_the_model_takes_the_choice(self):
        made = build(choices={"width": Choice(4, (4, 8))}).choose(width=8)
        assert made.start(0)[0]["0.weight"].shape == (8, 3)
        assert build(choices={"width": Choice(4, (4, 8))}).start(0)[0]["0.weight"].shape == (4, 3)

    def test_batch_size_is_taken_by_the_problem(self):
        sizes = []

        def loss_fn(output, target):
            sizes.append(len(target))
            return F.cross_entropy(output, target)

        made = build(loss_fn=loss_fn, choices={"batch_size": Choice(5, (5, 10))})
        for problem in (made, made.choose(batch_size=10)):
            problem.inner_loss(*problem.start(0), {}, 0, 0)
        assert sizes == [5, 10]

    def test_several_inputs_reach_the_model(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(3, 2)

            def forward(self, x, y):
                return self.head(x - y)

        x, target = data()
        tensors = build(Two, train=((x, 2 * x), target), valid=((x, x), target))
        dataset = [(x[i], 2 * x[i], int(target[i])) for i in range(20)]
        examples = build(Two, train=dataset, valid=((x, x), target))
        state = tensors.start(0)
        assert torch.equal(
            tensors.inner_loss(*state, {}, 0, 0)[0], examples.inner_loss(*state, {}, 0, 0)[0]
        )

    def test_measure_reports_loss_and_metrics(self):
        def accuracy(output, target):
            return (output.argmax(-1) == target).float().mean()

        made = build(test=data(8), metrics={"accuracy": accuracy})
        params, buffers = made.start(0)
        for split in ("train", "valid", "test"):
            measured = made.measure(params, buffers, split)
            assert measured.keys() == {"loss", "accuracy"}
        assert 0 <= measured["accuracy"] <= 1
        expected = float(made.outer_loss(params, buffers, {}))
        assert made.measure(params, buffers, "valid")["loss"] == expected
