"""Traced second derivatives against autograd's, through implicit hypergradients."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hyperdescent.inner.core.hyper import positive
from hyperdescent.inner.registry import find_rule
from hyperdescent.meta.implicit import hessian_products as second
from hyperdescent.meta.implicit import implicit as module
from hyperdescent.meta.implicit.implicit import Implicit
from hyperdescent.meta.implicit.inner_solution import InnerSolution
from hyperdescent.meta.implicit.linear_solvers import conjugate_gradient
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.tracing import cost_model as price
from hyperdescent.meta.training.loop import run_training
from hyperdescent.meta.training.training import Training

DOUBLE = torch.float64
SOLVE = conjugate_gradient(steps=6, tolerance=0.0, damping=3.0)
L2 = positive(0.5, search=(1e-3, 10.0))


def penalized(output, target, *, hypers, params):
    penalty = sum((p * p).sum() for p in params.values())
    return F.cross_entropy(output, target) + hypers["l2"] / 2 * penalty


def convolutions():
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.SiLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(12, 3),
    ).double()


def net():
    return nn.Sequential(nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def training(model=net, loss_fn=penalized, steps=5, **options):
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(24, 16, dtype=DOUBLE, generator=draw) for _ in range(2))
    own = {"hypers": {"l2": L2}, "outer_loss_fn": F.cross_entropy} | options
    problem = problem_from_module(
        model,
        loss_fn,
        (x, x[:, :3].argmax(1)),
        (y, y[:, :3].argmax(1)),
        batch_size=8,
        name="small",
        **own,
    )
    return Training(problem, find_rule("sgd"), steps, values={"lr": 0.1})


def estimate(run, compile, learn="l2", batches=1, **options):
    implicit = Implicit(solve=SOLVE, tolerance=10.0, compile=compile, batches=batches, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*has not converged")
        found, _ = implicit(run, run.start([learn]), seed=3)
    assert found.ok, found.note
    return found


def assert_same(one, other, name="l2"):
    assert one.loss == other.loss
    torch.testing.assert_close(one.grad[name], other.grad[name], rtol=1e-9, atol=1e-12)
    assert one.note.residual == pytest.approx(other.note.residual, rel=1e-8)
    assert one.note.inner_gradient == pytest.approx(other.note.inner_gradient, rel=1e-10)
    assert one.note.gap == pytest.approx(other.note.gap, rel=1e-8)


class TestTraced:
    @pytest.mark.parametrize("model", [net, convolutions])
    @pytest.mark.parametrize("batches", [1, 3])
    def test_is_what_autograd_does(self, model, batches):
        run = training(model)
        traced = estimate(run, "trace", batches=batches)
        assert_same(traced, estimate(run, False, batches=batches))
        assert "6 products traced" in traced.note.how

    def test_a_weight_per_example_and_its_batch(self):
        def losses(output, target):
            return F.cross_entropy(output, target, reduction="none") + 0.1 * output.square().sum(1)

        run = training(loss_fn=losses, data_weights=True, hypers={}, outer_loss_fn=F.cross_entropy)
        found = [estimate(run, how, "data_weights") for how in ("trace", False)]
        assert_same(*found, "data_weights")
        assert 0 < int((found[0].grad["data_weights"] != 0).sum()) <= 8

    def test_generated_code(self):
        run = training()
        compiled = estimate(run, True)
        assert_same(compiled, estimate(run, False))
        assert "6 products compiled" in compiled.note.how

    def test_is_made_once_for_all_seeds_and_values(self, monkeypatch):
        made = []
        trace = second.trace_products

        def counted(*inputs):
            made.append(0)
            return trace(*inputs)

        monkeypatch.setattr(second, "trace_products", counted)
        run = training()
        for l2 in (0.5, 1.0):
            point = {"l2": torch.tensor(l2, dtype=DOUBLE)}
            found = [
                Implicit(SOLVE, tolerance=10.0, warm_start=True, compile=how)(run, point, seed=1)[0]
                for how in ("trace", False)
            ]
            assert_same(*found)
        assert len(made) == 1


class TestConstants:
    def test_a_hyper_that_the_gradient_is_no_function_of(self):
        """Its derivative is zeros, which no vector reaches."""

        def loss(output, target, *, hypers, params):
            return penalized(output, target, hypers=hypers, params=params) + 0 * hypers["l1"]

        run = training(loss_fn=loss, hypers={"l2": L2, "l1": L2})
        one, other = (
            Implicit(solve=SOLVE, tolerance=10.0, compile=compile).at(
                run,
                run.start(["l2", "l1"]),
                InnerSolution(run_training(run, run.resolve({}), 3).state, run.steps),
                seed=3,
            )
            for compile in ("trace", False)
        )
        assert "traced" in one.note.how and float(one.grad["l1"]) == 0
        assert_same(one, other)


class TestRefused:
    def test_a_loss_that_is_more_than_tensors_is_done_by_autograd(self):
        def branching(output, target, **own):
            sign = 1.0 if float(output.detach().sum()) > -1e9 else -1.0
            return sign * penalized(output, target, **own)

        run = training(loss_fn=branching)
        found = estimate(run, "trace")
        assert "by autograd: sgd on small cannot be compiled" in found.note.how
        assert_same(found, estimate(run, False))
        with pytest.warns(UserWarning, match="its steps are done by autograd"):
            estimate(run, True)

    def test_one_that_is_wrong_is_not_used(self, monkeypatch):
        def wrong(self, graph):
            run = right(self, graph)
            return lambda *inputs: [1.001 * x for x in run(*inputs)]

        right = second.ProductMachine._compiled
        monkeypatch.setattr(second.ProductMachine, "_compiled", wrong)
        run = training()
        found = estimate(run, "trace")
        assert "differs from autograd's" in found.note.how
        assert_same(found, estimate(run, False))

    def test_batches_of_other_shapes(self, monkeypatch):
        monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)  # Or nothing asks the clock.
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(20, 16, dtype=DOUBLE, generator=draw)
        y = x[:, :3].argmax(1)
        problem = problem_from_module(
            net,
            penalized,
            DataLoader(TensorDataset(x, y), batch_size=8),
            (x, y),
            hypers={"l2": L2},
            outer_loss_fn=F.cross_entropy,
        )
        run = Training(problem, find_rule("sgd"), 5, values={"lr": 0.1})
        with pytest.raises(ValueError, match=r"has shapes \[.*\(4, 16\).*give compile=False"):
            estimate(run, "trace")
        price.spend_on_products(problem, 1e3)
        found = estimate(run, "auto")
        assert "by autograd: a batch has shapes" in found.note.how
        assert_same(found, estimate(run, False))

    def test_gauss_newton_is_done_by_autograd(self):
        assert "by autograd" in estimate(training(), "auto", curvature="gauss-newton").note.how
        with pytest.raises(ValueError, match="compile='trace' is of products with the Hessian"):
            Implicit(compile="trace", curvature="gauss-newton")

    def test_other_words_are_refused(self):
        with pytest.raises(ValueError, match="compile='fast' is none of True, False"):
            Implicit(compile="fast")


class TestAuto:
    def test_traces_once_autograd_has_taken_as_long_as_that_takes_to_pay(self, monkeypatch):
        monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)  # Or nothing asks the clock.
        run = training()
        assert "by autograd" in estimate(run, "auto").note.how
        price.spend_on_products(run.problem, price._TRACE_PRODUCT / price._OF_PRODUCT)
        assert "traced" in estimate(run, "auto").note.how

    def test_parts_of_a_batch_are_kept_to(self, monkeypatch):
        monkeypatch.setattr(module, "worth_tracing_products", lambda problem: True)
        assert "by autograd" in estimate(training(accumulate=2), "auto").note.how


class TestAt:
    def test_is_the_hypergradient_where_a_training_has_ended(self):
        run = training()
        implicit = Implicit(SOLVE, tolerance=10.0, warm_start=True)
        point = run.start(["l2"])
        there, carry = implicit(run, point, seed=3)
        again = implicit.at(run, point, carry, seed=3)
        assert_same(again, there)
        assert torch.equal(again.grad["l2"], there.grad["l2"])

    def test_refuses_what_moves_no_optimum(self):
        run = training()
        _, carry = Implicit(SOLVE, tolerance=10.0, warm_start=True)(run, run.start(["l2"]), seed=3)
        with pytest.raises(ValueError, match="lr is a hyperparameter of sgd"):
            Implicit().at(run, run.start(["lr"]), carry, seed=3)
