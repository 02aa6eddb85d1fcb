"""Evolution strategies against exact gradients of smoothed losses, within their own error."""

import math

import pytest
import torch
import torch.nn.functional as F
from nets import examples, mlp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import DOUBLE, Toy, descent, following, vector

from hyperdescent.inner.core.hyper import Hyper
from hyperdescent.inner.registry import find_rule
from hyperdescent.meta.hypergradient import hypergradient
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.sampling.evolution_strategies import ES, PES
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training

SIZE, PUSHED, STEPS = 23, 10, 100
CHAIN = torch.eye(SIZE, dtype=DOUBLE) / 2 + torch.diag(torch.full((SIZE - 1,), 0.5).double(), 1)
PUSH = torch.cat([torch.ones(PUSHED), -torch.ones(SIZE - PUSHED)]).double()
X = torch.tensor(0.5, dtype=DOUBLE)


def balance():
    """Influence balancing (Tallec & Ollivier 2017): s' = CHAIN s + x PUSH, by steps of length 1
    on a loss with that slope; few steps see the influences of one sign only."""

    def inner(w, h):
        s = w.detach()
        return (w * (s - CHAIN @ s - h["x"] * PUSH)).sum()

    toy = Toy(inner, lambda w, h: (w[0] - 1) ** 2 / 2, torch.ones(SIZE, dtype=DOUBLE), x=())
    return descent(toy, STEPS, 1.0)


def exact(window, objective="mean"):
    """By autograd, of the mean of the losses at the windows' ends, or of the last."""
    x, s, losses = X.clone().requires_grad_(), torch.ones(SIZE, dtype=DOUBLE), []
    for _ in range(STEPS):
        s = CHAIN @ s + x * PUSH
        losses.append((s[0] - 1) ** 2 / 2)
    ends = losses[window - 1 :: window] if objective == "mean" else losses[-1:]
    return float(torch.autograd.grad(torch.stack(ends).mean(), x)[0])


def over_one_training(method, run):
    """(the mean over its windows, the standard error of that taken for independent)."""
    carry, found, errors = None, [], []
    for _ in range(STEPS // method.every):
        estimate, carry = method(run, {"x": X}, carry, seed=3)
        found.append(float(estimate.grad["x"]))
        errors.append(float(estimate.note.stderr["x"]))
    assert carry.step == STEPS
    return sum(found) / len(found), max(errors)


def test_the_reference_is_that_of_the_specification():
    assert exact(1) == pytest.approx(35.716, abs=1e-3)


class TestInfluenceBalancing:
    # "max" of the windows' errors: those of one kind lean on the same noise.
    @pytest.mark.parametrize("kind", ["pes", "single"])
    @pytest.mark.parametrize(("window", "objective"), [(10, "mean"), (20, "mean"), (20, "final")])
    def test_persistent_ones_see_what_came_before(self, kind, window, objective):
        method = PES(every=window, pairs=100, kind=kind, objective=objective)
        mean, error = over_one_training(method, balance())
        assert mean == pytest.approx(exact(window, objective), abs=3 * error)
        assert mean > 3

    @pytest.mark.parametrize("window", [10])
    def test_truncated_ones_have_the_wrong_sign(self, window):
        mean, _ = over_one_training(PES(window, 100, kind="truncated", objective="mean"), balance())
        assert mean < 0 < exact(window)

    def test_full(self):
        estimate, _ = ES(pairs=300)(balance(), {"x": X}, seed=0)
        error = float(estimate.note.stderr["x"])
        assert float(estimate.grad["x"]) == pytest.approx(exact(1, "final"), abs=3 * error)
        assert error < 3

    def test_a_new_training_begins_where_the_last_ended(self):
        method = PES(every=60, pairs=2)
        _, carry = method(balance(), {"x": X}, None, seed=3)
        assert (carry.step, carry.seed) == (60, 3)
        _, carry = method(balance(), {"x": X}, carry, seed=4)
        assert (carry.step, carry.seed) == (100, 3)
        _, carry = method(balance(), {"x": X}, carry, seed=5)
        assert (carry.step, carry.seed, carry.calls) == (60, 5, 3)

    def test_losses_are_of_whole_trainings_once_there_is_one(self):
        """Of windows they would go up and down: to a tuner a new training would look like chaos."""
        method, run, carry, losses = PES(every=40, pairs=2), balance(), None, []
        for _ in range(5):
            estimate, carry = method(run, {"x": X}, carry, seed=3)
            losses.append(estimate.loss)
        whole, _ = ES(pairs=1)(run, {"x": X}, seed=3)
        assert losses[2] == losses[3] == losses[4] == pytest.approx(whole.loss, rel=1e-12)
        assert len(set(losses[:3])) == 3


def classifier(loss_fn=F.cross_entropy, outer_loss_fn=None, make=mlp):
    return problem_from_module(
        make,
        loss_fn,
        examples(40, 5),
        examples(30, 5, seed=1),
        batch_size=10,
        outer_loss_fn=outer_loss_fn,
    )


def errors(output, target):
    return (output.argmax(1) != target).double().mean()


def net_run(**options):
    return Training(classifier(**options), find_rule("adam"), 12, values={"lr": 0.05})


class TestDirectDependence:
    """F = w^2 / 2 + 5 (x - 3)^2: most of its slope in x is not by way of the weights."""

    @pytest.mark.parametrize(("kind", "objective"), [("single", "final"), ("pes", "mean")])
    def test_is_there_from_the_first_window_on(self, kind, objective):
        toy = Toy(
            following(vector(1.0)),
            lambda w, h: w[0] ** 2 / 2 + 5 * (h["x"] - 3) ** 2,
            vector(0.0),
            x=(),
        )
        run, point = descent(toy, 20, 0.3), {"x": torch.tensor(1.0, dtype=DOUBLE)}
        method = PES(every=5, pairs=150, kind=kind, objective=objective)
        carry, found, errors = None, [], []
        for _ in range(4):
            estimate, carry = method(run, point, carry, seed=0)
            found.append(float(estimate.grad["x"]))
            errors.append(float(estimate.note.stderr["x"]))
        # By replay -19.02; without the direct part it would be +1.
        error = sum(errors) / 4
        assert sum(found) / 4 == pytest.approx(-19, abs=3 * error + 0.5)
        assert error < 4


class TestLegality:
    def test_noise_on_a_linear_scale_stays_inside(self, monkeypatch):
        """A warm-up of less than no steps is none, and weights of examples are not negative."""
        seen = []
        resolve = Training.resolve

        def watched(self, point):
            seen.extend(float(v.detach().min()) for n, v in point.items() if n == "x")
            return resolve(self, point)

        monkeypatch.setattr(Training, "resolve", watched)
        toy = Toy(following(vector(1.0)), lambda w, h: w[0] ** 2 / 2, vector(0.0), x=())
        toy.hypers["x"] = Hyper(0.05, 0.0, math.inf, "linear", (0.0, 2.0))
        estimate, _ = ES(pairs=200)(descent(toy, 5, 0.3), {"x": vector(0.05).squeeze()}, seed=0)
        assert estimate.ok and min(seen) == 0 and max(seen) == pytest.approx(0.1)

    def test_the_noise_of_one_training_is_not_that_of_the_next(self):
        method, run = PES(every=60, pairs=3), descent(balance().problem, 60, 1.0)
        one, carry = method(run, {"x": X}, None, seed=3)
        two, _ = method(run, {"x": X}, carry, seed=3)
        assert float(one.grad["x"]) != float(two.grad["x"])


class TestTraining:
    def test_agrees_with_the_metagradient_where_the_loss_is_smooth(self):
        run = net_run()
        point = run.start(["lr", "beta1"])
        near, _ = ES(pairs=64, sigma=1e-3)(run, point, seed=2)
        true, _ = Replay()(run, point, seed=2)
        assert near.loss == pytest.approx(true.loss, rel=1e-12)
        for name in point:
            error = float(near.note.stderr[name])
            assert float(near.grad[name]) == pytest.approx(float(true.grad[name]), abs=3 * error)
        assert float(near.note.stderr["lr"]) < abs(float(true.grad["lr"])) / 3

    def test_a_loss_without_a_derivative(self):
        run = net_run(outer_loss_fn=errors)
        point = run.start(["lr"])
        refused, _ = Replay()(run, point, seed=0)
        assert refused.note.outcome is Outcome.NOT_DIFFERENTIABLE
        estimate, _ = ES(pairs=8, sigma=0.5)(run, point, seed=0)
        assert estimate.ok and float(estimate.grad["lr"]) != 0

    def test_dropout_is_the_same_on_both_sides(self):
        def dropping():
            return nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()

        run = net_run(make=dropping)
        point = run.start(["lr"])
        estimate, _ = ES(pairs=16, sigma=1e-3)(run, point, seed=2)
        true, _ = Replay(compile=False)(run, point, seed=2)
        assert "draws at random" in estimate.note.how
        error = float(estimate.note.stderr["lr"])
        assert float(estimate.grad["lr"]) == pytest.approx(float(true.grad["lr"]), abs=3 * error)

    @pytest.mark.parametrize("kind", ["pes", "single", "truncated"])
    def test_one_after_the_other_is_the_same(self, kind):
        """A loss with a Python branch cannot be traced; the numbers are those of one that can."""

        def branching(output, target):
            loss = F.cross_entropy(output, target)
            return loss if float(loss.detach()) > -1 else -loss

        found = []
        for loss_fn in (F.cross_entropy, branching):
            run = net_run(loss_fn=loss_fn, outer_loss_fn=F.cross_entropy)
            method, carry, grads = PES(every=5, pairs=2, kind=kind), None, []
            for _ in range(4):
                estimate, carry = method(run, run.start(["lr"]), carry, seed=1)
                grads.append(estimate.grad["lr"])
            found.append(torch.stack(grads))
            hows = estimate.note.how
        assert "one training after the other" in hows
        torch.testing.assert_close(*found, rtol=1e-8, atol=1e-12)

    @pytest.mark.parametrize("method", [ES(pairs=2), PES(every=4, pairs=2)])
    def test_batches_of_several_shapes_are_done_one_after_the_other(self, method):
        x, y = examples(40, 5)
        loader = DataLoader(TensorDataset(x, y), batch_size=16)
        held_out = examples(30, 5, seed=1)
        problem = problem_from_module(mlp, F.cross_entropy, loader, held_out)
        run, carry = Training(problem, find_rule("adam"), 6), None
        for _ in range(2):
            estimate, carry = method(run, run.start(["lr"]), carry, seed=0)
            assert estimate.ok
        assert "one training after the other" in estimate.note.how

    def test_a_seed_repeats(self):
        run = net_run()
        one, other = (ES(pairs=3)(run, run.start(["lr"]), seed=5)[0] for _ in range(2))
        assert torch.equal(one.grad["lr"], other.grad["lr"])


class TestGuided:
    def many(self):
        """Sixty hypers, of which the loss knows one direction."""
        aim = torch.linspace(-1, 1, 60, dtype=DOUBLE)
        toy = Toy(
            lambda w, h: ((w - h["x"]) ** 2).sum() / 2,
            lambda w, h: ((w - aim) @ aim) ** 2 / 2,
            torch.zeros(60, dtype=DOUBLE),
            x=(60,),
        )
        return descent(toy, 60, 0.3), {"x": torch.full((60,), 0.3, dtype=DOUBLE)}

    def test_an_exact_guide_leaves_less_noise(self):
        run, point = self.many()
        true, _ = Replay()(run, point, seed=0)

        def cosine(method):
            estimate, _ = method(run, point, seed=1)
            return float(F.cosine_similarity(estimate.grad["x"], true.grad["x"], 0))

        assert cosine(ES(pairs=4)) < 0.4 < 0.6 < cosine(ES(pairs=4, guide=Replay()))

    def test_its_size_is_right_where_the_guide_is(self):
        run, point = self.many()
        true, _ = Replay()(run, point, seed=0)
        estimate, _ = ES(pairs=400, sigma=1e-2, guide=Replay())(run, point, seed=1)
        along = float(estimate.grad["x"] @ true.grad["x"] / (true.grad["x"] @ true.grad["x"]))
        assert along == pytest.approx(1 + 1 / 60, abs=0.15)
        assert estimate.note.how.startswith("guided ES")

    def test_a_guide_that_fails_is_left_out(self):
        run = net_run(outer_loss_fn=errors)
        estimate, _ = ES(pairs=2, guide=Replay())(run, run.start(["lr"]), seed=0)
        assert estimate.ok and estimate.note.how.startswith("ES, its guide failed: the held-out")


class TestOutcomes:
    def test_pairs_that_diverge_are_left_out(self):
        """Beyond x = 0 the training diverges: half of every pair."""
        toy = Toy(
            lambda w, h: (h["x"].exp() * w**2).sum() / 2,
            lambda w, h: (w**2).sum(),
            vector(1.0),
            x=(),
        )
        run = descent(toy, 2000, 2.0)
        estimate, _ = ES(pairs=20, sigma=0.3)(run, {"x": vector(-0.4).squeeze()}, seed=0)
        assert estimate.ok and "of 20 pairs" in estimate.note.how
        assert "20 of 20" not in estimate.note.how

    @pytest.mark.parametrize("method", [ES(pairs=2), PES(pairs=2, every=600)])
    def test_all_diverged(self, method):
        run = descent(balance().problem, 600, 1e6)
        estimate, _ = method(run, {"x": X}, None, seed=0)
        assert estimate.note.outcome is Outcome.DIVERGED
        assert "every pair" in estimate.note.reason

    def test_one_pair_has_no_error_to_show(self):
        estimate, _ = ES(pairs=1)(balance(), {"x": X}, seed=0)
        assert math.isnan(float(estimate.note.stderr["x"]))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ES(pairs=0), "pairs=0 trains nothing"),
        (lambda: ES(sigma=0.0), "sigma=0 must be positive"),
        (lambda: ES(share=2.0), "share=2 must be between"),
        (lambda: PES(every=0), "every=0 does no step"),
        (lambda: PES(kind="both"), "kind='both' is none of"),
        (lambda: PES(objective="sum"), "objective='sum' is neither"),
    ],
)
def test_options_that_cannot_be_meant(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("method", ["es", "guided-es", "pes", "es-single"])
def test_by_name(method):
    estimate = hypergradient(classifier(), "adam", learn="lr", steps=10, method=method)
    assert estimate.ok and estimate.note.stderr is not None
