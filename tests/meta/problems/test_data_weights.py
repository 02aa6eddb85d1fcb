"""One weight per training example: its derivative, by every route, against finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hyperdescent.inner.registry import find_rule
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.training.loop import run_training
from hyperdescent.meta.training.training import Training

EXAMPLES, BATCH = 12, 4


def losses(output, target):
    return F.cross_entropy(output, target, reduction="none")


def data(count, seed=0):
    x = torch.randn(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :3].argmax(1)


def net():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def training(rule="adam", steps=7, **options):
    options = {"batch_size": BATCH, "data_weights": True} | options
    of = problem_from_module(net, losses, data(EXAMPLES), data(9, seed=1), **options)
    return Training(of, find_rule(rule), steps, values={"lr": 0.05})


@pytest.mark.sampled(3)
@pytest.mark.parametrize("compile", [False, "trace"])
@pytest.mark.parametrize("graphs", ["keep", "recompute"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_weight_against_finite_differences(compile, graphs, accumulate):
    run = training(accumulate=accumulate)
    point = {"data_weights": torch.linspace(0.2, 1.7, EXAMPLES, dtype=torch.float64)}
    found, _ = Replay(compile=compile, graphs=graphs)(run, point, seed=0)
    assert found.note.how.endswith("traced" if compile else "by autograd")

    def loss(weights):
        with torch.no_grad():
            resolved = run.resolve({"data_weights": weights})
            return float(run.outer_loss(run_training(run, resolved, 0).state, resolved.at(0)))

    h = 1e-5
    for k, unit in enumerate(torch.eye(EXAMPLES, dtype=torch.float64)):
        up, down = (loss(point["data_weights"] + s * h * unit) for s in (1, -1))
        assert float(found.grad["data_weights"][k]) == pytest.approx(
            (up - down) / (2 * h), rel=1e-6, abs=1e-9
        )


# How torch's forward mode is written inside.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_step_is_one_jvp_of_the_losses_along_the_adjoint():
    """After one step of SGD, d loss / d weight_j = -lr / B * <gradient of loss j, adjoint>."""
    run = training("sgd", steps=1)
    point = run.start(["data_weights"])
    found, _ = Replay(compile=False)(run, point, seed=0)

    resolved = run.resolve(point)
    state = run.begin(resolved.at(0), 0)
    last = run_training(run, resolved, 0).state
    p = last.p.detach().requires_grad_()
    (adjoint,) = torch.autograd.grad(run.outer_loss(last._replace(p=p), resolved.at(0)), p)
    (inputs, index), target = run.problem.batch(0, 0)
    model = net()

    def each(p):
        return losses(torch.func.functional_call(model, run.layout.unflatten(p), inputs), target)

    _, along = torch.func.jvp(each, (state.p,), (adjoint,))
    expected = torch.zeros(EXAMPLES, dtype=torch.float64)
    expected[index] = -0.05 / BATCH * along
    torch.testing.assert_close(found.grad["data_weights"], expected, rtol=1e-12, atol=1e-15)


def test_all_ones_are_the_plain_mean():
    weighted = training()
    plain = Training(
        problem_from_module(
            net, F.cross_entropy, data(EXAMPLES), data(9, seed=1), batch_size=BATCH
        ),
        find_rule("adam"),
        7,
        values={"lr": 0.05},
    )
    one, other = (Replay(compile=False)(x, x.start(["lr"]), seed=0)[0] for x in (weighted, plain))
    assert one.loss == pytest.approx(other.loss, rel=1e-13)
    assert float(one.grad["lr"]) == pytest.approx(float(other.grad["lr"]), rel=1e-11)


def test_a_scalar_loss_is_refused():
    of = problem_from_module(
        net, F.cross_entropy, data(EXAMPLES), data(9), batch_size=BATCH, data_weights=True
    )
    run = Training(of, find_rule("adam"), 2)
    with pytest.raises(ValueError, match=r"one loss per example, shape \(4,\).*returned \(\)"):
        Replay(compile=False)(run, run.start(["data_weights"]), seed=0)


def test_a_stream_is_refused():
    batches = DataLoader(TensorDataset(*data(EXAMPLES)), BATCH)
    with pytest.raises(TypeError, match="data_weights=True needs examples that can be told apart"):
        problem_from_module(net, losses, batches, data(9), data_weights=True)
