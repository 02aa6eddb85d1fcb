"""Generated code against autograd, and what becomes of code that is wrong.

Every part of a step that is compiled takes several seconds, so the nets are few, and the tests of
distrust run the traced operations as they are.
"""

import json
import warnings
import weakref
from functools import cached_property
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import Around
from torch import nn
from torch._dynamo.utils import counters

from hyperdescent.inner.registry import find_rule
from hyperdescent.inner.schedules.schedule import find_schedule
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.tracing import codegen, machine
from hyperdescent.meta.tracing.machine import Machine, machine_of
from hyperdescent.meta.tracing.step_graph import CannotTrace, StepGraph, trace
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training

# What inductor loads when it is first used is told so by the rest of torch.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")

DOUBLE, SINGLE = torch.float64, torch.float32
STEPS = 6
NAMES = ["lr", "beta1", "beta2", "eps"]
GIVEN = {"lr": 0.03, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3}
FAST, LEAN = {"graphs": "keep"}, {"checkpoints": "all"}


def examples(count, *shape, seed=0, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, *shape, dtype=dtype, generator=generator)
    return inputs, inputs.flatten(1)[:, :3].argmax(1)


def problem(make, *shape, dtype=DOUBLE, **options):
    train = examples(40, *shape, dtype=dtype)
    valid = examples(30, *shape, seed=1, dtype=dtype)
    return problem_from_module(make, F.cross_entropy, train, valid, batch_size=10, **options)


def training(of, steps=STEPS, *, rule="adam", **options):
    given = {n: v for n, v in GIVEN.items() if n in find_rule(rule).hypers}
    return Training(of, find_rule(rule), steps, **{"values": given, **options})


def compilations():
    return counters["aot_autograd"]["total"]


def assert_agrees(run, tolerance, *, names=NAMES, seed=0, point=None, **options):
    point = run.start(names) if point is None else point
    expected, _ = Replay(compile=False)(run, point, seed=seed)
    estimate, _ = Replay(compile=True, **options)(run, point, seed=seed)
    assert estimate.note.how.endswith("compiled")
    assert estimate.loss == pytest.approx(expected.loss, rel=tolerance)
    pairs = {n: (estimate.grad[n], expected.grad[n]) for n in expected.grad}
    pairs["the adjoint"] = estimate.note.adjoint, expected.note.adjoint
    for name, (found, value) in pairs.items():
        error, size = (float(x.double().norm()) for x in (found - value, value))
        # What is 0 by cancellation, as the one of beta1 at the first step, is rounding in either.
        assert error <= tolerance * size + 1e-15, (name, found, value)
    return estimate


class Strided(Around):
    """Every other batch is laid out by columns, and a buffer and its adjoint are one number each,
    expanded, at their first step: code made for one layout must not be given another.
    """

    def start(self, seed):
        return self.problem.start(seed)[0], {"mean": torch.zeros(1, dtype=DOUBLE).expand(3)}

    def batch(self, step, seed):
        inputs, target = self.problem.batch(step, seed)
        return (inputs.t().contiguous().t() if step % 2 else inputs), target

    def inner_loss(self, params, buffers, hypers, batch):
        loss, _ = self.problem.inner_loss(params, {}, hypers, batch)
        bias, mean = params["3.bias"], buffers["mean"]
        return loss + mean.sum() * bias.sum(), {"mean": 0.9 * mean.flip(0) + 0.1 * bias}

    def outer_loss(self, params, buffers, hypers):
        return self.problem.outer_loss(params, {}, hypers) + buffers["mean"].sum()


@pytest.fixture(scope="module")
def of():
    """A problem whose step is compiled in both ways, dropout and all."""

    def net():
        layers = nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)
        return nn.Sequential(*layers).double()

    made, before = Strided(problem(net, 5)), compilations()
    for graphs in (LEAN, FAST):
        assert_agrees(training(made), 1e-9, **graphs)
    # advance, pull; record, rewind. Were nothing counted, the tests below would say nothing.
    assert compilations() == before + 4
    return made


class TestDoublePrecision:
    @pytest.fixture(autouse=True)
    def nothing_more_is_compiled(self, of):
        before = compilations()
        yield
        assert compilations() == before

    @pytest.mark.parametrize("graphs", [FAST, LEAN], ids=["fast", "lean"])
    def test_other_seeds_and_points(self, of, graphs):
        """Masks are those that autograd draws, or no two runs would agree."""
        run = training(of)
        first = assert_agrees(run, 1e-9, **graphs)
        point = {n: v * 0.9 for n, v in run.start(NAMES).items()}
        other = assert_agrees(run, 1e-9, point=point, seed=1, **graphs)
        assert other.loss != first.loss

    @pytest.mark.parametrize("graphs", [FAST, LEAN], ids=["fast", "lean"])
    @pytest.mark.parametrize("steps", [1, 4, 13])
    def test_other_numbers_of_steps(self, of, steps, graphs):
        assert_agrees(training(of, steps), 1e-9, **graphs)

    def test_the_machine_is_one_for_every_number_of_steps(self, of):
        def machine(steps):
            run = training(of, steps)
            resolved = run.resolve(run.start(NAMES)).detach()
            return machine_of(run, run.begin(resolved.at(0), 0), resolved.at(0), NAMES, 0)

        assert machine(STEPS) is machine(3)

    def test_schedules(self, of):
        schedules = {"lr": find_schedule("cosine"), "beta1": find_schedule("free")}
        run = training(of, schedules=schedules)
        assert_agrees(run, 1e-9, names=["lr", "beta1", "beta2", "eps"], **LEAN)

    def test_from_every_plan_and_store_the_same_bits(self, of, tmp_path):
        run = training(of, 11)
        expected = assert_agrees(run, 1e-9, **LEAN)
        for plan in ("every:3", "revolve:2", "online:3"):
            for store in ("device", tmp_path):
                found = assert_agrees(run, 1e-9, checkpoints=plan, store=store)
                assert found.loss == expected.loss
                assert all(torch.equal(found.grad[n], expected.grad[n]) for n in NAMES)

    def test_graphs_of_the_last_steps_only(self, of):
        run = training(of, 11)
        found = assert_agrees(run, 1e-9, memory="20KiB")
        assert 0 < found.note.graphs < 11 and found.note.states

    def test_a_window_and_a_clip(self, of):
        run = training(of)
        point = run.start(NAMES)
        for options in ({"window": 3}, {"clip": 0.1}, {"window": 2, "clip": 0.1}):
            expected, _ = Replay(compile=False, **options)(run, point, seed=0)
            found, _ = Replay(compile=True, **options)(run, point, seed=0)
            assert found.note.how.endswith("compiled")
            for name, value in expected.grad.items():
                assert float(found.grad[name]) == pytest.approx(float(value), rel=1e-9)


@pytest.fixture
def only_back(monkeypatch):
    """Steps are compiled on the way back, where each is done again, and not on the way there."""
    replace_part(monkeypatch, "advance", lambda machine: machine.graph.advance())


def test_single_precision(only_back):
    def mlp():
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

    assert_agrees(training(problem(mlp, 5, dtype=SINGLE)), 1e-4, **LEAN)


def mixed():
    def mlp():
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

    return training(problem(mlp, 5, dtype=SINGLE, autocast=torch.bfloat16))


def test_mixed_precision(only_back):
    """Within a few units of bfloat16; the norm of the difference."""
    run = mixed()
    point = run.start(NAMES)
    expected, _ = Replay(compile=False)(run, point, seed=0)
    found, _ = Replay(compile=True, **LEAN)(run, point, seed=0)
    assert found.note.how.endswith("compiled")
    for name, value in expected.grad.items():
        assert float(found.grad[name]) == pytest.approx(float(value), rel=0.05), name


def test_running_statistics(only_back):
    def cnn():
        layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(12, 3)).double()

    assert_agrees(training(problem(cnn, 1, 6, 6)), 1e-9, **LEAN)


def test_convolutions_laid_out_anew_are_right_or_not_trusted(only_back, monkeypatch):
    """torch 2.13's fault, for which OPTIONS leaves this off."""

    def net():
        layers = nn.Conv2d(16, 32, 3), nn.GroupNorm(4, 32), nn.SiLU(), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(128, 3)).double()

    monkeypatch.setitem(codegen.OPTIONS, "layout_optimization", True)
    run = training(problem(net, 16, 4, 4), rule="sgd")
    point = run.start(["lr"])
    expected, _ = Replay(compile=False)(run, point, seed=0)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found, _ = Replay(compile=True, **LEAN)(run, point, seed=0)
    said = [str(each.message) for each in warned if each.category is UserWarning]
    if found.note.how.endswith("compiled"):
        assert not said
        assert float(found.grad["lr"]) == pytest.approx(float(expected.grad["lr"]), rel=1e-9)
    else:
        assert len(said) == 1 and "differs from autograd's" in said[0]
        assert torch.equal(found.grad["lr"], expected.grad["lr"])


def replace_part(monkeypatch, part, make):
    made = cached_property(make)
    made.__set_name__(Machine, part)
    monkeypatch.setattr(Machine, part, made)


def spoil(monkeypatch, part, change):
    """A part of every machine gives what change makes of the list of its outputs."""
    make = Machine.__dict__[part].func

    def spoiled(machine):
        run = make(machine)
        return lambda *inputs: change([*run(*inputs)])

    replace_part(monkeypatch, part, spoiled)


def off(index, factor=1.001):
    def change(out):
        out[index] = out[index] * factor
        return out

    return change


def batch_norm_net(bias=False):
    """A bias before the norm has a gradient of rounding alone, and an adjoint to match."""
    layers = nn.Linear(5, 4, bias), nn.BatchNorm1d(4, momentum=None), nn.Tanh(), nn.Linear(4, 3)
    return nn.Sequential(*layers).double()


GRANULARITY = {"eps": "tensor"}
GAIT_OF = {"advance": LEAN, "pull": LEAN, "record": FAST, "rewind": FAST}
# adam's p, m, v, then the running mean and variance.
MEAN = 3
WRONG = {
    "the weights": ("advance", 0, "p"),
    "a slot": ("advance", 1, "slots m"),
    "a buffer": ("advance", MEAN, "buffers 1.running_mean"),
    "the weights of a record": ("record", 0, "p"),
    "a buffer of a record": ("record", MEAN, "buffers 1.running_mean"),
    "the adjoint": ("pull", 0, "the adjoint of p"),
    "the adjoint of a slot": ("pull", 2, "the adjoint of slots v"),
    "the adjoint of a buffer": ("pull", MEAN, "the adjoint of buffers 1.running_mean"),
    "numbers on the way back": ("pull", -1, r"the cotangent of \w+"),
    "the adjoint of a record": ("rewind", 0, "the adjoint of p"),
    "numbers on a record's way back": ("rewind", -1, r"the cotangent of \w+"),
}


@pytest.fixture(scope="module")
def traced():
    """(a problem, the traced step of its training)"""
    of = problem(batch_norm_net, 5)
    run = training(of, granularity=GRANULARITY)
    values = run.resolve(run.start(NAMES)).detach().at(0)
    return of, trace(run, run.begin(values, 0), values, NAMES, 0)


class TestDistrust:
    """Of traced operations with one of their results changed."""

    @pytest.fixture
    def run(self, traced, monkeypatch, tmp_path):
        """A training whose step has no machine yet, though it is traced."""
        of, graph = traced
        monkeypatch.setattr(machine, "trace", lambda *given: graph)
        monkeypatch.setattr(Machine, "_compiled", lambda self, graph: graph)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
        return training(Around(of), granularity=GRANULARITY)

    def assert_by_autograd(self, found, run, why):
        expected, _ = Replay(compile=False)(run, run.start(NAMES), seed=0)
        assert "by autograd: " in found.note.how and why in found.note.how
        assert found.loss == expected.loss
        assert all(torch.equal(found.grad[n], expected.grad[n]) for n in NAMES)
        assert torch.equal(found.note.adjoint, expected.note.adjoint)

    @pytest.mark.parametrize(("part", "index", "name"), WRONG.values(), ids=WRONG)
    def test_of_an_error_in_the_fourth_digit(self, run, monkeypatch, part, index, name):
        spoil(monkeypatch, part, off(index))
        message = f"the compiled step of {run.label} is wrong: {name} differs from autograd's"
        with pytest.warns(UserWarning, match=message) as warned:
            found, _ = Replay(compile=True, **GAIT_OF[part])(run, run.start(NAMES), seed=0)
        assert len(warned) == 1
        self.assert_by_autograd(found, run, "differs from autograd's")

    def test_points_to_who_asked_for_it(self, run, monkeypatch):
        spoil(monkeypatch, "pull", off(0))
        with pytest.warns(UserWarning, match="differs") as warned:
            Replay(compile=True, **LEAN)(run, run.start(NAMES), seed=0)
        assert warned[0].filename == __file__

    def test_is_not_of_noise(self, monkeypatch):
        """The adjoints of a bias that batch norm takes off are other ones in every rounding."""
        monkeypatch.setattr(Machine, "_compiled", lambda self, graph: graph)
        run = training(problem(lambda: batch_norm_net(bias=True), 5))
        spoil(monkeypatch, "advance", off(0, 1 + 1e-15))
        for graphs in (LEAN, FAST):
            found, _ = Replay(compile=True, **graphs)(run, run.start(NAMES), seed=0)
            assert found.note.how.endswith("compiled")

    @pytest.mark.parametrize("part", GAIT_OF)
    def test_of_a_result_that_is_no_number(self, run, monkeypatch, part):
        spoil(monkeypatch, part, off(0, float("nan")))
        with pytest.warns(UserWarning, match=r"differs from autograd's at \S+ by nan of its norm"):
            found, _ = Replay(compile=True, **GAIT_OF[part])(run, run.start(NAMES), seed=0)
        self.assert_by_autograd(found, run, "nan")

    def test_is_silent_where_compiling_was_not_asked_for(self, run, monkeypatch):
        spoil(monkeypatch, "pull", off(0))
        found, _ = Replay(compile="auto", expect=1e9, **LEAN)(run, run.start(NAMES), seed=0)
        self.assert_by_autograd(found, run, "differs from autograd's")

    @pytest.mark.parametrize("part", GAIT_OF)
    def test_is_not_of_rounding(self, run, monkeypatch, part):
        spoil(monkeypatch, part, off(0, 1 + 2e-15))
        found, _ = Replay(compile=True, **GAIT_OF[part])(run, run.start(NAMES), seed=0)
        assert found.note.how.endswith("compiled")

    def test_of_what_cannot_be_compiled(self, run, monkeypatch):
        def refuse(*given, **options):
            raise RuntimeError("there is no compiler\nat all")

        monkeypatch.undo()
        monkeypatch.setattr(torch._inductor, "compile", refuse)
        monkeypatch.setattr(torch, "compile", refuse)
        with pytest.warns(UserWarning, match="cannot be compiled: RuntimeError: there is no comp"):
            found, _ = Replay(compile=True)(run, run.start(NAMES), seed=0)
        self.assert_by_autograd(found, run, "there is no compiler")

    def test_is_not_of_what_torch_warns_of_inside(self, run, monkeypatch):
        def warn(graph, *given, **options):
            warnings.warn("one part of torch should ask another", DeprecationWarning, stacklevel=1)
            return graph

        made = Machine._compiled
        monkeypatch.undo()
        assert Machine._compiled is not made
        monkeypatch.setattr(torch._inductor, "compile", warn)
        found, _ = Replay(compile=True)(run, run.start(NAMES), seed=0)
        assert found.note.how.endswith("compiled")

    def test_of_a_graph_that_cannot_be_parted(self, run, monkeypatch):
        def halves(self):
            raise CannotTrace("it cannot be parted")

        monkeypatch.setattr(StepGraph, "halves", halves)
        with pytest.warns(UserWarning, match="it cannot be parted"):
            found, _ = Replay(compile=True, **FAST)(run, run.start(NAMES), seed=0)
        self.assert_by_autograd(found, run, "it cannot be parted")

    @pytest.mark.parametrize("part", ["pull", "rewind"])
    def test_of_the_cotangents_of_hypers_in_a_finer_grain(self, run, monkeypatch, part):
        spoil(monkeypatch, part, off(-2))
        with pytest.warns(UserWarning, match="the cotangent of eps differs"):
            Replay(compile=True, **GAIT_OF[part])(run, run.start(NAMES), seed=0)

    @pytest.mark.parametrize("part", ["advance", "record"])
    def test_of_buffers_that_count(self, run, monkeypatch, part):
        """BatchNorm's running average divides by this one."""
        spoil(monkeypatch, part, off(MEAN + 2, 2))
        with pytest.warns(UserWarning, match=r"num_batches_tracked"):
            Replay(compile=True, **GAIT_OF[part])(run, run.start(NAMES), seed=0)

    def test_is_not_laid_aside_by_a_run_that_diverged(self, run, monkeypatch):
        """So that there was nothing to compare."""

        class Infinite(Around):
            factor = float("inf")

            def start(self, seed):
                params, buffers = self.problem.start(seed)
                return {n: self.factor * x for n, x in params.items()}, buffers

        run = training(Infinite(run.problem), granularity=GRANULARITY)
        spoil(monkeypatch, "pull", off(0, 1.5))
        replay, point = Replay(compile=True, **LEAN), run.start(NAMES)
        assert replay(run, point, seed=0)[0].note.outcome is Outcome.DIVERGED
        run.problem.factor = 1.0
        with pytest.warns(UserWarning, match="the adjoint of p differs"):
            found, _ = replay(run, point, seed=0)
        self.assert_by_autograd(found, run, "differs")

    def test_is_remembered(self, run, monkeypatch):
        calls = []

        def change(out):
            calls.append(1)
            return off(0)(out)

        spoil(monkeypatch, "pull", change)
        for graphs in (LEAN, LEAN, FAST):
            found, _ = Replay(compile="auto", expect=1e9, **graphs)(run, run.start(NAMES), seed=0)
            assert len(calls) == 1
            self.assert_by_autograd(found, run, "differs from autograd's")

    def test_is_remembered_of_what_cannot_be_compiled(self, run, monkeypatch):
        asked = []

        def refuse(*given, **options):
            asked.append(1)
            raise RuntimeError("there is no compiler")

        monkeypatch.undo()
        monkeypatch.setattr(torch._inductor, "compile", refuse)
        monkeypatch.setattr(torch, "compile", refuse)
        for _ in range(2):
            with pytest.warns(UserWarning, match="there is no compiler"):
                Replay(compile=True)(run, run.start(NAMES), seed=0)
        assert len(asked) == 1

    @pytest.mark.parametrize("part", ["pull", "rewind"])
    def test_of_one_weight_beside_another_that_is_noise(self, monkeypatch, part):
        """Of the adjoint of the second moment of a bias that batch norm takes off, say."""
        monkeypatch.setattr(Machine, "_compiled", lambda self, graph: graph)
        run = training(problem(lambda: batch_norm_net(bias=True), 5))
        names, bias = run.layout.names, run.layout.names.index("0.bias")
        start = sum(run.layout.sizes[:bias])
        assert names[bias - 1] == "0.weight"

        def change(out):
            out[2] = torch.cat([1.001 * out[2][:start], out[2][start:]])
            return out

        spoil(monkeypatch, part, change)
        with pytest.warns(
            UserWarning, match="the adjoint of slots v differs from autograd's at 0.weight by"
        ):
            Replay(compile=True, **GAIT_OF[part])(run, run.start(NAMES), seed=0)

    def test_leaves_no_states_in_memory(self, run, monkeypatch):
        """While all is done again, or twice the memory would be taken that was allowed."""
        states, alive = [], []

        class Uneven(Around):
            def batch(self, step, seed):
                alive.append(sum(ref() is not None for ref in states))
                batch = self.problem.batch(step, seed)
                return tuple(x[: 9 if step == STEPS - 1 else None] for x in batch)

        def seen(out):
            states.append(weakref.ref(out[0]))
            return out

        spoil(monkeypatch, "advance", seen)
        run = training(Uneven(run.problem), granularity=GRANULARITY)
        found, _ = Replay(compile="auto", expect=1e9, **LEAN)(run, run.start(NAMES), seed=0)
        assert "by autograd: a batch has shapes" in found.note.how
        assert max(alive) == STEPS - 1  # All that the traced steps made, before the last of them.
        assert alive[-1] == 0

    @pytest.mark.parametrize("part", GAIT_OF)
    def test_comes_before_the_first_step(self, run, monkeypatch, part):
        asked, before = [], []

        class Watched(Around):
            def batch(self, step, seed):
                asked.append(step)
                return self.problem.batch(step, seed)

        def seen(out):
            before.extend(asked)
            return off(0)(out)

        spoil(monkeypatch, part, seen)
        run = training(Watched(run.problem), 20, granularity=GRANULARITY)
        with pytest.warns(UserWarning, match="differs"):
            Replay(compile=True, **GAIT_OF[part])(run, run.start(NAMES), seed=0)
        assert 0 < max(before) < 5 and max(asked) == 19

    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("factor", [-1.0, 0.0, 1.5])
    @pytest.mark.parametrize("part", GAIT_OF)
    def test_of_an_error_beyond_that_of_bfloat16(self, monkeypatch, part, factor):
        monkeypatch.setattr(Machine, "_compiled", lambda self, graph: graph)
        run = mixed()
        replay = Replay(compile=True, **GAIT_OF[part])
        assert replay(run, run.start(NAMES), seed=0)[0].note.how.endswith("compiled")
        run = mixed()
        spoil(monkeypatch, part, off(0, factor))
        with pytest.warns(UserWarning, match="differs from autograd's"):
            replay(run, run.start(NAMES), seed=0)

    def test_is_not_of_the_rounding_at_a_minimum(self, monkeypatch):
        """Where the gradient of a loss of 0 in single precision has not one digit that is right."""
        monkeypatch.setattr(Machine, "_compiled", lambda self, graph: graph)

        def mlp():
            return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

        def noisy(out):
            floor = torch.finfo(SINGLE).eps
            return [x + floor * x.abs().mean() * torch.randn_like(x) for x in out]

        run = training(problem(mlp, 5, dtype=SINGLE), 2000)
        spoil(monkeypatch, "pull", noisy)
        found, _ = Replay(compile=True, **LEAN)(run, run.start(NAMES), seed=0)
        assert found.note.how.endswith("compiled")

    def test_what_tracing_takes_is_no_price_of_compiling(self, run, tmp_path):
        found, _ = Replay(compile="trace")(run, run.start(NAMES), seed=0)
        assert found.note.how.endswith("traced")
        kept = Path(tmp_path, "hyperdescent.json")
        assert not kept.exists() or not json.loads(kept.read_text())
