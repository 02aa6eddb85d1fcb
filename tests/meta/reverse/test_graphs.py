"""The same metagradient however it is gone back: from graphs, from states, through a window.

By autograd and by traced graphs, which are run as they are: no compiler takes part.
"""

import itertools
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hyperdescent.inner.registry import find_rule
from hyperdescent.inner.schedules.schedule import find_schedule
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.reverse.checkpointing import revolve_steps
from hyperdescent.meta.reverse.memory_budget import state_bytes
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.tracing.machine import Machine
from hyperdescent.meta.training.estimate import Note
from hyperdescent.meta.training.loop import run_training
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training

DOUBLE = torch.float64
STEPS = 11
NAMES = ["lr", "beta1", "eps", "weight_decay"]
PLANS = ["all", "every:1", "every:3", "every:100", "revolve:1", "revolve:3", "revolve:100"]
PLANS += ["online:1", "online:3", 4]
STORES = ["device", "cpu", "disk", "folder"]
HOW = {"autograd": False, "traced": True}


@pytest.fixture(autouse=True)
def as_traced(monkeypatch, tmp_path):
    monkeypatch.setattr(Machine, "_compiled", lambda self, graph: graph)
    # What making these took is no price to be remembered.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "prices"))


@pytest.fixture(params=HOW.values(), ids=HOW)
def how(request):
    return request.param


def examples(count, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, *shape, dtype=DOUBLE, generator=generator)
    return inputs, inputs.flatten(1)[:, :3].argmax(1)


def cnn():
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=None), nn.Tanh(), nn.AvgPool2d(2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 3)).double()


def dropout_net():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)).double()


SHAPES = {cnn: (1, 6, 6), dropout_net: (5,)}
NETS = pytest.mark.parametrize("make", SHAPES, ids=lambda make: make.__name__)


@cache
def run_of(make=dropout_net, rule="adamw", **given):
    """The training of a net; the same one each time, so that it is traced once."""
    train, valid = examples(40, *SHAPES[make]), examples(30, *SHAPES[make], seed=1)
    of = problem_from_module(make, F.cross_entropy, train, valid, batch_size=10)
    schedules = {"lr": find_schedule("piecewise:3")}
    values = {"lr": 0.03, "weight_decay": 0.1, **({"eps": 1e-3} if rule == "adamw" else {})}
    return Training(of, find_rule(rule), STEPS, schedules, values=values | given)


def estimate_of(run, names=NAMES, *, seed=1, **options):
    estimate, _ = Replay(**options)(run, run.start(names), seed=seed)
    assert estimate.ok, estimate.note.reason
    assert ("autograd" in estimate.note.how) != bool(options.get("compile"))
    return estimate


def assert_same(found, expected, label):
    assert found.loss == expected.loss, label
    assert [*found.grad] == [*expected.grad]
    for name, value in expected.grad.items():
        assert torch.equal(found.grad[name], value), (label, name)
    assert torch.equal(found.note.adjoint.nan_to_num(-1), expected.note.adjoint.nan_to_num(-1))


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder by the name of a store; "disk" is where the system would put its files."""
    folders = {store: tmp_path / store for store in ("disk", "folder")}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folders["disk"]))
    return folders


def store_of(name, places):
    return places["folder"] if name == "folder" else name


@NETS
class TestEveryBitIsTheSame:
    @pytest.mark.sampled(4)
    @pytest.mark.parametrize("store", STORES)
    def test_from_every_plan_and_store(self, make, how, store, places):
        run = run_of(make)
        expected = estimate_of(run, compile=how, graphs="keep")
        for plan in PLANS:
            options = {"checkpoints": plan, "store": store_of(store, places)}
            found = estimate_of(run, compile=how, **options)
            assert_same(found, expected, options)
            assert found.note.graphs == 0
            assert not [*places["disk"].iterdir()] and not [*places["folder"].iterdir()]

    def test_in_every_size_of_memory(self, make, how):
        run = run_of(make)
        expected = estimate_of(run, compile=how, graphs="keep")
        kept = set()
        for memory in (0, "5KiB", "10KiB", "20KiB", "50KiB", "100KiB", "200KiB", "1MiB", "1GB"):
            found = estimate_of(run, compile=how, memory=memory)
            assert_same(found, expected, memory)
            kept.add((found.note.graphs, found.note.states))
        # One state, some, all; some graphs, all.
        assert len(kept) >= 5 and {(0, 1), (STEPS, 0)} <= kept
        assert any(0 < graphs < STEPS for graphs, _ in kept)

    def test_with_graphs_of_the_last_steps_and_states_elsewhere(self, make, how, places):
        run = run_of(make)
        expected = estimate_of(run, compile=how, graphs="keep")
        sizes = ("20KiB", "40KiB", "80KiB", "160KiB")
        notes = {memory: estimate_of(run, compile=how, memory=memory).note for memory in sizes}
        memory = next(m for m, note in notes.items() if note.graphs and note.states)
        for store in STORES:
            found = estimate_of(run, compile=how, memory=memory, store=store_of(store, places))
            assert found.note.graphs and found.note.states
            assert_same(found, expected, store)

    def test_through_a_window(self, make, how):
        run = run_of(make)
        expected = estimate_of(run, compile=how, graphs="keep", window=5)
        for plan in PLANS:
            found = estimate_of(run, compile=how, checkpoints=plan, window=5)
            assert_same(found, expected, plan)
        for memory in (0, "10KiB", "60KiB", "1GB"):
            assert_same(estimate_of(run, compile=how, memory=memory, window=5), expected, memory)

    def test_under_a_clip(self, make, how):
        run = run_of(make)
        free = estimate_of(run, compile=how)
        clip = float(free.note.adjoint.median())
        expected = estimate_of(run, compile=how, graphs="keep", clip=clip)
        assert not torch.equal(expected.grad["beta1"], free.grad["beta1"])
        for plan in PLANS:
            found = estimate_of(run, compile=how, checkpoints=plan, clip=clip)
            assert_same(found, expected, plan)

    def test_by_the_operations_that_were_traced(self, make):
        run = run_of(make)
        traced, patched = estimate_of(run, compile="trace"), estimate_of(run, compile=True)
        assert traced.note.how.endswith("traced")
        assert_same(traced, patched, "trace")


class TestTheNote:
    @pytest.mark.parametrize("slots", [1, 2, 3, 5, 10, 11, 40])
    def test_revolve_does_as_few_steps_again_as_can_be(self, how, slots):
        note = estimate_of(run_of(), compile=how, checkpoints=f"revolve:{slots}").note
        assert note.states <= min(slots, STEPS)
        # But for the sweep there, the last step of which is left to the way back.
        assert note.recomputed == revolve_steps(STEPS, slots) - (STEPS - 1)

    @pytest.mark.parametrize("slots", [1, 3, 40])
    def test_a_number_is_revolves(self, how, slots):
        run = run_of()
        notes = [
            estimate_of(run, compile=how, checkpoints=plan).note
            for plan in (slots, f"revolve:{slots}")
        ]
        assert notes[0].states == notes[1].states and notes[0].recomputed == notes[1].recomputed

    @pytest.mark.parametrize("slots", [1, 2, 3, 5, 11, 40])
    def test_online_keeps_no_more_than_its_slots(self, how, slots):
        note = estimate_of(run_of(), compile=how, checkpoints=f"online:{slots}").note
        assert note.states <= min(slots, STEPS)
        fewest = revolve_steps(STEPS, slots) - (STEPS - 1)
        assert fewest <= note.recomputed <= 1.2 * fewest

    @pytest.mark.parametrize("k", [1, 2, 3, 4, 11, 40])
    def test_every_does_no_step_more_than_once_again(self, how, k):
        note = estimate_of(run_of(), compile=how, checkpoints=f"every:{k}").note
        kept = -(-STEPS // k)
        assert note.recomputed <= STEPS - kept
        assert note.states <= kept + k
        assert (note.recomputed == 0) == (k == 1)

    def test_all_does_none_again(self, how):
        note = estimate_of(run_of(), compile=how, checkpoints="all").note
        assert (note.graphs, note.states, note.recomputed) == (0, STEPS, 0)

    def test_a_window_leaves_the_earlier_steps_alone(self, how):
        note = estimate_of(run_of(), compile=how, window=5, checkpoints="revolve:2").note
        assert note.steps == STEPS and note.states == 2
        assert note.recomputed == revolve_steps(5, 2) - 4
        assert note.adjoint.shape == (STEPS + 1,)
        assert note.adjoint.isnan().tolist() == [True] * (STEPS - 5) + [False] * 6
        whole = estimate_of(run_of(), compile=how).note.adjoint
        assert torch.equal(note.adjoint[-6:], whole[-6:])

    def test_memory_holds_what_is_kept(self, how):
        run = run_of()
        state = state_bytes(run.begin(run.resolve({}).at(0), 1))
        for memory in (state, int(2.5 * state), 4 * state, STEPS * state - 1, 3 * STEPS * state):
            note = estimate_of(run, compile=how, memory=memory, graphs="recompute").note
            assert note.graphs == 0 and note.states == min(STEPS, memory // state)

    def test_how_says_what_was_kept(self, how):
        run, by = run_of(), "compiled" if how else "by autograd"
        said = [
            estimate_of(run, compile=how, **options).note.how
            for options in ({"graphs": "keep"}, {"checkpoints": "every:3"}, {"memory": 0})
        ]
        assert said == [
            f"all 11 graphs kept, {by}",
            f"checkpoints every:3, {by}",
            f"1 of 11 states kept by revolve, {by}",
        ]


class TestFilesAreGone:
    """Wherever a metagradient ends before it is through."""

    def ends(self, places, of=F.cross_entropy, outer=None, *, values=(), compile=False):
        train, valid = examples(40, 5), examples(30, 5, seed=1)
        make = lambda: nn.Linear(5, 3).double()  # noqa: E731  # one use
        problem = problem_from_module(make, of, train, valid, batch_size=10, outer_loss_fn=outer)
        run = Training(problem, find_rule("sgd"), 120, values=dict(values))
        options = {"checkpoints": "all", "store": places["folder"], "compile": compile}
        estimate, _ = Replay(**options)(run, run.start(["lr"]), seed=0)
        return estimate, [*places["folder"].iterdir()]

    def test_at_a_training_that_diverges(self, places):
        squares = lambda output, target: output.square().mean()  # noqa: E731  # one use
        estimate, left = self.ends(places, squares, values={"lr": 1e9})
        assert estimate.note.outcome is Outcome.DIVERGED and not left

    def test_at_a_held_out_loss_without_a_graph(self, places):
        errors = lambda output, target: (output.argmax(-1) != target).double().mean()  # noqa: E731
        estimate, left = self.ends(places, outer=errors)
        assert estimate.note.outcome is Outcome.NOT_DIFFERENTIABLE and not left

    def test_at_an_operation_without_a_second_derivative(self, places):
        def fused(output, target):
            x = output.view(1, 1, 10, 3)
            attended = F.scaled_dot_product_attention(x, x, x).view(10, 3)
            return F.cross_entropy(attended, target)

        estimate, left = self.ends(places, fused, F.cross_entropy)
        assert estimate.note.outcome is Outcome.NOT_DIFFERENTIABLE and not left

    def test_at_steps_that_are_not_trusted(self, places, monkeypatch):
        def off(self, graph):
            back = len(self.graph.takes) == sum(n.op == "placeholder" for n in graph.graph.nodes)
            return lambda *inputs: [x * (2 if back else 1) for x in graph(*inputs)]

        monkeypatch.setattr(Machine, "_compiled", off)
        with pytest.warns(UserWarning, match="the adjoint of p differs"):
            estimate, left = self.ends(places, compile=True)
        assert estimate.ok and not left

    def test_at_a_model_that_raises(self, places):
        calls = itertools.count()

        def raising(output, target):
            if next(calls) == 60:
                raise KeyError("it")
            return F.cross_entropy(output, target)

        with pytest.raises(KeyError, match="it"):
            self.ends(places, raising, F.cross_entropy)
        assert not [*places["folder"].iterdir()]


def unrolled(run, names, *, seed, window):
    """The gradient through the last steps by one graph of them all, the earlier ones constant."""
    leaves = {n: v.requires_grad_() for n, v in run.start(names).items()}
    resolved = run.resolve(leaves)
    plain, first = resolved.detach(), run.steps - window
    state = run.begin(resolved.at(0), seed)
    if first:
        state = run.begin(plain.at(0), seed)
    for i in range(first):
        state = run.step(state, plain.at(i), i, seed)
    state = state._replace(p=state.p.detach().requires_grad_())
    for i in range(first, run.steps):
        state = run.step(state, resolved.at(i), i, seed, graph=True)
    loss = run.outer_loss(state, resolved.at(run.steps - 1))
    grads = torch.autograd.grad(loss, [*leaves.values()], materialize_grads=True, allow_unused=True)
    return float(loss.detach()), dict(zip(leaves, grads, strict=True))


class TestWindow:
    @NETS
    @pytest.mark.parametrize("window", [1, 2, 4, STEPS - 1, STEPS])
    def test_earlier_steps_are_constants(self, make, how, window):
        run = run_of(make)
        loss, grads = unrolled(run, NAMES, seed=1, window=window)
        found = estimate_of(run, compile=how, window=window)
        assert found.loss == pytest.approx(loss, rel=1e-12)
        for name, expected in grads.items():
            error = float((found.grad[name] - expected).norm())
            assert error <= 1e-11 * float(expected.norm()), name

    @pytest.mark.parametrize("window", [3, STEPS])
    def test_the_start_is_one_of_them(self, how, window):
        """Only a window over everything reaches a hyper that fills a slot before the first step."""
        run = run_of(rule="adagrad", initial_accumulator_value=0.05)
        names = ["initial_accumulator_value", "lr"]
        _, grads = unrolled(run, names, seed=1, window=window)
        found = estimate_of(run, names, compile=how, window=window)
        for name, expected in grads.items():
            assert torch.allclose(found.grad[name], expected, rtol=1e-11, atol=0), name
        assert bool(found.grad["initial_accumulator_value"]) == (window == STEPS)

    @pytest.mark.parametrize("window", [STEPS, STEPS + 1, 10**6])
    def test_over_everything_it_is_none(self, how, window):
        run = run_of(cnn)
        free = estimate_of(run, compile=how)
        assert_same(estimate_of(run, compile=how, window=window), free, window)

    def test_knots_before_it_have_no_share(self, how):
        grad = estimate_of(run_of(), compile=how, window=2).grad["lr.knots"]
        assert grad.count_nonzero() == 2 and float(grad[0]) == 0


class Parabola:
    """One weight p, training loss a p² / 2, held-out loss (p - c)² / 2: no batch, no choice."""

    name, hypers, choices, chosen, splits = "parabola", {}, {}, {}, ("valid",)
    start_at, curvature, goal = 2.0, 4.0, 1.0

    def choose(self, **chosen):
        return self

    def start(self, seed):
        return {"p": torch.tensor([self.start_at], dtype=DOUBLE)}, {}

    def batch(self, step, seed):
        return torch.zeros(1)

    def inner_loss(self, params, buffers, hypers, batch):
        return self.curvature / 2 * (params["p"] ** 2).sum(), buffers

    def outer_loss(self, params, buffers, hypers):
        return ((params["p"] - self.goal) ** 2).sum() / 2

    def measure(self, params, buffers, split):
        return {"loss": float(self.outer_loss(params, buffers, {}))}


def heavy_ball(steps, lr, momentum, clip=float("inf"), window=None):
    """(gradient in lr, in momentum, norms of the weight's adjoint), by hand in plain numbers."""
    a, p, b, path = Parabola.curvature, Parabola.start_at, 0.0, []
    for _ in range(steps):
        path.append((p, b))
        b = momentum * b + a * p
        p = p - lr * b
    p_bar, b_bar, in_lr, in_momentum, norms = p - Parabola.goal, 0.0, 0.0, 0.0, []
    norms.append(abs(p_bar))
    for p, b in path[::-1][: window or steps]:
        factor = min(1.0, clip / abs(p_bar))
        p_bar, b_bar = factor * p_bar, factor * b_bar
        in_lr -= (momentum * b + a * p) * p_bar
        b_bar -= lr * p_bar
        in_momentum += b * b_bar
        p_bar, b_bar = p_bar + a * b_bar, momentum * b_bar
        norms.append(abs(p_bar))
    return in_lr, in_momentum, norms[::-1]


def parabola(steps, lr, momentum):
    return Training(Parabola(), find_rule("sgd"), steps, values={"lr": lr, "momentum": momentum})


class TestClip:
    @pytest.mark.sampled(8)
    @pytest.mark.parametrize("clip", [1e-3, 0.7, 5.0, 1e9])
    @pytest.mark.parametrize("window", [None, 4])
    @pytest.mark.parametrize(("lr", "momentum"), [(0.6, 0.0), (0.3, 0.6), (0.9, 0.3)])
    def test_one_factor_scales_the_adjoints_of_weights_and_slots(
        self, how, lr, momentum, clip, window
    ):
        run = parabola(12, lr, momentum)
        for options in ({"graphs": "keep"}, {"checkpoints": "revolve:2"}):
            options |= {"clip": clip, "window": window, "compile": how}
            names = ["lr", "momentum"] if momentum else ["lr"]
            found = estimate_of(run, names, **options)
            in_lr, in_momentum, norms = heavy_ball(12, lr, momentum, clip, window)
            assert float(found.grad["lr"]) == pytest.approx(in_lr, rel=1e-12)
            if momentum:
                assert float(found.grad["momentum"]) == pytest.approx(in_momentum, rel=1e-12)
            assert found.note.adjoint[-len(norms) :].tolist() == pytest.approx(norms, rel=1e-12)

    @pytest.mark.sampled(4)
    @NETS
    @pytest.mark.parametrize("clip", [1e6, float("inf"), 10**6])
    def test_a_large_one_changes_no_bit(self, make, how, clip):
        run = run_of(make)
        free = estimate_of(run, compile=how)
        for graphs in ("keep", "recompute"):
            assert_same(
                estimate_of(run, compile=how, clip=clip, graphs=graphs), free, (clip, graphs)
            )

    def test_an_adjoint_of_nothing_is_left_as_it_is(self, how):
        """Where the held-out loss is at its least there is no direction to keep."""
        run = parabola(3, 0.25, 0.0)
        run.problem.goal = 0.0
        estimate = estimate_of(run, ["lr"], compile=how, clip=0.5)
        assert estimate.note.adjoint.tolist() == [0, 0, 0, 0] and float(estimate.grad["lr"]) == 0


class TestBlowsUp:
    def test_where_the_adjoint_grows_by_a_factor_per_step(self, how):
        # The adjoint is multiplied by 1 - lr * 4 = -3 with each step back: 3**13 > 1e6 > 3**12.
        estimate = estimate_of(parabola(30, 1.0, 0.0), ["lr"], compile=how)
        assert estimate.note.blows_up() == 30 - 13
        assert estimate.note.blows_up(factor=80) == 30 - 4
        assert estimate.note.blows_up(factor=82) == 30 - 5

    def test_a_window_behind_it_leaves_it_out(self, how):
        run = parabola(30, 1.0, 0.0)
        first = estimate_of(run, ["lr"], compile=how).note.blows_up() + 1
        windowed = estimate_of(run, ["lr"], compile=how, window=30 - first)
        assert windowed.note.blows_up() is None
        assert windowed.note.blows_up(factor=3**12 - 1) == first

    def test_not_where_training_is_calm(self, how):
        assert estimate_of(parabola(30, 0.1, 0.3), ["lr"], compile=how).note.blows_up() is None
        assert estimate_of(run_of(cnn), compile=how).note.blows_up() is None

    @pytest.mark.parametrize("rule", ["agnes", "stochasticnesterov", "schedulefreesgd", "ldog"])
    def test_beside_the_weights_to_use_where_gradients_are_taken_at_others(self, rule, how):
        run = replace(
            run_of(), rule=find_rule(rule), values={"lr": 0.1}, schedules={}, granularity={}
        )
        resolved = run.resolve({})
        state, values = run_training(run, resolved, 1).state, resolved.at(run.steps - 1)
        used = run.layout.flatten(run.params(state, values)).requires_grad_()
        (g,) = torch.autograd.grad(run.outer_loss_at(used, state, values), used)
        note = estimate_of(run, ["lr"], compile=how).note
        share = 1.0
        if rule == "schedulefreesgd":  # Its average is of where gradients are taken and of a slot.
            beta = float(values["momentum"])
            share = ((1 / beta) ** 2 + (1 - 1 / beta) ** 2) ** 0.5
        assert float(note.adjoint[-1]) == pytest.approx(share * float(g.norm()), rel=1e-6)
        assert note.blows_up() is None

    def test_an_infinite_adjoint_has_blown_up(self):
        norms = torch.tensor([float("nan"), float("inf"), 2.0, 1.0])
        assert Note(adjoint=norms).blows_up() == 1

    def test_without_an_adjoint_there_is_nothing_to_tell(self):
        assert Note().blows_up() is None


FOLDER = Path("/no/such/folder")
BAD = {
    "graphs": ("quick", r"graphs='quick' is none of 'auto', 'keep' and 'recompute'"),
    "no graphs": (None, r"graphs=None is none of 'auto', 'keep' and 'recompute'"),
    "memory": ("lots", r"memory='lots' is not a size; .* such as '2GiB'"),
    "negative memory": (-1, r"memory=-1 is below 0 bytes; give a size such as '2GiB'"),
    "checkpoints": ("evry:3", r"no plan 'evry:3'; did you mean 'every:N'\?.* number of states"),
    "checkpoints without a number": ("revolve", r"no plan 'revolve'; did you mean 'revolve:N'\?"),
    "no checkpoints": (0, r"slots=0 of revolve is not a count; give a whole number from 1"),
    "half a checkpoint": (2.5, r"no plan '2.5'; .* give a number of states"),
    "every no checkpoints": ("every:0", r"k=0 of every is not a count; give a whole number from 1"),
    "store": ("tape", r"no store 'tape'; known: cpu, device, disk; a directory .* pathlib.Path"),
    "store by name": ("/tmp", r"no store '/tmp'.* a directory is given as a pathlib.Path"),
    "store in nowhere": (FOLDER, r"'/no/such/folder' is not a directory; make it, or name another"),
    "compile": ("yes", r"compile='yes' is none of True, False"),
    "window": (0, r"window=0 must be a whole number, at least 1, or None for none"),
    "clip": (-1.0, r"clip=-1.0 must be a number, at least 0, or None for none"),
    "clip of nothing": (float("nan"), r"clip=nan must be a number, at least 0, or None for none"),
}
ARGUMENTS = ("graphs", "memory", "checkpoint", "store", "compile", "window", "clip", "expect")


def argument_of(label):
    (name,) = (name for name in ARGUMENTS if name in label)
    return "checkpoints" if name == "checkpoint" else name


@pytest.mark.parametrize(("label", "bad", "message"), [(k, *v) for k, v in BAD.items()])
def test_bad_arguments_are_named_with_the_next_move(label, bad, message):
    with pytest.raises(ValueError, match=message):
        # A store is looked for when it is used.
        estimate_of(run_of(), **{argument_of(label): bad})


LACKING = {
    "memory without bound": (float("inf"), "memory=inf"),
    "memory that is no number": (float("nan"), "memory=nan"),
    "memory in two dots": ("1.2.3GiB", "memory='1.2.3GiB'"),
    "window of a half": (2.5, "window=2.5"),
    "window in words": ("3", "window='3'"),
    "clip in words": ("1", "clip='1'"),
    "clip to 0": (0, "clip=0"),
    "store of nothing": (None, "store=None"),
    "expect in words": ("soon", "expect='soon'"),
}


@pytest.mark.parametrize(("label", "bad", "named"), [(k, *v) for k, v in LACKING.items()])
def test_bad_arguments_are_named_before_training(label, bad, named):
    with pytest.raises(ValueError, match=named):
        Replay(**{argument_of(label): bad})
