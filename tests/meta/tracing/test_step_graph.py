"""Traced steps against autograd, run as they were traced: no compiler takes part.

What is traced are the same operations, so both agree to rounding: 1e-12 is a hundred times what
was seen.
"""

import gc
import random
import weakref
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import Around, examples, one_layer
from points import EVERY_RULE, applies, brief, values_in_nets
from torch import nn

from hyperdescent.inner.core.hyper import Choice, fraction, learning_rate, positive
from hyperdescent.inner.core.rule import rule
from hyperdescent.inner.registry import find_rule
from hyperdescent.inner.schedules.schedule import find_schedule
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.tracing import machine
from hyperdescent.meta.tracing.machine import Machine
from hyperdescent.meta.tracing.step_graph import trace
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training

DOUBLE = torch.float64
aten = torch.ops.aten
STEPS = 5
CLOSE = 1e-12
GRAPHS = ("keep", "recompute")


@pytest.fixture(autouse=True)
def as_traced(monkeypatch, tmp_path):
    monkeypatch.setattr(Machine, "_compiled", lambda self, graph: graph)
    # What making these took is no price to be remembered, and "auto" is asked for below.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)


def mlp():
    """Two tensors, because what takes the time here is tracing, operation by operation."""
    layers = nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)
    return nn.Sequential(*layers).double()


def problem(make=mlp, loss_fn=F.cross_entropy, *, shape=(5,), data=examples, **options):
    train, valid = data(40, *shape), data(30, *shape, seed=1)
    return problem_from_module(make, loss_fn, train, valid, batch_size=10, **options)


def training(rule="adamw", of=None, *, steps=STEPS, **options):
    rule = find_rule(rule)
    options["values"] = {**values_in_nets(rule), **options.get("values", {})}
    return Training(of or problem(), rule, steps, **options)


def step_graph(run, names=("lr",)):
    values = run.resolve(run.start(names)).detach().at(0)
    return trace(run, run.begin(values, 0), values, names, 0)


def assert_close(found, expected, what):
    error = float((found - expected).norm())
    assert error <= CLOSE * float(expected.norm()), f"{what}: {found} is not {expected}"


def assert_traced(run, names, *, seed=0):
    """Both ways of the traced step give what autograd gives."""
    point = run.start(names)
    expected, _ = Replay(compile=False)(run, point, seed=seed)
    assert expected.ok, expected.note.reason
    for graphs in GRAPHS:
        estimate, _ = Replay(compile=True, graphs=graphs)(run, point, seed=seed)
        assert "autograd" not in estimate.note.how and "compiled" in estimate.note.how
        assert estimate.loss == pytest.approx(expected.loss, rel=CLOSE)
        assert [*estimate.grad] == [*expected.grad]
        for name, value in expected.grad.items():
            assert estimate.grad[name].shape == value.shape
            assert_close(estimate.grad[name], value, f"{graphs}, {name}")
        assert estimate.note.adjoint.shape == (run.steps + 1,)
        assert_close(estimate.note.adjoint, expected.note.adjoint, f"{graphs}, adjoint")


@pytest.mark.parametrize("rule", EVERY_RULE.values(), ids=lambda rule: rule.name)
def test_every_rule_in_every_hyper(rule, few_iterations):
    assert_traced(training(brief(rule), problem(one_layer)), [*rule.hypers])


OPTIONS = [
    pytest.param(rule.choose(**{option: value}), id=f"{rule.name}-{option}={value}")
    for rule in map(brief, EVERY_RULE.values())
    for option, choice in rule.choices.items()
    if isinstance(choice, Choice)
    for value in choice.options
    if value != choice.default
]


@pytest.mark.parametrize("rule", OPTIONS)
def test_every_option_of_a_rule(rule, few_iterations):
    names = [name for name, hyper in rule.hypers.items() if applies(rule, hyper)]
    assert_traced(training(rule, problem(one_layer)), names)


class Attention(nn.Module):
    """Five numbers as a sequence of five."""

    def __init__(self, width=4):
        super().__init__()
        self.mix = nn.Linear(1, 3 * width).double()
        self.norm = nn.LayerNorm(width).double()
        self.head = nn.Linear(width, 3).double()

    def forward(self, x):
        q, k, v = self.mix(x.unsqueeze(-1)).unsqueeze(1).chunk(3, -1)
        return self.head(self.norm(F.scaled_dot_product_attention(q, k, v).squeeze(1)).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 4, batch_first=True).double()
        self.head = nn.Linear(4, 3).double()

    def forward(self, x):
        return self.head(self.lstm(x[:, :2].unsqueeze(-1))[0][:, -1])


class Words(nn.Module):
    """Six of eight words are used."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 4).double()
        self.head = nn.Linear(4, 3).double()

    def forward(self, x):
        return self.head(torch.tanh(self.table(x).sum(1)))


def words(count, *shape, seed=0):
    inputs = torch.randint(6, (count, *shape), generator=torch.Generator().manual_seed(seed))
    return inputs, inputs.sum(1) % 3


class Shared(nn.Module):
    """A frozen layer, and one weight in two places."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 4).double().requires_grad_(False)
        self.one, self.two = (nn.Linear(4, 4, bias=False).double() for _ in range(2))
        self.two.weight = self.one.weight
        self.head = nn.Linear(4, 3).double()

    def forward(self, x):
        return self.head(torch.tanh(self.two(torch.tanh(self.one(self.body(x))))))


class Filters(nn.Module):
    """A parameter of one number, two convolutions and two norms."""

    def __init__(self, first, second):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        layers = nn.Conv2d(1, 3, 3), first, nn.SiLU(), nn.Conv2d(3, 4, 3), second, nn.Tanh()
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3))
        self.double()

    def forward(self, x):
        return self.body(self.scale * x)


def batch_norm():
    """One of the averages is over all batches seen: an integer buffer that matters."""
    return Filters(nn.BatchNorm2d(3), nn.BatchNorm2d(4, momentum=None))


def group_norm():
    return Filters(nn.GroupNorm(3, 3), nn.GroupNorm(2, 4))


class Noisy(nn.Module):
    """Draws three times: what nobody reads, what has nothing to do with the weights, a mask."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 8).double(), nn.Linear(8, 3).double()

    def forward(self, x):
        if not self.training:
            return self.two(torch.tanh(self.one(x)))
        torch.rand_like(x)
        x = x + 0.1 * torch.randn_like(x)
        return self.two(F.dropout(torch.tanh(self.one(x)), 0.3))


class Augmented(torch.utils.data.Dataset):
    """Examples shifted by draws of all three global generators."""

    def __init__(self, count, *shape, seed=0):
        self.inputs, self.target = examples(count, *shape, seed=seed)

    def __len__(self):
        return len(self.target)

    def __getitem__(self, i):
        noise = float(torch.randn(())) + np.random.randn() + random.gauss(0, 1)
        return self.inputs[i] + 0.1 * noise, self.target[i]


NETS = {
    "batch_norm": lambda: problem(batch_norm, shape=(1, 6, 6)),
    "group_norm": lambda: problem(group_norm, shape=(1, 6, 6)),
    "noisy": lambda: problem(Noisy),
    "attention": lambda: problem(Attention),
    "lstm": lambda: problem(Recurrent),
    "embedding": lambda: problem(Words, data=words),
    "shared": lambda: problem(Shared),
    "augmented": lambda: problem(data=Augmented),
}


@pytest.mark.parametrize("of", NETS.values(), ids=NETS)
def test_every_net(of):
    assert_traced(training("adamw", of()), ["lr", "beta1", "beta2", "eps"], seed=3)


def smoothed(output, target, *, hypers, params):
    """Cross-entropy with learned label smoothing and L2 penalty."""
    log_p = output.log_softmax(-1)
    hard, soft = -log_p.gather(-1, target[:, None]).mean(), -log_p.mean()
    s = hypers["smoothing"]
    penalty = sum((p * p).sum() for p in params.values())
    return (1 - s) * hard + s * soft + hypers["l2"] / 2 * penalty


def shifted(output, target, *, hypers, params):
    """Neither hyper moves the weights: one is added, one is not there."""
    return F.cross_entropy(output, target) + hypers["smoothing"]


def penalized(make=mlp, loss_fn=smoothed):
    hypers = {"smoothing": fraction(0.1), "l2": positive(1e-2, search=(1e-6, 1.0))}
    return problem(make, loss_fn, hypers=hypers, outer_loss_fn=F.cross_entropy)


class HeldOutToo(Around):
    """A problem whose held-out loss depends on a hyper of the loss directly."""

    def outer_loss(self, params, buffers, hypers):
        return self.problem.outer_loss(params, buffers, hypers) + hypers["l2"] ** 2


class TestHypers:
    @pytest.mark.parametrize(
        ("rule", "granularity", "names"),
        [
            ("adamw", "tensor", ["lr", "beta2", "eps"]),
            ("nadam", "element", ["lr", "momentum_decay"]),
            ("alphagrad", "tensor", ["lr", "alpha"]),
            ("adagrad", "element", ["initial_accumulator_value", "lr"]),
        ],
    )
    def test_every_grain(self, rule, granularity, names):
        # weight_decay beside them is one number.
        run = training(rule, granularity=dict.fromkeys(names, granularity))
        assert_traced(run, [*names, "weight_decay"])

    @pytest.mark.parametrize(
        ("spec", "granularity"),
        [("cosine", {}), ("cosine", {"lr": "tensor"}), ("piecewise:3", {"lr": "element"})],
        ids=["shared", "tensor", "element"],
    )
    def test_schedules(self, spec, granularity):
        schedules = {"lr": find_schedule(spec), "beta1": find_schedule("piecewise:2")}
        assert_traced(
            training(schedules=schedules, granularity=granularity), ["lr", "beta1", "beta2"]
        )

    @pytest.mark.parametrize("schedules", [{}, {"smoothing": find_schedule("linear_warmup")}])
    def test_of_the_loss(self, schedules):
        run = training(of=penalized(), schedules=schedules)
        assert_traced(run, ["smoothing", "l2", "lr"])

    def test_that_also_enter_the_held_out_loss(self):
        assert_traced(training(of=HeldOutToo(penalized()), values={"l2": 0.3}), ["l2", "lr"])

    def test_that_move_nothing(self):
        run = training(of=penalized(loss_fn=shifted))
        assert_traced(run, ["smoothing", "l2", "lr"])
        estimate, _ = Replay(compile=True)(run, run.start(["smoothing", "l2"]), seed=0)
        assert [float(g) for g in estimate.grad.values()] == [0, 0]

    def test_a_single_step(self):
        assert_traced(training("adagrad", steps=1), ["lr", "initial_accumulator_value"])

    def test_a_single_step_from_running_statistics(self):
        assert_traced(training(of=NETS["batch_norm"](), steps=1), ["lr"])


def values(graph):
    """(node, what it computes) of every operation that gives a tensor."""
    nodes = [n for n in graph.graph.nodes if n.op == "call_function"]
    return [(n, n.meta["val"]) for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)]


def random_nodes(graph):
    tag = torch.Tag.nondeterministic_seeded
    return [n for n, _ in values(graph) if tag in getattr(n.target, "tags", ())]


class TestWhatIsInside:
    @pytest.mark.parametrize("rule", ["adam", "nadam", "radam"])
    def test_no_power_is_left_in_the_loop(self, rule):
        """Neither one of a number nor one of as many as there are weights."""
        graph = step_graph(training(rule), ["lr", "beta1", "beta2"])
        assert not [n for n, _ in values(graph.joint) if "pow" in str(n.target)]
        # They are where numbers are computed, or this says nothing.
        assert [n for n, _ in values(graph.behind) if "pow" in str(n.target)]

    def test_numbers_that_meet_constants_are_not_left_there_either(self):
        half = torch.tensor(0.5, dtype=DOUBLE)

        @rule("Decaying", lr=learning_rate(0.1))
        def decaying(p, g, s, t, lr):
            return p - torch.where(t > 1, lr, 1.0) * half**t * g, s

        for each in (decaying, "radam", "ademamix"):
            graph = step_graph(training(each))
            numbers = [n for n, x in values(graph.joint) if x.ndim == 0]
            assert not [n for n in numbers if n.target in (aten.where.self, aten.pow.Tensor_Tensor)]

    def test_single_precision_stays_single(self):
        def single(count, *shape, seed=0):
            inputs, target = examples(count, *shape, seed=seed)
            return inputs.float(), target

        of = problem(lambda: mlp().float(), data=single)
        graph = step_graph(training("adam", of), ["lr", "beta1", "beta2", "eps"])
        vectors = [x.dtype for _, x in values(graph.joint) if x.is_floating_point() and x.ndim]
        # The last is the row of numbers that go back, and is double for their sake.
        assert {*vectors[:-1]} == {torch.float32} and vectors[-1] == DOUBLE
        # So are the numbers that come in, so that no generated code computes in double.
        assert {x.dtype for x in graph.takes} == {torch.float32, torch.int64}

    @pytest.mark.parametrize(("of", "draws"), [("batch_norm", 0), ("noisy", 3)])
    def test_every_part_does_what_the_whole_does(self, of, draws):
        """And draws what the net draws, from the same place of the stream."""
        graph = step_graph(training(of=NETS[of]()), ["lr", "beta1"])
        record, rewind, size = graph.halves()
        inputs = [x.zeros() for x in graph.takes]
        inputs = [x + torch.rand_like(x) if x.is_floating_point() else x for x in inputs]
        assert graph.random == bool(draws)
        for part in (graph.joint, graph.advance(), graph.pull(), record):
            assert len(random_nodes(part)) == draws
        assert not random_nodes(rewind)

        def run(part, inputs):
            torch.manual_seed(3)
            return part(*inputs)

        moving = len(graph.form.moved)
        kept = moving + len(graph.form.counted)
        forth, bars = inputs[:-moving], inputs[-moving:]
        whole, out = run(graph.joint, inputs), run(record, forth)
        assert size == sum(x.nbytes for x in out[kept:])
        back = rewind(*out[kept:], *bars)
        separate = [*run(graph.advance(), forth), *run(graph.pull(), inputs)]
        for found in (separate, [*out[:kept], *back]):
            assert all(torch.equal(x, y) for x, y in zip(found, whole, strict=True))


def global_states():
    numbers = np.random.get_state()
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        (numbers[0], numbers[1].tolist(), *numbers[2:]),
    )


class Equal(Around):
    """A problem that cannot be hashed, as a dataclass by default."""

    __hash__ = None

    def __eq__(self, other):
        return self.problem == other.problem


class TestTracesBehind:
    @pytest.mark.parametrize(
        "around",
        [
            Around,
            Equal,
        ],
    )
    def test_a_step_is_traced_once_for_all_metagradients(self, around, monkeypatch):
        traces = []

        def counted(*given):
            traces.append(1)
            return trace(*given)

        monkeypatch.setattr(machine, "trace", counted)
        of = around(problem())
        for steps, seed in ((STEPS, 0), (STEPS, 1), (3, 0)):
            run = training(of=of, steps=steps)
            Replay(compile=True)(run, run.start(["lr"]), seed=seed)
        assert len(traces) == 1

    def test_a_problem_is_not_kept_alive(self):
        run = training(of=NETS["noisy"]())
        Replay(compile=True)(run, run.start(["lr"]), seed=0)
        ref = weakref.ref(run.problem)
        del run
        gc.collect()
        assert ref() is None

    def test_nor_is_one_that_cannot_be_traced(self):
        run = training(of=problem(loss_fn=branching))
        found, _ = Replay(compile="trace")(run, run.start(["lr"]), seed=0)
        assert "cannot be compiled" in found.note.how
        ref = weakref.ref(run.problem)
        del run
        gc.collect()
        assert ref() is None

    def test_no_state_is_kept_with_a_graph(self):
        run, states = training(), []
        begin = type(run).begin

        def watched(self, values, seed):
            state = begin(self, values, seed)
            states.extend(map(weakref.ref, (state.p, *state.slots.values())))
            return state

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(run), "begin", watched)
            Replay(compile=True)(run, run.start(["lr"]), seed=0)
        gc.collect()
        assert states and not any(ref() is not None for ref in states)

    @pytest.mark.parametrize("of", ["noisy", "augmented"])
    def test_the_global_generators_are_left_alone(self, of):
        run, before = training(of=NETS[of]()), global_states()
        Replay(compile=True)(run, run.start(["lr"]), seed=3)
        assert global_states() == before


def neutral(output, number):
    """The output, whatever the number is, in bits; but the number is in the graph."""
    return torch.where(output == output, output, number)


def branching(output, target):
    if output.sum() > 0:
        return F.cross_entropy(output, target)
    return 2 * F.cross_entropy(output, target)


def from_python(output, target):
    return F.cross_entropy(neutral(output, random.random()), target)


def from_numpy(output, target):
    return F.cross_entropy(neutral(output, np.random.rand()), target)


class Counting(nn.Module):
    """Every other call does the same in another way."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 3).double()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.head(x)
        return x.neg().neg() if self.calls % 2 else x


class Numbered(Around):
    """A problem whose batch holds the number of the step."""

    def batch(self, step, seed):
        return step, self.problem.batch(step, seed)

    def inner_loss(self, params, buffers, hypers, batch):
        return self.problem.inner_loss(params, buffers, hypers, batch[1])


DIFFER = "two steps of it do different things"
UNTRACEABLE = {
    "branching": (lambda: problem(loss_fn=branching), "data-dependent"),
    "python": (lambda: problem(loss_fn=from_python), DIFFER),
    "numpy": (lambda: problem(loss_fn=from_numpy), DIFFER),
    "counting": (lambda: problem(Counting), DIFFER),
    "an int in the batch": (lambda: Numbered(problem()), "a batch of it holds int"),
}


@pytest.mark.parametrize(("of", "why"), UNTRACEABLE.values(), ids=UNTRACEABLE)
def test_what_cannot_be_traced_is_done_by_autograd(of, why):
    run = training(of=of())
    point = run.start(["lr", "beta1"])
    expected, _ = Replay(compile=False)(run, point, seed=0)
    with pytest.warns(UserWarning, match=why) as warned:
        asked, _ = Replay(compile=True)(run, point, seed=0)
    assert len(warned) == 1
    # Without a warning where it was not asked for.
    unasked, _ = Replay(compile="auto", expect=1e9)(run, point, seed=0)
    for estimate in (asked, unasked):
        assert "by autograd" in estimate.note.how and why in estimate.note.how
        assert "cannot be compiled" in estimate.note.how
        assert estimate.loss == expected.loss
        assert all(torch.equal(estimate.grad[n], expected.grad[n]) for n in point)
        assert torch.equal(estimate.note.adjoint, expected.note.adjoint)


class TestDrawsThatAreNotTorchs:
    """Were they frozen into the graph, every step would have the draw of the first."""

    @pytest.mark.parametrize(
        "draw",
        [
            lambda: torch.tensor(random.random()),
            lambda: torch.from_numpy(np.random.rand(3)),
            lambda: torch.tensor(random.sample(range(3), 3)),
        ],
        ids=["number", "array", "order"],
    )
    def test_are_found_out_as_tensors_too(self, draw):
        def loss(output, target):
            return F.cross_entropy(output + draw(), target)

        run = training(of=problem(loss_fn=loss, outer_loss_fn=F.cross_entropy))
        estimate, _ = Replay(compile="auto", expect=1e9)(run, run.start(["lr"]), seed=0)
        assert DIFFER in estimate.note.how

    @pytest.mark.parametrize("loss_fn", [from_python, from_numpy])
    def test_tracing_uses_none_up(self, loss_fn):
        run = training(of=problem(loss_fn=loss_fn))
        before = global_states()
        with pytest.raises(Exception, match=DIFFER):
            step_graph(run)
        assert global_states() == before


class TestOutcomes:
    def test_an_operation_without_a_second_derivative_is_named(self):
        def fused(output, target):
            x = output.view(1, 1, 10, 3)
            attended = F.scaled_dot_product_attention(x, x, x).view(10, 3)
            return F.cross_entropy(attended, target)

        run = training(of=problem(loss_fn=fused, outer_loss_fn=F.cross_entropy))
        expected, _ = Replay(compile=False)(run, run.start(["lr"]), seed=0)
        with pytest.warns(UserWarning, match="cannot be compiled"):
            estimate, _ = Replay(compile=True)(run, run.start(["lr"]), seed=0)
        assert estimate.note.outcome is Outcome.NOT_DIFFERENTIABLE
        assert estimate.note.reason == expected.note.reason
        assert estimate.loss == expected.loss

    def test_a_held_out_loss_without_a_graph(self):
        def errors(output, target):
            return (output.argmax(-1) != target).double().mean()

        run = training(of=problem(outer_loss_fn=errors))
        estimate, _ = Replay(compile=True)(run, run.start(["lr"]), seed=0)
        assert estimate.note.outcome is Outcome.NOT_DIFFERENTIABLE and "no graph" in (
            estimate.note.reason
        )

    def test_a_diverging_training_has_diverged(self):
        def squares(output, target):
            return (output - F.one_hot(target, 3)).square().mean()

        run = training("sgd", problem(loss_fn=squares), steps=200, values={"lr": 1e3})
        for graphs in GRAPHS:
            estimate, _ = Replay(compile=True, graphs=graphs)(run, run.start(["lr"]), seed=0)
            assert estimate.note.outcome is Outcome.DIVERGED and estimate.grad == {}
            assert estimate.loss == float("inf")

    def test_a_metagradient_that_is_not_a_number_has_diverged(self):
        def kinked(output, target):
            # At 0 the norm has slope 0 and curvature NaN.
            return F.cross_entropy(output, target) + (0 * output).norm()

        run = training("sgd", problem(loss_fn=kinked, outer_loss_fn=F.cross_entropy))
        expected, _ = Replay(compile=False)(run, run.start(["lr"]), seed=0)
        assert expected.note.outcome is Outcome.DIVERGED and "not finite" in expected.note.reason
        for graphs in GRAPHS:
            estimate, _ = Replay(compile=True, graphs=graphs)(run, run.start(["lr"]), seed=0)
            assert estimate.note.outcome is Outcome.DIVERGED and estimate.grad == {}

    def test_an_adjoint_beyond_single_precision_has_diverged(self):
        """The weights stay finite, the adjoint grows by a factor per step until it is inf."""

        def single(count, *shape, seed=0):
            inputs, target = examples(count, *shape, seed=seed)
            return inputs.float(), target

        of = problem(lambda: mlp().float(), data=single)
        given = {"lr": 30.0, "momentum": 0.0, "weight_decay": 0.0}
        run = training("sgd", of, steps=600, values=given)
        expected, _ = Replay(compile=False)(run, run.start(["lr"]), seed=0)
        assert expected.note.outcome is Outcome.DIVERGED and expected.loss < 1e3
        estimate, _ = Replay(compile=True, graphs="recompute")(run, run.start(["lr"]), seed=0)
        assert estimate.note.outcome is Outcome.DIVERGED


class Uneven(Around):
    """Every third batch has one example fewer."""

    steps: ClassVar[list[int]] = []

    def batch(self, step, seed):
        self.steps.append(step)
        inputs, target = self.problem.batch(step, seed)
        count = len(target) - (step % 3 == 2)
        return inputs[:count], target[:count]


class TestBatchesOfOtherShapes:
    def test_are_named(self):
        run = training(of=Uneven(problem()))
        with pytest.raises(ValueError, match=r"shapes \[\(9, 5\), \(9,\)\].*compile=False"):
            Replay(compile=True)(run, run.start(["lr"]), seed=0)

    def test_are_done_by_autograd_where_compiling_was_not_asked_for(self):
        run = training(of=Uneven(problem()))
        point = run.start(["lr"])
        expected, _ = Replay(compile=False)(run, point, seed=0)
        for _ in range(2):
            run.problem.steps.clear()
            estimate, _ = Replay(compile="auto", expect=1e9)(run, point, seed=0)
            assert torch.equal(estimate.grad["lr"], expected.grad["lr"])
            assert "by autograd: a batch has shapes" in estimate.note.how
        assert run.problem.steps.count(1) == 1  # The second time not begun in vain.
