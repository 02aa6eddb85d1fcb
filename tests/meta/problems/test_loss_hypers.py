"""Hypers that enter the training loss: smoothing, a penalty per weight, augmentation, a network."""

import pytest
import torch
import torch.nn.functional as F
from nets import examples, mlp

from hyperdescent.inner.core.hyper import Hyper, fraction, positive
from hyperdescent.inner.registry import find_rule
from hyperdescent.meta.forward.forward import Forward
from hyperdescent.meta.implicit.implicit import Implicit
from hyperdescent.meta.implicit.linear_solvers import conjugate_gradient
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.training.finite_differences import directional_difference
from hyperdescent.meta.training.loop import run_training
from hyperdescent.meta.training.training import Training

SIZE = sum(p.numel() for p in mlp().parameters())
NET = 5 * 4 + 4 * 5  # Of the network that changes inputs.


def smoothed(output, target, *, hypers, params):
    share = hypers["smoothing"]
    hard, uniform = F.cross_entropy(output, target), -output.log_softmax(1).mean()
    return (1 - share) * hard + share * uniform


def penalised(output, target, *, hypers, params):
    flat = torch.cat([p.reshape(-1) for p in params.values()])
    return F.cross_entropy(output, target) + (hypers["l2"] * flat * flat).sum() / 2


def noised(inputs, hypers):
    return inputs + hypers["noise"] * torch.randn_like(inputs)


def through_a_net(inputs, hypers):
    first, second = hypers["net"].split([20, 20])
    hidden = torch.tanh(torch.cat([inputs]) @ first.view(5, 4))
    return inputs + hidden @ second.view(4, 5) * torch.rand_like(inputs[:, :1])


CASES = {
    "smoothing": ({"smoothing": fraction(0.1)}, {"loss_fn": smoothed}, {}, 0.1),
    "l2 per weight": ({"l2": positive(0.01, (1e-6, 1.0))}, {"loss_fn": penalised}, "element", 0.01),
    "noise": ({"noise": positive(0.3, (1e-3, 3.0))}, {"augment": noised}, {}, 0.3),
    "network": (
        {"net": Hyper(0.0, -9.0, 9.0, "linear", (-3.0, 3.0), shape=(NET,))},
        {"augment": through_a_net},
        {},
        None,
    ),
}


def run_of(case, steps=12, **options):
    hypers, given, granularity, _ = CASES[case]
    (name,) = hypers
    problem = problem_from_module(
        mlp,
        given.get("loss_fn", F.cross_entropy),
        examples(40, 5),
        examples(30, 5, seed=1),
        batch_size=options.pop("batch_size", 10),
        hypers=hypers,
        outer_loss_fn=F.cross_entropy,
        augment=given.get("augment"),
        name=case,
    )
    granularity = {name: granularity} if granularity else {}
    return Training(
        problem, find_rule("adam"), steps, granularity=granularity, values={"lr": 0.03}
    ), name


def point_of(run, name):
    generator = torch.Generator().manual_seed(5)
    value = run.start([name])[name]
    if name == "net":
        value = torch.randn(NET, dtype=torch.float64, generator=generator) / 2
    direction = torch.randn(value.shape, dtype=torch.float64, generator=generator)
    scale = value.abs() if name == "l2" else value.abs().clamp(min=0.1)
    return {name: value}, {name: direction * scale}


@pytest.mark.parametrize("case", CASES)
def test_replay_is_what_differences_are(case):
    run, name = run_of(case)
    point, direction = point_of(run, name)
    estimate, _ = Replay()(run, point, seed=0)
    assert estimate.grad[name].shape == point[name].shape
    found = float((estimate.grad[name] * direction[name]).sum())
    expected = directional_difference(run, point, direction, seed=0, h=1e-2)
    assert abs(found) > 1e-6
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_traced_steps_are_autograds(case):
    run, name = run_of(case)
    point, _ = point_of(run, name)
    one, two = (Replay(compile=c)(run, point, seed=0)[0] for c in (False, "trace"))
    assert "traced" in two.note.how
    torch.testing.assert_close(one.grad[name], two.grad[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("case", ["smoothing", "noise"])
def test_forward_mode(case):
    run, name = run_of(case)
    point, _ = point_of(run, name)
    one, two = Replay()(run, point, seed=0)[0], Forward(compile=False)(run, point, seed=0)[0]
    torch.testing.assert_close(one.grad[name], two.grad[name], rtol=1e-10, atol=1e-14)


def test_a_module_as_loss_is_not_asked_to_take_hypers():
    hypers = {"noise": positive(0.3, (1e-3, 3.0))}
    problem = problem_from_module(
        mlp,
        torch.nn.CrossEntropyLoss(),
        examples(40, 5),
        examples(30, 5, seed=1),
        batch_size=10,
        hypers=hypers,
        outer_loss_fn=F.cross_entropy,
        augment=noised,
    )
    run, (expected, _) = (
        Training(problem, find_rule("adam"), 12, values={"lr": 0.03}),
        run_of("noise"),
    )
    one, two = (Replay()(r, r.start(["noise"]), seed=0)[0].grad["noise"] for r in (run, expected))
    assert torch.equal(one, two)


def test_the_held_out_loss_sees_no_augmentation():
    run, name = run_of("noise")
    state = run_training(run, run.resolve({}), 0).state
    params = run.layout.unflatten(state.p)
    plain, strong = (
        run.problem.outer_loss(params, {}, {name: torch.tensor(v).double()}) for v in (0.0, 5.0)
    )
    assert float(plain) == float(strong)
    inner = [
        run.inner_loss(state, run.resolve({name: torch.tensor(v).double()}).at(0), 0, 0)[0]
        for v in (0.0, 5.0)
    ]
    assert float(inner[0]) != float(inner[1])


def test_a_penalty_per_weight_by_implicit_differentiation():
    """At the optimum d F / d l2_i = -w_i q_i, with q from a dense Hessian."""
    hypers = {"l2": positive(0.3, (1e-6, 10.0))}
    problem = problem_from_module(
        lambda: torch.nn.Linear(5, 3).double(),
        penalised,
        examples(40, 5),
        examples(30, 5, seed=1),
        batch_size=40,
        hypers=hypers,
        outer_loss_fn=F.cross_entropy,
    )
    run = Training(
        problem, find_rule("sgd"), 400, granularity={"l2": "element"}, values={"lr": 0.5}
    )
    point = run.start(["l2"])
    solve = conjugate_gradient(steps=60, tolerance=1e-14)
    estimate, _ = Implicit(solve=solve)(run, point, seed=0)

    state, values = run_training(run, run.resolve(point), 0).state, run.resolve(point).at(0)
    hessian = torch.autograd.functional.hessian(
        lambda p: run.inner_loss(state._replace(p=p), values, 400, 0)[0], state.p
    )
    slope = torch.autograd.functional.jacobian(
        lambda p: run.outer_loss(state._replace(p=p), values), state.p
    )
    expected = -state.p * torch.linalg.solve(hessian, slope)
    torch.testing.assert_close(estimate.grad["l2"], expected, rtol=1e-8, atol=1e-12)


def test_curvature_sees_the_augmented_inputs():
    """Of a linear model Gauss-Newton is the Hessian, if it is at the same inputs."""
    problem = problem_from_module(
        lambda: torch.nn.Linear(5, 3).double(),
        F.cross_entropy,
        examples(40, 5),
        examples(30, 5, seed=1),
        batch_size=40,
        hypers={"noise": positive(0.5, (1e-3, 3.0))},
        outer_loss_fn=F.cross_entropy,
        augment=noised,
    )
    run = Training(problem, find_rule("sgd"), 30, values={"lr": 0.5})
    solve = conjugate_gradient(steps=60, tolerance=1e-14)
    found = [
        Implicit(solve=solve, curvature=c, tolerance=9.0, warm_start=True)(
            run, run.start(["noise"]), seed=0
        )[0].grad["noise"]
        for c in ("hessian", "gauss-newton")
    ]
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)
    assert float(found[0]) != 0
