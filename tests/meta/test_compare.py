"""Estimators side by side: what is in the rows is what each estimator says by itself."""

import math

import pytest
import torch.nn.functional as F
from nets import examples
from torch import nn
from toys import Toy, descent, following, vector

import hyperdescent as hd
from hyperdescent.inner.core.hyper import positive
from hyperdescent.meta.compare import compare
from hyperdescent.meta.estimators import METHODS, find_estimator
from hyperdescent.meta.implicit.implicit import Implicit
from hyperdescent.meta.implicit.linear_solvers import conjugate_gradient, dense
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.tracing.machine import Machine
from hyperdescent.meta.training.outcome import Outcome

# Two numbers take two steps.
UNSOLVED = Implicit(conjugate_gradient(steps=1), tolerance=1e-3)
SCALE, X = vector(1.0, 0.5), {"x": vector(1.0, 2.0)}


def quadratic(steps=60):
    aim = vector(3.0, -1.0)
    toy = Toy(following(SCALE), lambda w, h: ((w - aim) ** 2).sum() / 2, vector(0.0, 0.0), x=(2,))
    return descent(toy, steps, 0.1)


def penalised(output, target, *, hypers, params):
    penalty = sum((w * w).sum() for w in params.values())
    return F.cross_entropy(output, target) + hypers["l2"] / 2 * penalty


def classifier():
    return problem_from_module(
        lambda: nn.Linear(5, 3).double(),
        penalised,
        examples(40, 5),
        examples(30, 5, seed=1),
        batch_size=40,
        hypers={"l2": positive(0.1, search=(1e-4, 10.0))},
        outer_loss_fn=F.cross_entropy,
        name="softmax",
    )


class TestRows:
    def test_error_and_cosine_are_those_of_the_estimates(self):
        run = quadratic()
        found = compare(run, X, {"one": Replay(window=1), "all": Replay()})
        one, exact = (Replay(window=w)(run, X, seed=0)[0].grad["x"] for w in (1, None))
        error = float((one - exact).norm() / exact.norm())
        assert found["one"].error == pytest.approx(error, rel=1e-12)
        assert found["one"].cosine == pytest.approx(float(F.cosine_similarity(one, exact, 0)))
        assert found["all"].error == 0 and found["all"].cosine == pytest.approx(1)
        assert found.against.startswith("replay")

    def test_coordinates_are_those_of_tuning(self):
        """On a log scale an error counts times the value, d value / d log value."""
        learn, given = ["l2", "lr"], {"lr": 0.5, "l2": 0.02}
        settings = {"learn": learn, "steps": 20, "values": given}
        found = hd.hypergradient(classifier(), "sgd", method=["truncated"], **settings)
        cut, exact = (
            hd.hypergradient(classifier(), "sgd", method=m, **settings).grad
            for m in ("truncated", "replay")
        )
        cut, exact = (vector(*(float(g[n]) * given[n] for n in learn)) for g in (cut, exact))
        error = float((cut - exact).norm() / exact.norm())
        assert found["truncated"].error == pytest.approx(error, rel=1e-6)

    def test_differences_are_as_exact_as_replay(self):
        run = quadratic()
        methods = {"exact": Replay(), "cut": Replay(window=3)}
        found = compare(run, X, methods, reference="differences")
        assert found["exact"].error < 1e-8 and found["exact"].cosine > 1 - 1e-12
        assert found["cut"].error > 0.1
        assert found.against == "finite differences along 8 directions"

    def test_any_estimator_as_reference(self):
        run = quadratic(steps=400)
        limit = Implicit(solve=dense())
        found = compare(
            run, X, {"replay": Replay(), "neumann": find_estimator("neumann")}, reference=limit
        )
        assert found["replay"].error < 1e-8
        assert "Implicit" in found.against

    def test_what_raises_is_a_row(self):
        found = hd.hypergradient(
            classifier(), "sgd", learn="lr", steps=5, method=["implicit", "replay"]
        )
        row = found["implicit"]
        assert row.estimate is None and math.isnan(row.error)
        assert "lr is a hyperparameter of sgd" in row.said and "lr is a hyper" in str(found)
        assert found["replay"].error == 0

    def test_an_error_of_torch_is_a_row_too(self):
        def broken(training, point, carry=None, *, seed):
            raise NotImplementedError("derivative for x is not implemented")

        found = compare(quadratic(), X, {"broken": broken, "replay": Replay()})
        assert found["broken"].said == "derivative for x is not implemented"
        assert found["replay"].error == 0

    def test_an_outcome_is_a_row(self):
        found = compare(quadratic(), X, {"cg": UNSOLVED})
        assert found["cg"].estimate.note.outcome is Outcome.NOISY
        assert math.isnan(found["cg"].cosine) and "residual" in found["cg"].said

    def test_where_replay_fails_differences_judge(self):
        def errors(output, target):
            return (output.argmax(1) != target).double().mean()

        problem = problem_from_module(
            lambda: nn.Linear(5, 3).double(),
            F.cross_entropy,
            examples(40, 5),
            examples(30, 5, seed=1),
            batch_size=10,
            outer_loss_fn=errors,
        )
        found = hd.hypergradient(problem, "sgd", learn="lr", steps=5, method=["es"])
        assert "as the reference failed: the held-out loss" in found.against

    def test_cost_is_in_gradients_of_the_training_loss(self):
        found = compare(quadratic(), X, {"short": Replay(window=1), "all": Replay(compile=False)})
        for row in found.rows:
            assert found.gradients(row) == row.seconds / found.gradient_seconds
        assert found.gradients(found["all"]) > 60

    def test_rows_are_seen_as_they_come(self):
        seen = []
        compare(
            quadratic(), X, {"a": Replay(), "b": Replay()}, watch=lambda r: seen.append(r.method)
        )
        assert seen == ["a", "b"]


class TestShown:
    def test_table(self):
        text = str(compare(quadratic(), X, {"replay": Replay(), "cut": Replay(window=3)}))
        for word in ("replay", "cut", "cosine", "error", "gradients", "against replay", "x"):
            assert word in text

    def test_plot(self, tmp_path):
        found = compare(quadratic(), X, {"cut": Replay(window=3), "cg": UNSOLVED})
        found.plot(tmp_path / "methods.png")
        assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")

    def test_plot_without_a_gradient(self, tmp_path):
        compare(quadratic(), X, {"cg": UNSOLVED}).plot(tmp_path / "none.svg")
        assert "cg (no gradient)" in (tmp_path / "none.svg").read_text()


class TestRefusals:
    def test_no_method(self):
        with pytest.raises(ValueError, match="no method was given"):
            compare(quadratic(), X, {})

    def test_an_unknown_reference(self):
        with pytest.raises(ValueError, match="there is no reference 'truth'"):
            compare(quadratic(), X, {"a": Replay()}, reference="truth")

    def test_an_unknown_method(self):
        with pytest.raises(ValueError, match="there is no method 'newton'"):
            hd.hypergradient(classifier(), method=["newton"])
        with pytest.raises(KeyError, match="there is no row 'newton'"):
            compare(quadratic(), X, {"a": Replay()})["newton"]


@pytest.mark.filterwarnings("ignore:.*has not converged")
def test_every_method_has_its_row(monkeypatch):
    # Population's generated code has a test of its own.
    monkeypatch.setattr(Machine, "_compiled", lambda self, graph: graph)
    found = hd.hypergradient(
        classifier(), "sgd", learn="l2", steps=30, values={"lr": 0.5}, method=list(METHODS)
    )
    assert [row.method for row in found.rows] == list(METHODS)
    assert all(row.estimate is not None for row in found.rows), [r.refused for r in found.rows]
    exact = ["auto", "replay", "forward"]
    assert max(found[name].error for name in exact) < 1e-9
