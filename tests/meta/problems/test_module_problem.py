"""What a problem is made from, what it refuses, and that it is a pure function."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hyperdescent.inner.core.hyper import Choice, positive
from hyperdescent.inner.registry import find_rule
from hyperdescent.inner.schedules.schedule import find_schedule
from hyperdescent.meta.hypergradient import hypergradient
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.problems.problem import Problem, loss_at
from hyperdescent.meta.problems.seeding import fold_in
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.training.loop import held_out_curve, run_training
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training


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

    @pytest.mark.parametrize("accumulate", [0, -2, 2.0])
    def test_parts_that_cannot_be(self, accumulate):
        with pytest.raises(ValueError, match=f"net: accumulate={accumulate} parts of a batch"):
            build(accumulate=accumulate)

    def test_a_batch_that_cannot_be_divided(self):
        with pytest.raises(ValueError, match="batch_size=5 cannot be divided into accumulate=2"):
            build(accumulate=2)
        made = build(accumulate=5, choices={"batch_size": Choice(5, (5, 8))})
        with pytest.raises(ValueError, match="batch_size=8 cannot be divided into accumulate=5"):
            made.choose(batch_size=8)

    def test_types_to_compute_in(self):
        with pytest.raises(ValueError, match=r"float16 needs its loss scaled.*torch\.bfloat16"):
            build(autocast=torch.float16)
        with pytest.raises(ValueError, match=r"float32 is neither torch\.bfloat16 nor None"):
            build(autocast=torch.float32)
        with pytest.raises(ValueError, match=r"for float32 weights and these are torch\.float64"):
            build(lambda: net().double(), autocast=torch.bfloat16)

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

    @pytest.mark.parametrize("given", [3, data])
    @pytest.mark.parametrize("split", ["train", "valid", "test"])
    def test_what_is_not_data(self, split, given):
        message = r"must be \(inputs, targets\), a map-style Dataset or an iterable of batches, not"
        with pytest.raises(TypeError, match=message):
            build(**{split: given})

    def test_a_dataset_that_yields_no_pairs(self):
        whole = [{"x": torch.ones(3), "y": 1}] * 20
        made = build(train=whole)
        with pytest.raises(TypeError, match=r"list must yield \(inputs, target\) tuples"):
            loss_at(made, *made.start(0), {}, 0, 0)

    def test_a_dataset_that_yields_words(self):
        made = build(train=[("word", 1)] * 20)
        with pytest.raises(TypeError, match="list yields what collates to str; inputs and target"):
            loss_at(made, *made.start(0), {}, 0, 0)

    def test_losses_that_are_not_scalars(self):
        def each(output, target):
            return F.cross_entropy(output, target, reduction="none")

        message = r"loss function each returned shape \({}\); return a scalar, for example the mean"
        inner, outer = build(loss_fn=each), build(outer_loss_fn=each)
        with pytest.raises(ValueError, match=message.format("5,")):
            loss_at(inner, *inner.start(0), {}, 0, 0)
        with pytest.raises(ValueError, match=message.format("20,")):
            outer.outer_loss(*outer.start(0), {})
        with pytest.raises(ValueError, match=message.format("20,")):
            outer.measure(*outer.start(0), "valid")

    def test_an_unknown_split(self):
        made = build()
        with pytest.raises(ValueError, match="net has no split 'test'; known: train, valid"):
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
        with pytest.raises(ValueError, match=r"steps=5\.0 is not a whole number"):
            Training(build(), find_rule("sgd"), 5.0)

    def test_nothing_to_differentiate_in(self):
        for learn in ([], "", " , "):
            with pytest.raises(ValueError, match=r"learn names no hyper.*known: lr, momentum"):
                hypergradient(build(), "sgd", learn=learn, steps=2)
        estimate = hypergradient(build(), "sgd", learn="lr,,weight_decay,", steps=2)
        assert set(estimate.grad) == {"lr", "weight_decay"}

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
            Training(made, rule, 3, values={"beta1": 0.9})
        with pytest.raises(ValueError, match="no hyper 'beta1'"):
            Training(made, rule, 3, schedules={"beta1": find_schedule("cosine")})
        with pytest.raises(ValueError, match="lr has no granularity 'layer'"):
            Training(made, rule, 3, granularity={"lr": "layer"}).start(["lr"])

    def test_values_that_are_illegal(self):
        with pytest.raises(ValueError, match=r"lr=-1 is outside \[0, inf\)"):
            Training(build(), find_rule("sgd"), 3, values={"lr": -1.0})
        with pytest.raises(ValueError, match="momentum=0 has no place on its logit scale"):
            Training(build(), find_rule("sgd"), 3, values={"momentum": 0.0}).start(["momentum"])


class TestPurity:
    def test_a_problem_cannot_be_changed_once_made(self):
        # Compiled steps are kept for the object: a loss put in later would not be trained on.
        problem = build()
        with pytest.raises(AttributeError, match=r"loss_fn of net cannot be changed.*replace"):
            problem.loss_fn = F.mse_loss
        other = replace(problem, loss_fn=F.multi_margin_loss)
        params, buffers = problem.start(0)
        one, two = (loss_at(p, params, buffers, {}, 0, 0)[0] for p in (problem, other))
        assert float(one) != float(two)
        assert copy.deepcopy(problem).loss_fn is problem.loss_fn

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
        first = loss_at(made, params, buffers, {}, 3, 0)[0]
        loss_at(made, params, buffers, {}, 4, 0)
        assert torch.equal(first, loss_at(made, params, buffers, {}, 3, 0)[0])
        assert not torch.equal(first, loss_at(made, params, buffers, {}, 4, 0)[0])
        assert not torch.equal(first, loss_at(made, params, buffers, {}, 3, 1)[0])

    def test_every_step_draws_its_own_mask(self):
        alike = torch.ones(20, 3), torch.zeros(20, dtype=torch.long)
        made = build(lambda: nn.Sequential(net(), nn.Dropout(0.5)), train=alike)
        state = made.start(0)
        losses = [float(loss_at(made, *state, {}, step, 0)[0].detach()) for step in range(4)]
        assert len(set(losses)) > 1

    def test_a_seed_decides_the_order_of_the_batches(self):
        made = build(loss_fn=lambda output, target: (output.sum(1) * target).sum())
        state = made.start(0)
        once, again, other = (
            [float(loss_at(made, *state, {}, step, seed)[0].detach()) for step in range(8)]
            for seed in (0, 0, 1)
        )
        assert once == again and len(set(once)) == 8
        assert not set(once) & set(other)

    def test_training_leaves_a_shared_model_alone(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        before = {name: x.clone() for name, x in model.state_dict().items()}
        run = Training(build(lambda: model), find_rule("adamw"), 7)
        assert run_training(run, run.resolve({}), 0).ok
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())

    def test_a_kept_model_is_not_touched(self):
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
        made = build(lambda: model)
        loss_at(made, *made.start(0), {}, 0, 0)
        assert type(model[1]) is nn.BatchNorm1d and not model.training
        again = copy.deepcopy(model)
        assert again(data()[0]).shape == (20, 2)

    def test_a_model_with_tensors_that_cannot_be_copied(self):
        class Held(nn.Linear):
            def __init__(self):
                super().__init__(3, 2)
                self.twice = 2 * self.weight  # deepcopy refuses what is not a leaf.

        made = build(Held)
        assert loss_at(made, *made.start(0), {}, 0, 0)[0].isfinite()

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
        _, after = loss_at(made, params, buffers, {}, 0, 0)
        assert float(buffers["seen"]) == 0 and float(after["seen"]) == 1
        run = Training(made, find_rule("sgd"), 7)
        assert float(run_training(run, run.resolve({}), 0).state.buffers["seen"]) == 7

    def test_seeds_mix_without_collisions(self):
        mixed = {fold_in(a, b, c) for a in range(30) for b in range(30) for c in range(3)}
        assert len(mixed) == 30 * 30 * 3
        assert all(0 <= number < 2**63 for number in mixed)
        assert fold_in(1, 2) != fold_in(2, 1)


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
            loss_at(problem, *problem.start(0), {}, 0, 0)
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
        state = tensors.start(0)
        flat = [(x[i], 2 * x[i], int(target[i])) for i in range(20)]
        nested = [((x[i], 2 * x[i]), int(target[i])) for i in range(20)]
        for dataset in (flat, nested):
            examples = build(Two, train=dataset, valid=dataset)
            assert torch.equal(
                loss_at(tensors, *state, {}, 0, 0)[0], loss_at(examples, *state, {}, 0, 0)[0]
            )
            assert examples.outer_loss(*state, {}).isfinite()

    def test_other_choices_use_the_same_data(self):
        class Counting(list):
            read = 0

            def __getitem__(self, i):
                Counting.read += 1
                return super().__getitem__(i)

        x, target = data()
        held_out = Counting((x[i], int(target[i])) for i in range(20))
        made = build(valid=held_out, test=(x, target), choices={"width": Choice(4, (4, 8))})
        for width in (4, 8):
            other = made.choose(width=width)
            other.measure(*other.start(0), "valid")
            assert other.splits["test"].whole()[0].data_ptr() == x.data_ptr()
        assert Counting.read == 20

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


class Spy(nn.Module):
    """Notes the type and the size of what it sees, and writes into it."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.seen = nn.Linear(3, 4), nn.Linear(4, 2), []

    def forward(self, x):
        hidden = self.body(x)
        self.seen.append((len(x), hidden.dtype))
        x.zero_()
        return self.head(hidden)


class TestAccumulation:
    """What it differentiates is in test_real_models."""

    def test_the_model_sees_parts(self):
        made = build(Spy, batch_size=10, accumulate=5)
        with torch.no_grad():
            loss_at(made, *made.start(0), {}, 0, 0)
        assert made._model.module.seen == [(2, torch.float32)] * 5

    def test_every_part_draws_its_own_mask(self):
        def seen(output, target):
            drawn.append((output == 0).tolist())
            return F.cross_entropy(output, target)

        alike = torch.ones(20, 3), torch.zeros(20, dtype=torch.long)
        make = lambda: nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5))  # noqa: E731  # one use
        made = build(make, seen, train=alike, batch_size=2, accumulate=2)
        params, buffers = made.start(0)
        params = {name: p.requires_grad_() for name, p in params.items()}
        drawn = []
        loss, _ = loss_at(made, params, buffers, {}, 0, 0)
        assert drawn[0] != drawn[1]
        state = torch.get_rng_state()
        # What is done again draws what it drew, and nothing for anyone else.
        torch.autograd.grad(loss, list(params.values()))
        assert drawn[2:] in (drawn[:2], drawn[1::-1])
        assert torch.equal(torch.get_rng_state(), state)

    def test_only_the_graph_of_one_part_is_held(self):
        def held(parts):
            storages = {}

            def pack(x):
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            made = build(lambda: net(64), train=data(1000), batch_size=1000, accumulate=parts)
            params, buffers = made.start(0)
            params = {name: p.requires_grad_() for name, p in params.items()}
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                loss, _ = loss_at(made, params, buffers, {}, 0, 0)
                torch.autograd.grad(loss, list(params.values()), create_graph=True)
            return sum(storages.values())

        # The weights and what depends on them alone, without the 64 numbers of every example.
        assert held(1) > 64 * 4 * 1000 > 20 * held(10)

    def test_a_loss_may_differentiate_inside(self):
        def penalized(output, target, hypers, params):
            loss = F.cross_entropy(output, target)
            (slope,) = torch.autograd.grad(loss, params["0.weight"], create_graph=True)
            return loss + hypers["l2"].float() * slope.square().sum()

        hypers = {"l2": positive(0.1, search=(1e-6, 1.0))}
        grads = []
        for accumulate in (1, 5):
            made = build(
                loss_fn=penalized,
                train=tuple(x[:1].expand(10, *x.shape[1:]) for x in data()),
                batch_size=10,
                hypers=hypers,
                outer_loss_fn=F.cross_entropy,
                accumulate=accumulate,
            )
            run = Training(made, find_rule("sgd"), 3, values={"lr": 0.5})
            estimate, _ = Replay(compile=False)(run, run.start(["l2", "lr"]), seed=0)
            grads.append({name: float(x) for name, x in estimate.grad.items()})
        assert grads[0] == pytest.approx(grads[1], rel=1e-4)


class TestPrecision:
    def test_what_is_low_and_what_is_not(self):
        types = []

        def loss_fn(output, target):
            types.append((output.dtype, (output @ output.T).dtype))
            return F.cross_entropy(output, target)

        made = build(Spy, loss_fn, autocast=torch.bfloat16)
        run = Training(made, find_rule("adamw"), 2)
        state = run_training(run, run.resolve({}), 0).state
        assert made._model.module.seen == [(5, torch.bfloat16)] * 2
        assert types == [(torch.float32, torch.bfloat16)] * 2
        assert all(x.dtype == torch.float32 for x in (state.p, *state.slots.values()))
        assert made.outer_loss(*made.start(0), {}).dtype == torch.float32
        assert made._model.module.seen[2:] == [(20, torch.bfloat16)]
        assert not torch.is_autocast_enabled("cpu")

    def test_metrics_see_numbers_that_are_not_low(self):
        types = []

        def watched(output, target):
            types.append((output.dtype, torch.is_autocast_enabled("cpu")))
            return output.mean()

        made = build(autocast=torch.bfloat16, metrics={"mean": watched})
        made.measure(*made.start(0), "valid")
        assert types == [(torch.float32, False)]


def refusing(output, target):
    """A loss that validates what it is given, as torch.distributions does."""
    scale = output.square().mean(1) + 0.1
    return -torch.distributions.Normal(output[:, 0], scale).log_prob(target).mean()


class Refusing(nn.Linear):
    """A model that validates its weights."""

    def __init__(self):
        super().__init__(3, 2)

    def forward(self, x):
        if not self.weight.isfinite().all():
            raise ArithmeticError("bad weights")
        return super().forward(x)


class TestDivergence:
    @pytest.mark.parametrize(("make", "loss_fn"), [(net, refusing), (Refusing, F.cross_entropy)])
    def test_a_refusal_of_what_is_not_finite_is_divergence(self, make, loss_fn):
        def far(output, target):  # Steps of infinite length.
            return loss_fn(output, target) * 1e30

        run = Training(build(make, far), find_rule("sgd"), 20, values={"lr": 1e30})
        assert run_training(run, run.resolve({}), 0).outcome is Outcome.DIVERGED
        assert held_out_curve(run, run.start(["lr"]), 0)
        estimate, _ = Replay()(run, run.start(["lr"]), seed=0)
        assert estimate.note.outcome is Outcome.DIVERGED

    def test_a_held_out_loss_that_refuses_nan_is_nan(self):
        made = build(outer_loss_fn=refusing)
        params, buffers = made.start(0)
        params = {name: p * torch.nan for name, p in params.items()}
        assert made.outer_loss(params, buffers, {}).isnan()

    def test_other_exceptions_are_the_users(self):
        def broken(output, target):
            raise ArithmeticError("a bug")

        run = Training(build(loss_fn=broken), find_rule("sgd"), 3)
        with pytest.raises(ArithmeticError, match="a bug"):
            run_training(run, run.resolve({}), 0)
