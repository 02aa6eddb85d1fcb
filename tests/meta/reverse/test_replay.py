"""Replayed metagradients against finite differences through whole trainings, in float64.

The points are chosen so that the differences themselves are good to about 1e-9: every hyper in
play must move the loss by well more than rounding (so eps is 1e-3 beside gradients of 0.1, not
1e-8), no step may sit on the kink of a schedule's clamp or of an activation (so tanh, and shares
of training that end between two steps), and the difference moves each hyper in its unconstrained
coordinate, where one unit means a factor e.
"""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import Around, Late, mlp
from points import EVERY_RULE, sloped, values_in_nets
from torch import nn

from hyperdescent.inner.core.hyper import fraction, positive
from hyperdescent.inner.registry import find_rule
from hyperdescent.inner.schedules.schedule import SCHEDULES, find_schedule
from hyperdescent.meta.problems.data import example_indices
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.problems.problem import loss_at
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.training.finite_differences import directional_difference, held_out_loss
from hyperdescent.meta.training.loop import run_training
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training

DOUBLE = torch.float64
STEPS = 12
TOLERANCE = 1e-7


def examples(count, *shape, classes=3, seed=0, dead=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, *shape, dtype=DOUBLE, generator=generator)
    inputs[:, :dead] = 0
    target = inputs.flatten(1)[:, dead : dead + classes].argmax(1)
    noisy = torch.rand(count, generator=generator) < 0.2
    return inputs, torch.where(noisy, (target + 1) % classes, target)


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 3),
    ).double()


def dropout_net():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)).double()


SHAPES = {"mlp": (5,), "cnn": (1, 6, 6), "dropout_net": (5,)}


def problem(make=mlp, loss_fn=F.cross_entropy, *, dead=0, **options):
    shape = SHAPES.get(make.__name__, (5,))
    train, valid = examples(40, *shape, dead=dead), examples(30, *shape, seed=1, dead=dead)
    return problem_from_module(make, loss_fn, train, valid, batch_size=10, **options)


def smoothed(output, target, *, hypers, params):
    """Cross-entropy with learned label smoothing and L2 penalty."""
    log_p = output.log_softmax(-1)
    hard, soft = -log_p.gather(-1, target[:, None]).mean(), -log_p.mean()
    s = hypers["smoothing"]
    penalty = sum((p * p).sum() for p in params.values())
    return (1 - s) * hard + s * soft + hypers["l2"] / 2 * penalty


LOSS_HYPERS = {
    "smoothing": fraction(0.1),
    "l2": positive(1e-2, search=(1e-6, 1.0)),
}


def penalized(make=mlp):
    return problem(make, smoothed, hypers=LOSS_HYPERS, outer_loss_fn=F.cross_entropy)


def training(rule="adamw", of=None, **options):
    rule = find_rule(rule)
    options["values"] = {**values_in_nets(rule), **options.get("values", {})}
    return Training(of or problem(), rule, STEPS, **options)


def coordinate_direction(run, point, generator=None):
    """The change of values under a (random) unit change of their unconstrained coordinates."""
    direction = {}
    for name, value in point.items():
        free = run.hypers[name].free(value).requires_grad_()
        (slope,) = torch.autograd.grad(run.hypers[name].value(free).sum(), free)
        wave = torch.ones_like(value)
        if generator is not None:
            wave = torch.randn(value.shape, dtype=DOUBLE, generator=generator)
        direction[name] = slope * wave
    return direction


def assert_exact(run, names, *, seed=0, h=2e-3):
    """All hypers together in a random direction, and every one alone."""
    point = run.start(names)
    estimate, _ = Replay()(run, point, seed=seed)
    assert estimate.ok, estimate.note.reason
    assert estimate.loss == float(held_out_loss(run, point, seed))
    generator = torch.Generator().manual_seed(5)
    together = coordinate_direction(run, point, generator)
    alone = [{n: d if n == name else 0 * d for n, d in together.items()} for name in point]
    for direction in [together, *alone] if len(alone) > 1 else [together]:
        exact = sum(float((estimate.grad[n] * d).sum()) for n, d in direction.items())
        expected = directional_difference(run, point, direction, seed=seed, h=h)
        moved = [n for n, d in direction.items() if bool(d.any())]
        assert expected != 0, f"{moved} does not move the loss"
        assert exact == pytest.approx(expected, rel=TOLERANCE), moved


@pytest.mark.parametrize("rule", EVERY_RULE.values(), ids=lambda rule: rule.name)
class TestEveryRule:
    def test_exact_in_every_hyper(self, rule):
        assert_exact(training(rule), sloped(rule))

    def test_dead_inputs_stay_finite(self, rule):
        # At the default eps and wd, where a weight without a gradient has second moment 0.
        run = Training(problem(dead=2), rule, STEPS, values={"lr": 0.01})
        point = {name: v for name, v in run.defaults().items() if name in rule.hypers}
        estimate, _ = Replay()(run, point, seed=0)
        assert estimate.ok, estimate.note.reason
        assert set(estimate.grad) == set(rule.hypers)

    def test_dead_inputs_are_exact(self, rule):
        # Nearer than elsewhere, because a sign or a mask that turns in between is a jump.
        assert_exact(training(rule, problem(dead=2)), ["lr"], h=2e-4)


@pytest.mark.parametrize("rule", ["sgd", "adamw", "alphagrad"])
@pytest.mark.parametrize("make", [cnn, dropout_net], ids=lambda make: make.__name__)
def test_exact_on_every_net(make, rule):
    assert_exact(training(rule, problem(make)), list(find_rule(rule).hypers))


def test_the_path_through_running_statistics_matters():
    """The same metagradient with the statistics cut off differs, so the test above sees them."""

    class Cut(Around):
        def outer_loss(self, params, buffers, hypers):
            fixed = {n: b.detach() for n, b in buffers.items()}
            return self.problem.outer_loss(params, fixed, hypers)

    whole, cut = (
        Replay()(run, run.start(["lr"]), seed=0)[0]
        for run in (training("sgd", of(problem(cnn))) for of in (lambda same: same, Cut))
    )
    assert cut.loss == whole.loss
    assert float(cut.grad["lr"]) != pytest.approx(float(whole.grad["lr"]), rel=1e-3)


@pytest.mark.parametrize("make", [mlp, cnn, dropout_net], ids=lambda make: make.__name__)
def test_exact_in_hypers_of_the_loss(make):
    assert_exact(training("adamw", penalized(make)), ["smoothing", "l2", "lr"], h=1e-3)


class HeldOutToo:
    """A problem whose held-out loss depends on a hyper of the loss directly."""

    def __init__(self, problem):
        self.problem = problem

    def __getattr__(self, name):
        return getattr(self.problem, name)

    def outer_loss(self, params, buffers, hypers):
        return self.problem.outer_loss(params, buffers, hypers) + hypers["l2"] ** 2


@pytest.mark.parametrize("spec", ["constant", "cosine"])
def test_exact_where_a_hyper_also_enters_the_held_out_loss(spec):
    of = HeldOutToo(penalized())
    assert_exact(training(of=of, values={"l2": 0.3}), ["l2", "lr"])
    assert_exact(scheduled("l2", spec, of=of), ["l2"])


KNOBS = {
    "warmup": 0.33,  # 3.96 steps
    "decay": 0.41,  # 4.92 steps: far from the infinite slope where 1 - sqrt begins
    "up": 0.33,
    "period": 0.29,  # 3.48 steps, and 5.9 more: restarts are far from steps
    "mult": 1.7,
    "gamma": 0.6,
    "floor": 0.2,
    "power": 1.5,
    "div": 5.0,
    "final_div": 4.0,
}
SPECS = [
    *sorted({*SCHEDULES} - {"piecewise"}),
    "piecewise:5",
    "warmup_stable_decay:cosine",
    "warmup_stable_decay:1-sqrt",
]


def scheduled(name, spec, rule="adamw", of=None, **options):
    options["schedules"] = {name: find_schedule(spec)}
    run = training(rule, of, **options)
    own = {f"{name}.{knob}": KNOBS[knob] for knob in KNOBS if f"{name}.{knob}" in run.hypers}
    return training(rule, of, values=own, **options)


@pytest.mark.parametrize("spec", SPECS)
class TestEverySchedule:
    def test_exact_in_every_knob_of_lr(self, spec):
        assert_exact(scheduled("lr", spec), ["lr"])

    def test_exact_in_every_knob_of_beta1(self, spec):
        assert_exact(scheduled("beta1", spec), ["beta1"])

    def test_exact_in_every_knob_of_a_loss_hyper(self, spec):
        # A unit of smoothing is its whole range, so h is finer than for a factor e.
        assert_exact(scheduled("smoothing", spec, of=penalized()), ["smoothing"], h=1e-3)


class TestMemory:
    """Keeping a step's graph or doing the step again must not change a bit."""

    @pytest.mark.parametrize("make", [mlp, cnn, dropout_net])
    def test_every_mixture_of_graphs_and_states_gives_the_same_bits(self, make):
        run = training("adamw", problem(make), schedules={"lr": find_schedule("piecewise:3")})
        point = run.start(["lr", "beta1", "weight_decay"])
        whole, _ = Replay()(run, point, seed=1)
        assert whole.note.graphs == STEPS
        kept = set()
        for memory in (0, 8_000, 20_000, 60_000, 100_000, 150_000):
            estimate, _ = Replay(memory=memory)(run, point, seed=1)
            kept.add((estimate.note.graphs, estimate.note.states))
            assert estimate.loss == whole.loss
            assert all(torch.equal(estimate.grad[n], whole.grad[n]) for n in point)
        # Some states by revolve, all states, states and graphs.
        assert len(kept) >= 4 and {0} < {graphs for graphs, _ in kept}

    def test_more_memory_keeps_more_graphs(self):
        run = training("adamw", problem(mlp))
        point = run.start(["lr"])
        kept = [Replay(m)(run, point, seed=0)[0].note.graphs for m in (0, 30_000, 40_000, 2**30)]
        assert kept == sorted(set(kept)) and kept[-1] == STEPS


class TestGrains:
    @pytest.mark.parametrize("rule", ["adamw", "alphagrad", "adagrad"])
    @pytest.mark.parametrize("granularity", ["tensor", "element"])
    def test_exact(self, rule, granularity):
        names = [
            n
            for n in ("lr", "beta2", "alpha", "initial_accumulator_value")
            if n in find_rule(rule).hypers
        ]
        assert_exact(training(rule, granularity=dict.fromkeys(names, granularity)), names)

    def test_a_per_tensor_schedule_is_exact(self):
        run = training(
            "adamw", schedules={"lr": find_schedule("cosine")}, granularity={"lr": "tensor"}
        )
        assert_exact(run, ["lr.peak"])

    @pytest.mark.parametrize("spec", SPECS)
    def test_exact_in_all_knobs_of_a_per_tensor_schedule(self, spec):
        assert_exact(scheduled("lr", spec, granularity={"lr": "tensor"}), ["lr"])

    def test_a_given_value_is_for_the_knobs_in_its_unit(self):
        # Smoothing and warm-up are both shares that default to 0.1, and not the same thing.
        run = training(
            of=penalized(),
            schedules={"smoothing": find_schedule("linear_warmup")},
            values={"smoothing": 0.4},
        )
        start = run.start(["smoothing"])
        assert float(start["smoothing.peak"]) == 0.4
        assert float(start["smoothing.warmup"]) == 0.1

    @pytest.mark.parametrize("spec", ["constant", "piecewise:3", "free"])
    def test_a_given_value_is_for_all_knots(self, spec):
        run = training(schedules={"lr": find_schedule(spec)}, values={"lr": 0.4})
        assert all(bool((knob == 0.4).all()) for knob in run.start(["lr"]).values())

    @pytest.mark.parametrize("granularity", ["tensor", "element"])
    def test_equal_values_give_the_shared_gradient(self, granularity):
        shared, _ = Replay()(run := training(), run.start(["lr"]), seed=0)
        split, _ = Replay()(
            run := training(granularity={"lr": granularity}), run.start(["lr"]), seed=0
        )
        assert split.loss == pytest.approx(shared.loss, rel=1e-13)
        assert split.grad["lr"].shape == run.hypers["lr"].shape
        assert float(split.grad["lr"].sum()) == pytest.approx(float(shared.grad["lr"]), rel=1e-11)


class Attention(nn.Module):
    """Five numbers as a sequence of five."""

    def __init__(self, width=4):
        super().__init__()
        self.mix = nn.Linear(1, 3 * width).double()
        self.head = nn.Linear(width, 3).double()

    def forward(self, x):
        q, k, v = self.mix(x.unsqueeze(-1)).unsqueeze(1).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).squeeze(1).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 4, batch_first=True).double()
        self.head = nn.Linear(4, 3).double()

    def forward(self, x):
        return self.head(self.lstm(x.unsqueeze(-1))[0][:, -1])


class TestKernels:
    @pytest.mark.parametrize("make", [Attention, Recurrent])
    def test_exact(self, make):
        assert_exact(training(of=problem(make)), ["lr", "beta1"])

    def test_attention_is_left_as_the_user_set_it(self):
        flags = torch.backends.cuda
        before = flags.flash_sdp_enabled(), flags.mem_efficient_sdp_enabled()
        inside = []
        made = problem(Attention)
        hook = lambda *_: inside.append(flags.flash_sdp_enabled())  # noqa: E731  # one use
        made._model.module.register_forward_pre_hook(hook)
        loss_at(made, *made.start(0), {}, 0, 0)
        assert inside == [False]
        assert (flags.flash_sdp_enabled(), flags.mem_efficient_sdp_enabled()) == before

    def test_an_operation_without_a_second_derivative_is_named(self):
        def fused(output, target):
            x = output.view(1, 1, 10, 3)
            attended = F.scaled_dot_product_attention(x, x, x).view(10, 3)
            return F.cross_entropy(attended, target)

        run = training(of=problem(loss_fn=fused, outer_loss_fn=F.cross_entropy))
        for memory in (0, 2**30):
            estimate, _ = Replay(memory)(run, run.start(["lr"]), seed=0)
            assert estimate.note.outcome is Outcome.NOT_DIFFERENTIABLE
            assert "no derivative for aten::_scaled_dot_product_flash" in estimate.note.reason
            assert estimate.loss == float(held_out_loss(run, run.start(["lr"]), 0))


class TestOutcomes:
    def test_a_loss_without_a_graph_is_not_differentiable(self):
        def errors(output, target):
            return (output.argmax(-1) != target).double().mean()

        run = training(of=problem(outer_loss_fn=errors))
        estimate, _ = Replay()(run, run.start(["lr"]), seed=0)
        assert estimate.note.outcome is Outcome.NOT_DIFFERENTIABLE
        assert "no graph" in estimate.note.reason
        assert estimate.grad == {} and not estimate.ok
        assert estimate.loss == float(held_out_loss(run, run.start(["lr"]), 0))

    def test_a_diverging_training_has_diverged(self):
        def squares(output, target):
            return (output - F.one_hot(target, 3)).square().mean()

        run = Training(problem(loss_fn=squares), find_rule("sgd"), 200, values={"lr": 1e3})
        estimate, _ = Replay()(run, run.start(["lr"]), seed=0)
        assert estimate.note.outcome is Outcome.DIVERGED
        assert estimate.loss == float("inf") and estimate.grad == {}
        assert "finite" in estimate.note.reason
        assert held_out_loss(run, run.start(["lr"]), 0) == float("inf")

    def test_an_infinite_loss_at_finite_weights_has_diverged(self):
        def infinite(output, target):
            return F.cross_entropy(output, target) / torch.zeros((), dtype=DOUBLE)

        run = training(of=problem(outer_loss_fn=infinite))
        estimate, _ = Replay()(run, run.start(["lr"]), seed=0)
        assert estimate.note.outcome is Outcome.DIVERGED and estimate.grad == {}

    def test_the_adjoint_is_noted_at_every_step(self):
        estimate, _ = Replay()(run := training(), run.start(["lr"]), seed=0)
        assert estimate.note.adjoint.shape == (STEPS + 1,)
        assert bool((estimate.note.adjoint > 0).all())


def same(a, b):
    return a.loss == b.loss and all(torch.equal(a.grad[n], b.grad[n]) for n in a.grad)


def global_states():
    numbers = np.random.get_state()
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        (numbers[0], numbers[1].tolist(), *numbers[2:]),
    )


class Augmented(torch.utils.data.Dataset):
    """Examples shifted by draws of all three global generators."""

    def __init__(self, examples, size):
        self.inputs, self.target = examples
        self.size = size

    def __len__(self):
        return len(self.target)

    def __getitem__(self, i):
        noise = float(torch.randn(())) + np.random.randn() + random.gauss(0, 1)
        return self.inputs[i] + self.size * noise, self.target[i]


def augmented(size, make=mlp):
    return problem_from_module(
        make,
        F.cross_entropy,
        Augmented(examples(40, 5), size),
        Augmented(examples(30, 5, seed=1), size),
        batch_size=10,
    )


RANDOM = {"dropout": lambda: problem(dropout_net), "augmented": lambda: augmented(0.1)}


@pytest.mark.parametrize("make", RANDOM.values(), ids=RANDOM)
class TestRandomness:
    def test_a_seed_repeats_bit_for_bit(self, make):
        estimates = []
        for outside in (98, 99):
            torch.manual_seed(outside)
            random.seed(outside)
            np.random.seed(outside)
            run = training(of=make())
            estimates.append(Replay()(run, run.start(["lr"]), seed=3)[0])
        assert same(*estimates)

    def test_another_seed_differs(self, make):
        run = training(of=make())
        first, other = (Replay()(run, run.start(["lr"]), seed=seed)[0] for seed in (3, 4))
        assert first.loss != other.loss

    def test_the_global_generators_are_left_alone(self, make):
        before = global_states()
        Replay()(run := training(of=make()), run.start(["lr"]), seed=3)
        assert global_states() == before

    def test_exact(self, make):
        assert_exact(training(of=make()), ["lr", "beta2"], seed=3)


class TestDatasets:
    def test_without_augmentation_a_dataset_is_its_tensors(self):
        point = (run := training(of=problem())).start(["lr", "beta1"])
        by_tensor, _ = Replay()(run, point, seed=0)
        by_example, _ = Replay()(training(of=augmented(0.0)), point, seed=0)
        assert same(by_tensor, by_example)

    def test_every_generator_shifts_the_examples(self):
        """Draws differ between examples, steps and seeds, or augmentation would be a constant."""
        seen = []

        def watched(output, target):
            seen.append(output.detach().clone())
            return F.cross_entropy(output, target)

        made = replace(augmented(0.1), loss_fn=watched)
        params, buffers = made.start(0)
        for step, seed in ((0, 0), (0, 0), (4, 0), (0, 1)):
            loss_at(made, params, buffers, {}, step, seed)
        assert torch.equal(seen[0], seen[1])
        assert not torch.equal(seen[0], seen[2])
        assert not torch.equal(seen[0], seen[3])

    def test_an_epoch_shows_every_example_once(self):
        index = torch.arange(40, dtype=DOUBLE)
        inputs, target = examples(40, 5)
        inputs[:, 0] = index
        made = problem_from_module(
            mlp,
            lambda output, target: output.sum(),
            (inputs, target),
            (inputs, target),
            batch_size=10,
        )
        seen = []
        made._model.module.register_forward_pre_hook(
            lambda module, args: seen.append(args[0][:, 0])
        )
        params, buffers = made.start(0)
        for step in range(8):
            loss_at(made, params, buffers, {}, step, 0)
        first, second = torch.cat(seen[:4]), torch.cat(seen[4:])
        assert torch.equal(first.sort().values, index)
        assert torch.equal(second.sort().values, index)
        assert not torch.equal(first, second)


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 6).double(), nn.Linear(6, 3).double()
        self.body.requires_grad_(False)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 5).double(), nn.Linear(5, 5, bias=False).double()
        self.two.weight = self.one.weight
        self.head = nn.Linear(5, 3).double()

    def forward(self, x):
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


class TestParameters:
    def test_frozen_ones_stay_and_are_not_counted(self):
        run = training(of=problem(Frozen))
        assert run.layout.names == ("head.weight", "head.bias")
        assert_exact(run, ["lr", "weight_decay"])
        state = run_training(run, run.resolve({}), 0).state
        _, buffers = run.problem.start(0)
        assert torch.equal(state.buffers["body.weight"], buffers["body.weight"])

    def test_frozen_ones_are_constants(self):
        """No graph leads to them, whatever was kept; running statistics have one."""
        seen = []

        class Watched(Around):
            def inner_loss(self, params, buffers, hypers, batch):
                seen.append({n for n, b in buffers.items() if b.requires_grad})
                return self.problem.inner_loss(params, buffers, hypers, batch)

        for make, leaves in ((Frozen, set()), (cnn, {"1.running_mean", "1.running_var"})):
            for memory in (0, 2**30):
                seen.clear()
                run = training(of=Watched(problem(make)))
                Replay(memory)(run, run.start(["lr"]), seed=0)
                # The start is a constant, running statistics included.
                assert set().union(*seen) == leaves and set() in seen

    def test_a_buffer_that_first_changes_late_is_followed_from_there(self):
        """Nothing a step has replaced may be taken for a constant."""

        assert_exact(training(of=Late(problem())), ["lr", "beta1"])

    def test_tied_ones_are_one(self):
        run = training(of=problem(Tied))
        assert run.layout.names == ("one.weight", "one.bias", "head.weight", "head.bias")
        assert_exact(run, ["lr", "beta1"])

    def test_single_numbers_keep_the_dtype(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.tensor(1.5))
                self.head = nn.Linear(5, 3)

            def forward(self, x):
                return self.head(self.scale * x.float())

        for rule in EVERY_RULE.values():
            run = training(rule, problem(Scaled))
            state = run_training(run, run.resolve({}), 0).state
            assert state.p.dtype == torch.float32
            estimate, _ = Replay()(run, run.start(["lr"]), seed=0)
            assert estimate.ok and estimate.grad["lr"].dtype == DOUBLE


def plain_loop(make, optimizer, seed):
    """Training by torch alone, from the same start and on the same batches."""
    made = problem(make)
    params, _ = made.start(seed)
    model = make()
    model.load_state_dict(params, strict=False)
    opt = optimizer(model.parameters())
    inputs, target = examples(40, *SHAPES[make.__name__])
    for step in range(STEPS):
        index = example_indices(40, 10, step, seed)
        opt.zero_grad()
        F.cross_entropy(model(inputs[index]), target[index]).backward()
        opt.step()
    model.eval()
    valid, labels = examples(30, *SHAPES[make.__name__], seed=1)
    return float(F.cross_entropy(model(valid), labels).detach())


@pytest.mark.parametrize("make", [mlp, cnn], ids=lambda make: make.__name__)
def test_training_is_what_torch_would_do(make):
    estimate, _ = Replay()(run := training("adamw", problem(make)), run.start(["lr"]), seed=0)
    expected = plain_loop(
        make,
        lambda p: torch.optim.AdamW(p, lr=0.03, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1),
        seed=0,
    )
    assert estimate.loss == pytest.approx(expected, rel=1e-12)
