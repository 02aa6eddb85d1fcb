"""Trainings done at once against the same one by one, in float64 and by traced operations."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from nets import cnn, examples, mlp
from torch import nn
from torch._dynamo.utils import counters

from hyperdescent.inner.registry import find_rule
from hyperdescent.inner.schedules.schedule import find_schedule
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.problems.seeding import fold_in
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.sampling.batched_steps import BatchedSteps
from hyperdescent.meta.sampling.population import (
    Population,
    losses,
    metagradients,
)
from hyperdescent.meta.tracing.machine import Machine
from hyperdescent.meta.training.finite_differences import held_out_loss
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training
from hyperdescent.studies.problems import load_problem

STEPS, SEEDS = 8, (3, 4, 3)


def frozen():
    model = mlp()
    model[0].requires_grad_(False)
    return model


def problem(make=mlp, loss_fn=F.cross_entropy):
    shape = (1, 6, 6) if make is cnn else (5,)
    return problem_from_module(
        make, loss_fn, examples(40, *shape), examples(30, *shape, seed=1), batch_size=10
    )


def training(rule="adamw", of=None, **options):
    given = {"lr": 0.03, "eps": 1e-3}
    return Training(of or problem(), find_rule(rule), STEPS, values=given, **options)


def points_of(run, learn):
    start = run.start(learn)
    return [{name: value * factor for name, value in start.items()} for factor in (1, 0.7, 0.9)]


RUNS = {
    "mlp": (lambda: training(), ["lr", "beta1", "weight_decay"]),
    "cnn": (lambda: training(of=problem(cnn)), ["lr", "beta1"]),
    "frozen": (lambda: training(of=problem(frozen)), ["lr"]),
    "alphagrad": (lambda: training("alphagrad"), ["lr", "alpha"]),
    "readout": (lambda: training("ldog"), ["lr", "reps_rel"]),
    "slots": (lambda: training("adagrad"), ["lr", "initial_accumulator_value"]),
    "granularity": (
        lambda: training(
            schedules={"lr": find_schedule("piecewise:3")},
            granularity={"lr": "tensor", "beta1": "element"},
        ),
        ["lr", "beta1"],
    ),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("make", "learn"), RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("memory", [None, 5000], ids=["graphs", "states"])
def test_each_is_what_it_is_alone(make, learn, memory):
    run = make()
    points = points_of(run, learn)
    found = metagradients(run, points, SEEDS, memory=memory, compile=False)
    for estimate, point, seed in zip(found, points, SEEDS, strict=True):
        alone, _ = Replay(compile=False)(run, point, seed=seed)
        assert estimate.ok and estimate.loss == pytest.approx(alone.loss, rel=1e-13)
        for name, value in alone.grad.items():
            torch.testing.assert_close(estimate.grad[name], value, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(estimate.note.adjoint, alone.note.adjoint, rtol=1e-9, atol=0)
        assert "3 trainings at once, traced" in estimate.note.how


@pytest.mark.parametrize("make", [mlp, cnn])
def test_losses_are_those_of_each_alone(make):
    run = training(of=problem(make))
    points = points_of(run, ["lr"])
    found = losses(run, points, SEEDS, compile=False)
    alone = [float(held_out_loss(run, p, s)) for p, s in zip(points, SEEDS, strict=True)]
    assert found == pytest.approx(alone, rel=1e-13)


def test_one_that_diverges_leaves_the_others_alone():
    def squares(output, target):
        return (output - F.one_hot(target, 3)).square().mean()

    run = Training(problem(loss_fn=squares), find_rule("sgd"), 60)
    points = [{"lr": torch.tensor(x, dtype=torch.float64)} for x in (0.1, 1e6)]
    good, bad = metagradients(run, points, (0, 0), compile=False)
    alone, _ = Replay(compile=False)(run, points[0], seed=0)
    torch.testing.assert_close(good.grad["lr"], alone.grad["lr"], rtol=1e-9, atol=0)
    assert bad.note.outcome is Outcome.DIVERGED and bad.grad == {}
    fine, lost = losses(run, points, (0, 0), compile=False)
    assert fine == pytest.approx(alone.loss) and lost == float("inf")


def test_an_estimate_is_the_mean_over_its_seeds():
    run = training()
    point = run.start(["lr", "beta1"])
    mean, _ = Population(3, compile=False)(run, point, seed=5)
    each = [Replay(compile=False)(run, point, seed=fold_in(5, k, 7))[0] for k in range(3)]
    assert mean.loss == pytest.approx(sum(e.loss for e in each) / 3, rel=1e-13)
    for name, value in mean.grad.items():
        assert float(value) == pytest.approx(sum(float(e.grad[name]) for e in each) / 3, rel=1e-9)
    assert mean.note.how.startswith("mean of 3 of 3 seeds")
    largest = torch.stack([e.note.adjoint for e in each]).amax(0)
    torch.testing.assert_close(mean.note.adjoint, largest, rtol=1e-9, atol=0)


def test_steps_that_cannot_be_traced_are_done_one_by_one():
    def branching(output, target):
        loss = F.cross_entropy(output, target)
        return loss if float(loss.detach()) > 0 else 2 * loss

    run = training(of=problem(loss_fn=branching))
    points = points_of(run, ["lr"])
    found = metagradients(run, points, SEEDS, compile=False)
    for estimate, point, seed in zip(found, points, SEEDS, strict=True):
        alone, _ = Replay(compile=False)(run, point, seed=seed)
        assert torch.equal(estimate.grad["lr"], alone.grad["lr"])
        assert "by autograd, one after the other: adamw on" in estimate.note.how


def test_batches_of_several_shapes_are_done_one_by_one():
    data = torch.utils.data.TensorDataset(*examples(35, 5))
    loader = torch.utils.data.DataLoader(data, batch_size=10)
    of = problem_from_module(mlp, F.cross_entropy, loader, examples(30, 5, seed=1))
    run = training(of=of)
    points = points_of(run, ["lr"])
    for estimate in metagradients(run, points, SEEDS, compile=False):
        assert estimate.ok and "one after the other: a batch has shapes" in estimate.note.how


def test_one_that_diverges_may_refuse_to_be_evaluated():
    class Refusing(nn.Linear):
        def __init__(self):
            super().__init__(5, 3, dtype=torch.float64)

        def forward(self, x):
            # Traced, where weights have no values, it does not look at them.
            if type(self.weight) is torch.Tensor and not self.weight.isfinite().all():
                raise ArithmeticError("bad weights")
            return super().forward(x)

    def squares(output, target):
        return (output - F.one_hot(target, 3)).square().mean()

    run = Training(problem(Refusing, squares), find_rule("sgd"), 60)
    points = [{"lr": torch.tensor(x, dtype=torch.float64)} for x in (0.1, 1e9)]
    good, bad = metagradients(run, points, (0, 0), compile=False)
    assert good.ok and "at once" in good.note.how
    assert bad.note.outcome is Outcome.DIVERGED and bad.grad == {}
    fine, lost = losses(run, points, (0, 0), compile=False)
    assert fine == pytest.approx(good.loss) and lost == float("inf")


def test_an_adjoint_of_zeros_is_no_missing_graph():
    def flat(output, target):
        return 0 * output.sum()

    of = problem_from_module(
        mlp, F.cross_entropy, examples(40, 5), examples(30, 5), batch_size=10, outer_loss_fn=flat
    )
    run = training(of=of)
    for estimate in metagradients(run, points_of(run, ["lr"]), SEEDS, compile=False):
        assert estimate.ok and float(estimate.grad["lr"]) == 0


@pytest.mark.parametrize("memory", [None, 5000], ids=["graphs", "states"])
@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_compiled_steps_are_used_if_they_are_right(monkeypatch, memory, right):
    """Of traced operations, with one result of the way back changed."""

    def compiled(machine, graph):
        def run(*inputs):
            out = list(graph(*inputs))
            if len(out) == 4 and not right:  # The adjoint of p, m, v, and what numbers get.
                out[-1] = 1.001 * out[-1]
            return out

        return run

    monkeypatch.setattr(Machine, "_compiled", compiled)
    run = training()
    points = points_of(run, ["lr", "beta1"])
    for estimate, point, seed in zip(
        metagradients(run, points, SEEDS, memory=memory), points, SEEDS, strict=True
    ):
        alone, _ = Replay(compile=False)(run, point, seed=seed)
        assert ("at once, compiled" in estimate.note.how) is right
        assert ("after the other: the compiled step" in estimate.note.how) is not right
        for name, value in alone.grad.items():
            torch.testing.assert_close(estimate.grad[name], value, rtol=1e-9, atol=1e-13)


def test_draws_differ_between_trainings():
    def noisy():
        return nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()

    run = training(of=problem(noisy))
    point = run.start(["lr"])
    first, second = metagradients(run, [point] * 2, (0, 0), compile=False)
    assert first.loss != second.loss


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_generated_code():
    """Made once for all points and seeds."""
    run = Training(problem(), find_rule("sgd"), STEPS)
    before = counters["aot_autograd"]["total"]
    for factor in (1.0, 0.8):
        points = [{"lr": factor * point["lr"]} for point in points_of(run, ["lr"])]
        found = metagradients(run, points, SEEDS)
        for estimate, point, seed in zip(found, points, SEEDS, strict=True):
            assert "3 trainings at once, compiled" in estimate.note.how
            alone, _ = Replay(compile=False)(run, point, seed=seed)
            torch.testing.assert_close(estimate.grad["lr"], alone.grad["lr"], rtol=1e-9, atol=0)
    assert counters["aot_autograd"]["total"] == before + 2  # record, rewind


@pytest.mark.parametrize("seeds", [(), (1,)])
def test_counts_that_do_not_match_are_named(seeds):
    run = training()
    with pytest.raises(ValueError, match=f"2 points and {len(seeds)} seeds"):
        metagradients(run, [run.start(["lr"])] * 2, seeds)
    with pytest.raises(ValueError, match="seeds=0 trains nothing"):
        replace(Population(), seeds=0)


def test_vmap_knows_every_operation_of_a_step():
    """One that it does not, it does for each training in turn, and tells of it on stderr."""
    # Its penalty of one tensor leaves a fill in the graph.
    run = Training(load_problem("breast-cancer-logistic"), find_rule("sgd"), 3)
    many = BatchedSteps(run, [run.start(["l2"])] * 2, [0, 1], compile=False)
    operations = {str(n.target) for n in many.machine.graph.joint.graph.nodes}
    assert "aten.full_like.default" in operations
    assert not [name for name in operations if name.startswith("aten.fill")]
