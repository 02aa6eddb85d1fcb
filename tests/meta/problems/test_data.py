"""Streams: batches that come in an order of their own are read like any others, again and again."""

import random

import cloudpickle
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from hyperdescent.inner.core.hyper import Choice
from hyperdescent.inner.registry import find_rule
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.problems.problem import loss_at
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.training.loop import run_training
from hyperdescent.meta.training.training import Training

DOUBLE = torch.float64


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data(count=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, dtype=DOUBLE, generator=generator), torch.arange(count) % 2


def build(train, valid=None, **options):
    valid = data(8, seed=1) if valid is None else valid
    return problem_from_module(net, F.cross_entropy, train, valid, **options)


def loader(count=20, **options):
    return DataLoader(TensorDataset(*data(count)), **{"batch_size": 5, "shuffle": True, **options})


def read(problem, steps=9, seed=0):
    """The inputs that steps read, one after the other."""
    return [problem.batch(step, seed)[0] for step in range(steps)]


def same(one, two):
    return len(one) == len(two) and all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


class Noisy(IterableDataset):
    """Batches drawn from all three global generators, three of them before it ends."""

    def __iter__(self):
        for _ in range(3):
            noise = torch.randn(4, 3, dtype=DOUBLE) + np.random.randn() + random.gauss(0, 1)
            yield noise, torch.zeros(4, dtype=torch.long)


class Restarting:
    """What a generator function gives, anew each time: iterable, but neither Dataset nor list."""

    def __init__(self, make):
        self.make, self.started = make, 0

    def __iter__(self):
        self.started += 1
        return iter(self.make())


SHUFFLED = {
    "loader": loader,
    "loader with a generator": lambda: loader(generator=torch.Generator().manual_seed(7)),
    "sampler with a generator": lambda: loader(
        shuffle=False,
        sampler=RandomSampler(range(20), generator=torch.Generator().manual_seed(7)),
    ),
    "iterable dataset": Noisy,
    "iterable dataset in a loader": lambda: DataLoader(Noisy(), batch_size=None),
}


@pytest.mark.parametrize("make", SHUFFLED.values(), ids=SHUFFLED)
class TestRecord:
    def test_a_step_reads_the_same_at_every_seed_and_again(self, make):
        made = build(make())
        first = read(made)
        assert same(first, read(made, seed=1))
        assert torch.equal(made.batch(2, 5)[0], first[2])

    def test_whatever_was_read_first(self, make):
        ahead = build(make())
        ahead.batch(8, 0)
        assert same(read(build(make())), read(ahead))

    def test_is_the_same_whatever_was_drawn_before(self, make):
        given = make()
        recorded = []
        for outside in (1, 2):
            torch.manual_seed(outside)
            np.random.seed(outside)
            random.seed(outside)
            # The same object twice: what it was asked for before plays no part.
            recorded.append(read(build(given)))
        assert same(*recorded)

    def test_epochs_differ(self, make):
        batches = read(build(make()), steps=8)
        assert not any(torch.equal(batches[0], x) for x in batches[1:])

    def test_draws_nothing_outside(self, make):
        given = make()
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        read(build(given))
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
        owner = getattr(given, "sampler", None)
        if isinstance(getattr(owner, "generator", None), torch.Generator):
            fresh = torch.Generator().manual_seed(7)
            assert torch.equal(owner.generator.get_state(), fresh.get_state())

    def test_a_pickled_copy_reads_the_same(self, make):
        made = build(make())
        batches = read(made, steps=5)
        assert same(batches, read(cloudpickle.loads(cloudpickle.dumps(made)), steps=5))


class TestStream:
    def test_batches_are_those_of_the_loader(self):
        # Four batches an epoch, in order.
        batches = read(build(loader(shuffle=False)), steps=8)
        assert same(batches[:4], list(data()[0].split(5)))
        assert same(batches[:4], batches[4:])

    def test_an_epoch_shows_every_example_once(self):
        batches = read(build(loader()), steps=8)
        whole = data()[0][:, 0].sort().values
        for epoch in (batches[:4], batches[4:]):
            assert torch.equal(torch.cat(epoch)[:, 0].sort().values, whole)

    def test_the_seed_of_a_generator_decides(self):
        one, two = (
            read(build(loader(generator=torch.Generator().manual_seed(seed)))) for seed in (1, 2)
        )
        assert not same(one, two)

    def test_workers_change_nothing_that_is_not_drawn_in_them(self):
        assert same(read(build(loader())), read(build(loader(num_workers=1))))

    def test_what_workers_draw_is_the_same_again(self):
        def recorded():
            return read(build(DataLoader(Noisy(), batch_size=None, num_workers=1)), steps=4)

        assert same(recorded(), recorded())

    def test_is_iterated_again_only_when_it_has_ended(self):
        given = Restarting(lambda: zip(*(x.split(5) for x in data()), strict=True))
        made = build(given)
        read(made, steps=4)
        assert given.started == 1
        read(made, steps=9)
        assert given.started == 3

    def test_an_iterator_serves_as_long_as_it_lasts(self):
        batches = read(build(zip(*(x.split(5) for x in data()), strict=True)), steps=4)
        assert same(batches, list(data()[0].split(5)))

    def test_one_tensor_filled_again_and_again(self):
        def overwriting():
            buffer = torch.empty(4, 3, dtype=DOUBLE)
            for k in range(3):
                yield buffer.fill_(k), torch.zeros(4, dtype=torch.long)

        made = build(Restarting(overwriting))
        made.batch(2, 0)
        assert [float(x.mean()) for x in read(made, steps=4)] == [0, 1, 2, 0]

    def test_a_model_that_writes_into_its_inputs(self):
        made = build(loader())
        read(made)[0].zero_()
        assert read(made)[0].abs().sum() > 0

    def test_arrays_and_several_inputs(self):
        x, y = np.ones((4, 3)), np.zeros(4, dtype=np.int64)
        made = build(Restarting(lambda: [((x, 2 * x), y), (x, 2 * x, y)]))
        for step in (0, 1):
            (one, two), target = made.batch(step, 0)
            assert torch.equal(two, 2 * one) and target.dtype == torch.long

    def test_other_choices_read_the_same_record(self):
        given = Restarting(lambda: zip(*(x.split(5) for x in data()), strict=True))
        made = problem_from_module(
            lambda width: nn.Linear(3, 2).double(),
            F.cross_entropy,
            given,
            data(),
            choices={"width": Choice(4, (4, 8))},
        )
        first = read(made, steps=4)
        assert same(first, read(made.choose(width=8), steps=4))
        assert given.started == 1

    def test_is_no_split_to_measure(self):
        made = build(loader())
        assert set(made.splits) == {"valid"}
        with pytest.raises(ValueError, match="no split 'train'; known: valid"):
            made.measure(*made.start(0), "train")

    def test_trains_like_the_tensors(self):
        """On one batch an epoch, within which the order does not matter."""
        estimates = []
        for made in (build(data(), batch_size=20), build(loader(batch_size=20))):
            run = Training(made, find_rule("sgd"), 3, values={"lr": 0.5})
            estimates.append(Replay(compile=False)(run, run.start(["lr"]), seed=0)[0])
        by_tensors, by_stream = estimates
        assert by_stream.loss == pytest.approx(by_tensors.loss, rel=1e-13)
        assert float(by_stream.grad["lr"]) == pytest.approx(float(by_tensors.grad["lr"]), rel=1e-11)


class TestHeldOut:
    def test_a_loader_is_read_as_a_whole_and_once(self):
        given = Restarting(lambda: zip(*(x.split(3) for x in data()), strict=True))
        made = build(data(), valid=given, test=loader(shuffle=False), batch_size=5)
        plain = build(data(), valid=data(), batch_size=5)
        state = plain.start(0)
        for _ in range(2):
            assert torch.equal(made.outer_loss(*state, {}), plain.outer_loss(*state, {}))
        assert made.measure(*state, "test") == plain.measure(*state, "valid")
        assert given.started == 1

    def test_other_choices_use_the_same_batches(self):
        given = Restarting(lambda: zip(*(x.split(3) for x in data()), strict=True))
        made = build(data(), given, choices={"batch_size": Choice(5, (5, 10))})
        for problem in (made, made.choose(batch_size=10)):
            problem.measure(*problem.start(0), "valid")
        assert given.started == 1

    def test_an_empty_one(self):
        made = build(data(), valid=iter([]), batch_size=5)
        with pytest.raises(ValueError, match="list_iterator of held-out batches is empty"):
            made.outer_loss(*made.start(0), {})


class TestRefusals:
    def test_a_batch_size_with_a_stream(self):
        with pytest.raises(ValueError, match=r"batch_size=5 is given, but .* the DataLoader makes"):
            build(loader(), batch_size=5)
        with pytest.raises(ValueError, match="batch_size=5 is given"):
            build(loader(), choices={"batch_size": Choice(5, (5, 10))})

    @pytest.mark.parametrize("train", [data(), TensorDataset(*data())], ids=["tensors", "dataset"])
    def test_no_batch_size_without_one(self, train):
        with pytest.raises(ValueError, match="batch_size is missing; say how many of the 20"):
            build(train)
        assert len(read(build(train, choices={"batch_size": Choice(5, (5, 10))}))[0]) == 5

    @pytest.mark.parametrize("given", [iter([]), Restarting(list), loader(0, shuffle=False)])
    def test_an_empty_stream(self, given):
        with pytest.raises(ValueError, match="of batches is empty; give at least one batch"):
            build(given).batch(0, 0)

    def test_an_iterator_that_runs_out(self):
        run = Training(build(iter([data()] * 3)), find_rule("sgd"), 4)
        with pytest.raises(ValueError, match="list_iterator of batches ran out after 3"):
            run_training(run, run.resolve({}), 0)

    def test_one_that_is_empty_the_second_time(self):
        left = [data()]
        made = build(Restarting(lambda: [left.pop()] if left else []))
        with pytest.raises(ValueError, match="Restarting of batches ran out after 1"):
            made.batch(1, 0)

    @pytest.mark.parametrize("batch", [{"x": 1}, torch.ones(2, 3), [torch.ones(3)], "ab"])
    def test_a_batch_that_is_no_pair(self, batch):
        name = type(batch).__name__
        made = build(iter([batch]))
        with pytest.raises(
            TypeError, match=rf"yield \(inputs, target\) batches; it yielded {name}"
        ):
            made.batch(0, 0)

    def test_a_batch_of_words(self):
        made = build(iter([(["a", "b"], torch.zeros(2))]))
        with pytest.raises(TypeError, match="list_iterator yields batches that hold str; inputs"):
            made.batch(0, 0)

    def test_shapes_that_change_where_parts_are_asked_for(self):
        made = build(loader(18), accumulate=5)
        loss_at(made, *made.start(0), {}, 0, 0)
        with pytest.raises(ValueError, match="3 examples cannot be divided by accumulate=5"):
            loss_at(made, *made.start(0), {}, 3, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies to a GPU need one")
@pytest.mark.parametrize("train", [data, loader, lambda: TensorDataset(*data())])
def test_on_cuda_batches_arrive(train):
    def made(device):
        options = {} if train is loader else {"batch_size": 5}
        return problem_from_module(
            lambda: net().to(device), F.cross_entropy, train(), data(8, seed=1), **options
        )

    for host, there in zip(read(made("cpu")), read(made("cuda")), strict=True):
        assert there.device.type == "cuda" and torch.equal(host, there.cpu())
