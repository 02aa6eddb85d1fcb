"""Forward mode against replayed reverse mode, in float64, by autograd and by traced operations."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from nets import Around, Late, cnn, examples, mlp, one_layer
from points import EVERY_RULE, brief, values_in_nets
from torch import nn

from hyperdescent.inner.registry import find_rule
from hyperdescent.inner.schedules.schedule import find_schedule
from hyperdescent.meta import auto as auto_module
from hyperdescent.meta.auto import choose_method
from hyperdescent.meta.forward import forward as forward_module
from hyperdescent.meta.forward import tangent_step as tangents
from hyperdescent.meta.forward.forward import Forward
from hyperdescent.meta.hypergradient import hypergradient
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training

STEPS = 8


def noisy():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)).double()


def problem(make=mlp):
    shape = (1, 6, 6) if make is cnn else (5,)
    return problem_from_module(
        make, F.cross_entropy, examples(40, *shape), examples(30, *shape, seed=1), batch_size=10
    )


def training(rule="adamw", of=None, **options):
    rule = find_rule(rule)
    return Training(of or problem(), rule, STEPS, values=values_in_nets(rule), **options)


@pytest.fixture
def traced(monkeypatch):
    """Without a compiler, whose code test_compiled looks at."""
    monkeypatch.setattr(tangents.TangentMachine, "_compiled", lambda self, graph: graph)
    return Forward(compile=True)


@pytest.fixture(params=[False, True], ids=["autograd", "traced"])
def forward(request, traced):
    return traced if request.param else Forward(compile=False)


def assert_same(forward, run, learn):
    point = run.start(learn)
    expected, _ = Replay(compile=False)(run, point, seed=3)
    found, carry = forward(run, point, seed=3)
    assert found.ok and carry is None
    assert found.note.how.endswith("compiled" if forward.compile else "by autograd")
    assert found.loss == pytest.approx(expected.loss, rel=1e-13)
    for name, value in expected.grad.items():
        torch.testing.assert_close(found.grad[name], value, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("rule", EVERY_RULE.values(), ids=lambda rule: rule.name)
def test_every_rule_in_every_hyper(rule):
    assert_same(Forward(compile=False), training(rule), list(rule.hypers))


@pytest.mark.parametrize("rule", EVERY_RULE.values(), ids=lambda rule: rule.name)
def test_every_rule_traced_in_every_hyper(rule, traced, few_iterations):
    assert_same(traced, training(brief(rule), problem(one_layer)), list(rule.hypers))


@pytest.mark.parametrize("make", [cnn, noisy])
def test_statistics_and_draws(forward, make):
    assert_same(forward, training(of=problem(make)), ["lr", "beta1"])


def test_convolutions_compile():
    """Forward mode makes zeros in a way of its own, which no compiler knows."""
    assert_same(Forward(compile=True), training(of=problem(cnn)), ["lr", "beta1"])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("part", ["p", "slots m", "the tangent of p", "the tangent of slots v"])
def test_compiled_steps_that_are_wrong_are_not_used(monkeypatch, part):
    """And are not tried again."""
    names = ["p", "slots m", "slots v"]
    names += [f"the tangent of {name}" for name in names]
    tried = []

    def wrong(self, graph):
        def run(*inputs):
            out = list(graph(*inputs))
            out[names.index(part)] = 1.001 * out[names.index(part)]
            tried.append(1)
            return out

        return run

    monkeypatch.setattr(tangents.TangentMachine, "_compiled", wrong)
    run = training()
    point = run.start(["lr", "beta1"])
    expected, _ = Forward(compile=False)(run, point, seed=3)
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"is wrong: {part} differs from autograd's"):
            found, _ = Forward(compile=True)(run, point, seed=3)
        assert "by autograd: the compiled step" in found.note.how
        assert all(torch.equal(found.grad[n], expected.grad[n]) for n in point)
    assert len(tried) == 1


def test_schedules_and_grains(forward):
    run = training(schedules={"lr": find_schedule("piecewise:4")}, granularity={"lr": "tensor"})
    assert_same(forward, run, ["lr", "beta2"])


@pytest.mark.parametrize("every", [1, 3, STEPS])
def test_in_real_time_with_hypers_at_rest_it_is_the_whole_run(every):
    run = training()
    point, carry, ends = run.start(["lr", "beta1"]), None, []
    for k in range(-(-STEPS // every)):
        estimate, carry = Forward(compile=False, every=every)(run, point, carry, seed=k)
        ends.append((carry.done, estimate.note.steps))
    assert carry.done == STEPS and sum(steps for _, steps in ends) == STEPS
    whole, _ = Replay(compile=False)(run, point, seed=0)
    assert estimate.loss == pytest.approx(whole.loss, rel=1e-13)
    assert all(torch.allclose(estimate.grad[n], whole.grad[n], rtol=1e-10) for n in point)
    _, carry = Forward(compile=False, every=every)(run, point, carry, seed=9)
    assert carry.done == every and carry.seed == 9


def test_in_real_time_what_is_learned_may_not_change():
    run = training()
    _, carry = Forward(compile=False, every=2)(run, run.start(["lr"]), seed=0)
    with pytest.raises(ValueError, match="2 learned numbers go on from tangents in 1; learn the"):
        Forward(compile=False, every=2)(run, run.start(["lr", "beta1"]), carry, seed=0)


def test_memory_does_not_grow_with_the_number_of_steps(forward, monkeypatch):
    """Of all states and tangents no more than those of two steps are alive at once."""
    made, alive = [], []

    class Watched(Around):
        def batch(self, step, seed):
            alive.append(sum(ref() is not None for ref in made))
            return self.problem.batch(step, seed)

    choose = forward_module._ForwardPass._choose

    def watched(run):
        advance, how = choose(run)

        def noted(i, state, tangents):
            after, along = advance(i, state, tangents)
            made.extend(weakref.ref(x) for x in (after.p, *along))
            return after, along

        return noted, how

    monkeypatch.setattr(forward_module._ForwardPass, "_choose", watched)
    run = training(of=Watched(problem()))
    forward(run, run.start(["lr", "beta1"]), seed=0)
    assert len(made) == 4 * STEPS and 0 < max(alive) <= 4


def test_values_that_are_not_learned_have_no_tangents():
    """A weight for every example would be one for every example, step and column."""
    data = examples(40, 5)
    of = problem_from_module(
        mlp,
        lambda output, target: F.cross_entropy(output, target, reduction="none"),
        data,
        data,
        batch_size=10,
        data_weights=True,
    )
    run = training(of=of)
    point = run.start(["lr"])
    assert set(tangents.slopes_of(run, point, tangents.unit_directions(point))) == {"lr"}
    assert_same(Forward(compile=False), run, ["lr", "data_weights"])


def test_a_buffer_that_first_changes_late_is_named():
    run = training(of=Late(problem()))
    with pytest.raises(ValueError, match="buffer 'mean' is first replaced after step 1"):
        Forward(compile=False)(run, run.start(["lr"]), seed=0)


def test_a_model_that_refuses_what_is_not_finite_has_diverged(forward):
    class Refusing(nn.Linear):
        def __init__(self):
            super().__init__(5, 3, dtype=torch.float64)

        def forward(self, x):
            if not torch.compiler.is_compiling() and not self.weight.isfinite().all():
                raise ArithmeticError("bad weights")
            return super().forward(x)

    def far(output, target):
        return F.cross_entropy(output, target) * 1e300

    of = problem_from_module(Refusing, far, examples(40, 5), examples(30, 5), batch_size=10)
    run = Training(of, find_rule("sgd"), STEPS, values={"lr": 1e30})
    found, _ = Forward(compile=False)(run, run.start(["lr"]), seed=0)
    assert found.note.outcome is Outcome.DIVERGED and found.grad == {}


class Backwards(torch.autograd.Function):
    """tanh, with no forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.tanh()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class OnlyBack(nn.Module):
    def forward(self, x):
        return Backwards.apply(x)


def only_back():
    return nn.Sequential(nn.Linear(5, 6), OnlyBack(), nn.Linear(6, 3)).double()


def test_an_operation_without_forward_mode_is_an_outcome():
    run = training(of=problem(only_back))
    found, _ = Forward(compile=False)(run, run.start(["lr"]), seed=0)
    assert found.note.outcome is Outcome.NOT_DIFFERENTIABLE
    assert 'use method="replay"' in found.note.reason


def test_in_real_time_hypers_may_change():
    """Its loss is that of the run as it was, first with one rate and then with another."""
    run = training("sgd")
    first, second = ({"lr": torch.tensor(x, dtype=torch.float64)} for x in (0.1, 0.4))
    forward = Forward(compile=False, every=STEPS // 2)
    _, carry = forward(run, first, seed=0)
    changed, _ = forward(run, second, carry, seed=0)
    rates = torch.tensor([0.1, 0.4], dtype=torch.float64).repeat_interleave(STEPS // 2)
    scheduled = training("sgd", schedules={"lr": find_schedule("free")})
    expected, _ = Replay(compile=False)(scheduled, {"lr.steps": rates}, seed=0)
    assert changed.loss == pytest.approx(expected.loss, rel=1e-13)
    # A change of the rate at every step by the same amount: the sum over steps.
    assert float(changed.grad["lr"]) == pytest.approx(float(expected.grad["lr.steps"].sum()))


def test_a_diverging_training_has_diverged():
    def squares(output, target):
        return (output - F.one_hot(target, 3)).square().mean()

    of = problem_from_module(mlp, squares, examples(40, 5), examples(30, 5, seed=1), batch_size=10)
    run = Training(of, find_rule("sgd"), 200, values={"lr": 1e3})
    estimate, carry = Forward(compile=False)(run, run.start(["lr"]), seed=0)
    assert estimate.note.outcome is Outcome.DIVERGED and carry is None
    assert "finite" in estimate.note.reason


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 1.5}, {"expect": -1}, {"compile": 2}])
def test_bad_options_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}={options[name]}"):
        Forward(**options)


class TestAuto:
    def test_is_replay_where_states_fit(self):
        run = training()
        method, why = choose_method(run, run.start(["lr"]))
        assert isinstance(method, Replay) and why == f"all {STEPS} states fit"

    def test_is_forward_for_few_numbers_and_no_room(self):
        run = training()
        method, why = choose_method(run, run.start(["lr"]), memory=1)
        assert isinstance(method, Forward) and "less than" in why and "1 states fit" in why

    def test_is_replay_for_many_numbers_and_no_room(self):
        run = training(schedules={"lr": find_schedule("free")}, granularity={"lr": "tensor"})
        method, why = choose_method(run, run.start(["lr"]), memory=1)
        assert isinstance(method, Replay) and "cost more than" in why

    def test_is_replay_where_forward_mode_cannot(self, monkeypatch):
        forward = Forward(compile=False), "less"
        monkeypatch.setattr(auto_module, "choose_method", lambda *given: forward)
        found = hypergradient(problem(only_back), "adamw", learn="lr", steps=STEPS)
        assert found.ok and 'use method="replay"' in found.note.how

    def test_says_what_it_picked(self):
        estimate = hypergradient(problem(), "adamw", learn="lr", steps=5)
        assert "all 5 states fit" in estimate.note.how
