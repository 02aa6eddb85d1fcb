"""Implicit hypergradients against closed forms and dense Hessians, in float64."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import examples, mlp
from torch import nn
from toys import Toy, descent

from hyperdescent.inner.core.flat import BLOCK
from hyperdescent.inner.core.hyper import positive
from hyperdescent.inner.registry import find_rule
from hyperdescent.inner.schedules.schedule import find_schedule
from hyperdescent.meta.bilevel.bamm import BAMM
from hyperdescent.meta.implicit import linear_solvers as linear
from hyperdescent.meta.implicit.fixed_point import FixedPoint, OnePass
from hyperdescent.meta.implicit.implicit import Implicit, Unconverged
from hyperdescent.meta.implicit.linear_solvers import conjugate_gradient, neumann
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.problems.problem import loss_at
from hyperdescent.meta.training.finite_differences import directional_difference
from hyperdescent.meta.training.loop import run_training
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training
from hyperdescent.studies.library.data_cleaning import cleaning_problem

DOUBLE = torch.float64
TIGHT = conjugate_gradient(steps=60, tolerance=1e-14)
L2 = positive(0.1, search=(1e-6, 10.0))


def gaussian(*shape, seed):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


X, X_VALID = gaussian(60, 6, seed=0), gaussian(40, 6, seed=1)
TRUE = gaussian(6, 1, seed=2)
Y, Y_VALID = (x @ TRUE + gaussian(len(x), 1, seed=3 + i) for i, x in enumerate((X, X_VALID)))


def ridge_loss(output, target, *, hypers, params):
    (w,) = params.values()
    return ((output - target) ** 2).mean() / 2 + hypers["l2"] / 2 * (w * w).sum()


def ridge(steps=150, batch_size=60, loss_fn=ridge_loss, outer_loss_fn=F.mse_loss, **options):
    problem = problem_from_module(
        lambda: nn.Linear(6, 1, bias=False).double(),
        loss_fn,
        (X, Y),
        (X_VALID, Y_VALID),
        batch_size=batch_size,
        hypers=options.pop("hypers", {"l2": L2}),
        outer_loss_fn=outer_loss_fn,
        name="ridge",
    )
    return Training(problem, find_rule("sgd"), steps, **{"values": {"lr": 0.6}} | options)


def ridge_closed_form(l2):
    """w* = (X'X/n + l2 I)^-1 X'y/n and dF/dl2 = -w*' (X'X/n + l2 I)^-1 dF/dw."""
    hessian = X.T @ X / len(X) + l2 * torch.eye(6, dtype=DOUBLE)
    w = torch.linalg.solve(hessian, X.T @ Y / len(X))
    outer = 2 * X_VALID.T @ (X_VALID @ w - Y_VALID) / len(X_VALID)
    return w, -float(w.T @ torch.linalg.solve(hessian, outer))


class TestRidge:
    @pytest.mark.parametrize("l2", [1e-3, 0.1, 0.5])
    def test_closed_form(self, l2):
        estimate, carry = Implicit(solve=TIGHT)(
            run := ridge(), {"l2": torch.tensor(l2, dtype=DOUBLE)}, seed=0
        )
        w, slope = ridge_closed_form(l2)
        assert carry is None
        assert estimate.ok and estimate.note.steps == run.steps
        assert estimate.note.inner_gradient < 1e-12
        assert estimate.note.residual < 1e-12
        assert estimate.loss == pytest.approx(float(F.mse_loss(X_VALID @ w, Y_VALID)), rel=1e-10)
        assert float(estimate.grad["l2"]) == pytest.approx(slope, rel=1e-8)
        assert estimate.grad["l2"].dtype == DOUBLE

    def test_conjugate_gradient_is_exact_after_as_many_steps_as_weights(self):
        point = {"l2": torch.tensor(0.1, dtype=DOUBLE)}
        _, slope = ridge_closed_form(0.1)
        errors = []
        for steps in (4, 6):
            solve = conjugate_gradient(steps=steps, tolerance=0.0)
            estimate, _ = Implicit(solve=solve)(ridge(), point, seed=0)
            errors.append(abs(float(estimate.grad["l2"]) / slope - 1))
        assert errors[1] < 1e-9 < errors[0]

    @pytest.mark.parametrize("steps", [0, 5, 20, 40])
    def test_the_error_of_a_series_decays_as_theory_says(self, steps):
        point = {"l2": torch.tensor(0.1, dtype=DOUBLE)}
        solve = neumann(0.6, steps)
        estimate, _ = Implicit(solve=solve, tolerance=1.0)(ridge(), point, seed=0)
        hessian = X.T @ X / len(X) + 0.1 * torch.eye(6, dtype=DOUBLE)
        w, slope = ridge_closed_form(0.1)
        # The error of q against the exact one, in the one direction that l2 looks along.
        powers = torch.linalg.matrix_power(torch.eye(6, dtype=DOUBLE) - 0.6 * hessian, steps + 1)
        outer = 2 * X_VALID.T @ (X_VALID @ w - Y_VALID) / len(X_VALID)
        missing = -float(w.T @ powers @ torch.linalg.solve(hessian, outer))
        assert float(estimate.grad["l2"]) == pytest.approx(slope - missing, rel=1e-9)
        slowest = 1 - 0.6 * float(torch.linalg.eigvalsh(hessian)[0])
        assert estimate.note.residual <= slowest ** (steps + 1)

    def test_a_hyper_that_also_enters_the_held_out_loss_has_its_direct_part(self):
        class Both:
            """The ridge problem whose held-out loss is plus l2 squared."""

            def __init__(self, problem):
                self.problem = problem

            def __getattr__(self, name):
                return getattr(self.problem, name)

            def outer_loss(self, params, buffers, hypers):
                return self.problem.outer_loss(params, buffers, hypers) + hypers["l2"] ** 2

        run = Training(Both(ridge().problem), find_rule("sgd"), 150, values={"lr": 0.6})
        estimate, _ = Implicit(solve=TIGHT)(run, {"l2": torch.tensor(0.1, dtype=DOUBLE)}, seed=0)
        expected = ridge_closed_form(0.1)[1] + 2 * 0.1
        assert float(estimate.grad["l2"]) == pytest.approx(expected, rel=1e-8)

    @pytest.mark.filterwarnings("ignore:.*has not converged")
    def test_far_from_the_optimum_the_inner_gradient_says_so(self):
        point = {"l2": torch.tensor(0.1, dtype=DOUBLE)}
        early, _ = Implicit()(ridge(steps=2), point, seed=0)
        assert early.note.inner_gradient > 0.01


def logistic_loss(output, target, *, hypers, params):
    w = params["weight"].flatten()
    return F.binary_cross_entropy_with_logits(output, target) + (hypers["l2"] * w * w).sum() / 2


def logistic(steps=400, batch_size=80, **options):
    """Per-feature L2 logistic regression (specs 13.1, U13)."""
    x, x_valid = gaussian(80, 10, seed=10), gaussian(60, 10, seed=11)
    w = gaussian(10, 1, seed=12)
    targets = [
        (a @ w + gaussian(len(a), 1, seed=13 + i) > 0).double() for i, a in enumerate((x, x_valid))
    ]
    problem = problem_from_module(
        lambda: nn.Linear(10, 1, bias=False).double(),
        logistic_loss,
        (x, targets[0]),
        (x_valid, targets[1]),
        batch_size=batch_size,
        hypers={"l2": L2},
        outer_loss_fn=F.binary_cross_entropy_with_logits,
    )
    return Training(
        problem,
        find_rule("sgd"),
        steps,
        granularity={"l2": "element"},
        values={"lr": 2.0},
        **options,
    )


def dense(run, point, seed, batches=1):
    """The implicit hypergradient with the whole Hessian, at the weights training ends at."""
    state = run_training(run, run.resolve(point), seed).state
    hypers = run.resolve(point).constant

    def inner(w, l2):
        params = run.layout.unflatten(w)
        steps = range(run.steps, run.steps + batches)
        losses = [
            loss_at(run.problem, params, state.buffers, hypers | {"l2": l2}, i, seed)[0]
            for i in steps
        ]
        return torch.stack(losses).mean()

    (hessian, mixed), _ = torch.autograd.functional.hessian(inner, (state.p, point["l2"]))
    w = state.p.clone().requires_grad_()
    outer = run.problem.outer_loss(run.layout.unflatten(w), state.buffers, hypers)
    (v,) = torch.autograd.grad(outer, w)
    return -torch.linalg.solve(hessian, v) @ mixed


class TestPerFeatureLogistic:
    def test_dense_hessian(self):
        run = logistic()
        point = {"l2": 0.1 + gaussian(10, seed=20).abs() / 10}
        estimate, _ = Implicit(solve=TIGHT)(run, point, seed=0)
        torch.testing.assert_close(estimate.grad["l2"], dense(run, point, 0), rtol=1e-9, atol=1e-12)

    def test_finite_differences_of_converged_training(self):
        run = logistic()
        point = {"l2": 0.1 + gaussian(10, seed=20).abs() / 10}
        direction = {"l2": point["l2"] * gaussian(10, seed=21)}
        estimate, _ = Implicit(solve=TIGHT)(run, point, seed=0)
        expected = directional_difference(run, point, direction, seed=0, h=3e-3)
        exact = float(estimate.grad["l2"] @ direction["l2"])
        assert exact == pytest.approx(expected, rel=1e-7)

    @pytest.mark.parametrize("batches", [1, 3, 5])
    @pytest.mark.filterwarnings("ignore:.*has not converged")
    def test_the_hessian_of_several_batches(self, batches):
        run = logistic(steps=30, batch_size=20)
        point = {"l2": torch.full((10,), 0.1, dtype=DOUBLE)}
        estimate, _ = Implicit(solve=TIGHT, batches=batches)(run, point, seed=0)
        expected = dense(run, point, 0, batches)
        torch.testing.assert_close(estimate.grad["l2"], expected, rtol=1e-9, atol=1e-12)
        w = run_training(run, run.resolve(point), 0).state.p.requires_grad_()
        losses = [
            loss_at(run.problem, run.layout.unflatten(w), {}, point, i, 0)[0]
            for i in range(30, 30 + batches)
        ]
        (mean,) = torch.autograd.grad(sum(losses) / batches, w)
        assert estimate.note.inner_gradient == pytest.approx(float(mean.norm()))

    @pytest.mark.filterwarnings("ignore:.*has not converged")
    def test_a_seed_repeats_bit_for_bit(self):
        run = logistic(steps=30, batch_size=20)
        point = {"l2": torch.full((10,), 0.1, dtype=DOUBLE)}
        once, again, other = (Implicit()(run, point, seed=seed)[0] for seed in (1, 1, 2))
        assert torch.equal(once.grad["l2"], again.grad["l2"])
        assert not torch.equal(once.grad["l2"], other.grad["l2"])


class TestWarmStart:
    @pytest.mark.parametrize("rule", ["adamw", "nadam"])
    def test_two_short_calls_are_one_long_training(self, rule):
        """Slots, step counter and batches go on, so that nothing tells the two apart."""
        short, long = (
            Training(logistic(batch_size=30).problem, find_rule(rule), steps, values={"l2": 0.1})
            for steps in (7, 14)
        )
        point = {"l2": torch.tensor(0.1, dtype=DOUBLE)}
        estimator = Implicit(warm_start=True)
        _, carry = estimator(short, point, seed=0)
        warm, carry = estimator(short, point, carry, seed=0)
        cold, cold_carry = Implicit(warm_start=True)(long, point, seed=0)
        assert carry.steps == cold_carry.steps == 14
        assert torch.equal(carry.state.p, cold_carry.state.p)
        assert warm.loss == cold.loss and torch.equal(warm.grad["l2"], cold.grad["l2"])

    def test_a_carry_serves_one_call(self):
        """A long vector of weights is overwritten by the call that goes on from it."""

        def inner(w, hypers):
            return (w - 1).square().sum() + hypers["l2"] * w.square().sum()

        start = torch.zeros(BLOCK + 1, dtype=DOUBLE)
        run = descent(Toy(inner, lambda w, hypers: w.square().sum(), start, l2=()), 5, 0.1)
        point = {"l2": torch.tensor(0.1, dtype=DOUBLE)}
        estimator = Implicit(warm_start=True)
        _, carry = estimator(run, point, seed=0)
        copied = copy.deepcopy(carry)
        once, _ = estimator(run, point, carry, seed=0)
        with pytest.raises(ValueError, match="a carry serves one call; for several, copy"):
            estimator(run, point, carry, seed=0)
        with pytest.raises(ValueError, match="a carry serves one call"):
            copy.copy(carry)
        again, _ = estimator(run, point, copied, seed=0)
        assert torch.equal(once.grad["l2"], again.grad["l2"])

    def test_it_tracks_a_moving_optimum(self):
        run, carry = ridge(steps=5), None
        for l2 in torch.linspace(0.2, 0.1, 40, dtype=DOUBLE):
            estimate, carry = Implicit(solve=TIGHT, warm_start=True)(run, {"l2": l2}, carry, seed=0)
        cold, _ = Implicit(solve=TIGHT)(run, {"l2": l2}, seed=0)
        _, slope = ridge_closed_form(0.1)
        warm_error, cold_error = (abs(float(e.grad["l2"]) / slope - 1) for e in (estimate, cold))
        assert warm_error < 0.02 and warm_error < cold_error / 3


def double_well(output, target, *, hypers, params):
    (w,) = params.values()
    return ((w * w - hypers["l2"]) ** 2).sum() / 4


class TestOutcomes:
    point = {"l2": torch.tensor(0.1, dtype=DOUBLE)}  # noqa: RUF012  # never changed

    def test_an_unconverged_solve_is_noisy(self):
        estimate, _ = Implicit(solve=conjugate_gradient(steps=1), tolerance=0.05)(
            ridge(), self.point, seed=0
        )
        assert estimate.note.outcome is Outcome.NOISY
        assert estimate.grad == {} and estimate.note.residual > 0.05
        assert f"residual {estimate.note.residual:.3g}, above 0.05" in estimate.note.reason
        assert estimate.note.inner_gradient is not None

    def test_an_indefinite_hessian_is_noisy(self):
        run = ridge(steps=1, loss_fn=double_well, values={"lr": 0.01})
        estimate, _ = Implicit()(run, {"l2": torch.tensor(5.0, dtype=DOUBLE)}, seed=0)
        assert estimate.note.outcome is Outcome.NOISY
        assert estimate.grad == {} and estimate.note.residual == float("inf")
        assert "positive definite" in estimate.note.reason
        assert "inf" in estimate.note.reason

    @pytest.mark.parametrize("solve", [linear.nystrom(rank=6), linear.dense()])
    def test_an_answer_that_means_nothing_is_noisy_whatever_is_tolerated(self, solve):
        run = ridge(steps=1, loss_fn=double_well, values={"lr": 0.01})
        method = Implicit(solve=solve, tolerance=float("inf"))
        estimate, _ = method(run, {"l2": torch.tensor(5.0, dtype=DOUBLE)}, seed=0)
        assert estimate.note.outcome is Outcome.NOISY and estimate.grad == {}

    def test_a_diverging_series_is_noisy(self):
        estimate, _ = Implicit(solve=neumann(5.0))(ridge(), self.point, seed=0)
        assert estimate.note.outcome is Outcome.NOISY
        assert "step size" in estimate.note.reason

    def test_a_linear_loss_has_no_optimum(self):
        def linear(output, target, *, hypers, params):
            return output.mean() + 0 * hypers["l2"]

        estimate, _ = Implicit()(ridge(steps=3, loss_fn=linear), self.point, seed=0)
        assert estimate.note.outcome is Outcome.NOISY

    def test_a_diverging_training_has_diverged(self):
        run = ridge(steps=600, values={"lr": 100.0})
        estimate, carry = Implicit(warm_start=True)(run, self.point, seed=0)
        assert estimate.note.outcome is Outcome.DIVERGED
        assert estimate.grad == {} and carry is None

    def test_a_held_out_loss_without_a_graph_is_not_differentiable(self):
        def errors(output, target):
            return ((output > 0) != (target > 0)).double().mean()

        estimate, _ = Implicit()(ridge(outer_loss_fn=errors), self.point, seed=0)
        assert estimate.note.outcome is Outcome.NOT_DIFFERENTIABLE
        assert "no graph" in estimate.note.reason


@pytest.mark.parametrize("method", [Implicit(), FixedPoint(), OnePass(), BAMM()])
def test_an_operation_without_a_second_derivative_is_named(method):
    def fused(output, target, *, hypers, params):
        x = output.view(1, 1, 10, 3)
        attended = F.scaled_dot_product_attention(x, x, x).view(10, 3)
        penalty = sum(p.square().sum() for p in params.values())
        return F.cross_entropy(attended, target) + hypers["l2"] * penalty

    problem = problem_from_module(
        mlp,
        fused,
        examples(20, 5),
        examples(10, 5, seed=1),
        batch_size=10,
        hypers={"l2": L2},
        outer_loss_fn=F.cross_entropy,
    )
    run = Training(problem, find_rule("sgd"), 5, values={"lr": 0.1})
    estimate, carry = method(run, run.start(["l2"]), seed=0)
    assert estimate.note.outcome is Outcome.NOT_DIFFERENTIABLE and carry is None
    assert "no derivative for aten::_scaled_dot_product_flash" in estimate.note.reason


class TestConvergence:
    point = {"l2": torch.tensor(0.1, dtype=DOUBLE)}  # noqa: RUF012  # never changed

    def test_the_gap_is_what_is_left_of_the_loss(self):
        early, _ = Implicit(solve=TIGHT)(ridge(steps=40), self.point, seed=0)
        far = ridge_closed_form(0.1)[0]
        run = ridge(steps=40)
        state = run_training(run, run.resolve(self.point), 0).state
        outer = 2 * X_VALID.T @ (X_VALID @ state.p[:, None] - Y_VALID) / len(X_VALID)
        expected = float(outer.T @ (far - state.p[:, None]))
        assert early.note.gap == pytest.approx(expected, rel=1e-6)

    def test_a_training_far_from_its_optimum_warns(self):
        with pytest.warns(Unconverged, match=r"sgd on ridge has not converged after 2 steps"):
            Implicit()(ridge(steps=2), self.point, seed=0)

    def test_a_converged_one_does_not(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Implicit()(ridge(), self.point, seed=0)


def small_net(activation=nn.Tanh):
    return nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 2)).double()


class TestGaussNewton:
    def run(self, steps=30, batch_size=20, **options):
        x, y = gaussian(20, 3, seed=30), torch.arange(20) % 2

        def loss(output, target, *, hypers, params):
            penalty = sum((w * w).sum() for w in params.values())
            return F.cross_entropy(output, target) + hypers["l2"] / 2 * penalty

        problem = problem_from_module(
            small_net,
            loss,
            (x, y),
            (gaussian(20, 3, seed=31), y),
            batch_size=batch_size,
            hypers={"l2": L2},
            outer_loss_fn=F.cross_entropy,
            **options,
        )
        return Training(problem, find_rule("sgd"), steps, values={"lr": 0.5})

    @pytest.mark.parametrize("batch_size", [20, 7])
    @pytest.mark.filterwarnings("ignore:.*has not converged")
    def test_is_the_dense_formula(self, batch_size):
        """J' (d2 loss / d output2) J + l2 I, J by torch.func, over one batch."""
        run, point = self.run(batch_size=batch_size), {"l2": torch.tensor(0.05, dtype=DOUBLE)}
        solver = linear.dense()
        found = Implicit(solve=solver, curvature="gauss-newton")(run, point, seed=0)[0]

        state = run_training(run, run.resolve(point), 0).state
        inputs, target = run.problem.batch(run.steps, 0)
        net = small_net()

        def outputs(p):
            return torch.func.functional_call(net, run.layout.unflatten(p), (inputs,))

        z, jac = (
            outputs(state.p),
            torch.autograd.functional.jacobian(outputs, state.p).flatten(0, 1),
        )
        curved = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, target), z)
        curved = curved.reshape(z.numel(), z.numel())
        matrix = jac.T @ curved @ jac + 0.05 * torch.eye(len(state.p), dtype=DOUBLE)

        w = state.p.clone().requires_grad_()
        outer = run.problem.outer_loss(run.layout.unflatten(w), {}, {})
        (v,) = torch.autograd.grad(outer, w)
        expected = -torch.linalg.solve(matrix, v) @ state.p
        assert float(found.grad["l2"]) == pytest.approx(float(expected), rel=1e-9)

    def test_is_positive_where_the_hessian_is_not(self):
        run, point = self.run(steps=3), {"l2": torch.tensor(1e-3, dtype=DOUBLE)}
        solver = linear.dense()
        assert Implicit(solve=solver)(run, point, seed=0)[0].note.residual == float("inf")
        with pytest.warns(Unconverged):
            curved, _ = Implicit(solve=solver, curvature="gauss-newton")(run, point, seed=0)
        assert curved.ok and curved.note.residual < 1e-9

    def test_is_the_hessian_of_a_linear_model(self):
        point = {"l2": torch.tensor(0.1, dtype=DOUBLE)}
        one, other = (
            Implicit(solve=TIGHT, curvature=c)(ridge(), point, seed=0)[0]
            for c in ("hessian", "gauss-newton")
        )
        torch.testing.assert_close(one.grad["l2"], other.grad["l2"], rtol=1e-12, atol=0)

    def test_of_several_batches_it_is_that_of_their_mean(self):
        """Of a linear model it is the Hessian."""
        run = logistic(batch_size=20)
        point = run.start(["l2"])
        found, expected = (
            Implicit(TIGHT, batches=3, curvature=curvature)(run, point, seed=0)[0].grad["l2"]
            for curvature in ("gauss-newton", "hessian")
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)

    def test_of_accumulated_parts_is_refused(self):
        with pytest.raises(ValueError, match="accumulate=4; give curvature='hessian'"):
            Implicit(curvature="gauss-newton")(
                self.run(accumulate=4), {"l2": torch.tensor(0.1)}, seed=0
            )

    def test_an_output_of_several_tensors_is_refused(self):
        parts = [(x.float(), torch.arange(len(x)) % 10) for x in (X, X_VALID)]
        problem = cleaning_problem(*parts)
        run = Training(problem, find_rule("sgd"), 3)
        with pytest.raises(TypeError, match="needs one tensor as the model's output"):
            Implicit(curvature="gauss-newton")(run, run.start(["weight"]), seed=0)

    def test_needs_the_output_of_the_model(self):
        class Closed:
            def __init__(self, problem):
                for name in ("name", "hypers", "choices", "chosen", "start", "batch"):
                    setattr(self, name, getattr(problem, name))

        run = Training(Closed(ridge().problem), find_rule("sgd"), 3)
        with pytest.raises(TypeError, match=r"has no output\(\) and loss_of\(\)"):
            Implicit(curvature="gauss-newton")(
                run, {"l2": L2.starting_value(torch.ones(()))}, seed=0
            )

    def test_an_unknown_curvature(self):
        with pytest.raises(ValueError, match="there is no curvature 'fisher'"):
            Implicit(curvature="fisher")


class TestRefusals:
    @pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
    def test_a_hyper_of_the_rule(self, name):
        point = {"l2": L2.starting_value(torch.tensor(1.0)), name: torch.tensor(0.1)}
        with pytest.raises(ValueError, match=rf"{name} is a hyperparameter of sgd.*optimum") as e:
            Implicit()(ridge(), point, seed=0)
        assert "Replay" in str(e.value) and "method='replay'" in str(e.value)
        assert "learn only l2" in str(e.value)

    def test_a_knob_of_a_schedule_of_the_rule(self):
        run = ridge(schedules={"lr": find_schedule("cosine")})
        with pytest.raises(ValueError, match=r"lr\.peak is a knob of the schedule of lr"):
            Implicit()(run, run.start(["lr.peak"]), seed=0)

    def test_a_knob_of_a_schedule_of_the_loss(self):
        for schedule in ("cosine", "constant"):
            run = ridge(schedules={"l2": find_schedule(schedule)})
            with pytest.raises(ValueError, match=r"is a knob of the schedule of l2"):
                Implicit()(run, run.start(["l2"]), seed=0)

    def test_no_batches(self):
        with pytest.raises(ValueError, match="batches=0 leaves no loss"):
            Implicit(batches=0)


def test_a_scheduled_hyper_of_the_loss_counts_at_its_last_value():
    """l2 is learned; the other penalty ends at a tenth of its peak, and only that end counts."""

    def both(output, target, *, hypers, params):
        (w,) = params.values()
        return ridge_loss(output, target, hypers=hypers, params=params) + hypers["extra"] * (
            (w * w).sum() / 2
        )

    schedule = find_schedule("piecewise:2")
    knots = torch.tensor([1.0, 0.1], dtype=DOUBLE)
    run = ridge(
        loss_fn=both,
        hypers={"l2": L2, "extra": L2},
        schedules={"extra": schedule},
        values={"lr": 0.6, "extra.knots": knots},
    )
    state = run_training(run, run.resolve({}), 0).state
    estimate, _ = Implicit(solve=TIGHT)(run, {"l2": torch.tensor(0.1, dtype=DOUBLE)}, seed=0)
    hessian = X.T @ X / len(X) + (0.1 + 0.1) * torch.eye(6, dtype=DOUBLE)
    w = state.p[:, None]
    outer = 2 * X_VALID.T @ (X_VALID @ w - Y_VALID) / len(X_VALID)
    expected = -float(w.T @ torch.linalg.solve(hessian, outer))
    assert float(estimate.grad["l2"]) == pytest.approx(expected, rel=1e-8)
