"""Forward gradients against reverse mode, and guesses as control variates: less noise, no bias."""

import math

import pytest
import torch
from nets import VALUES, examples, mlp
from torch.nn import functional as F
from toys import DOUBLE, Toy, descent, following

from hyperdescent.inner.registry import find_rule
from hyperdescent.inner.schedules.schedule import find_schedule
from hyperdescent.meta.forward.forward import Forward
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.sampling.control_variate import Guess, GuessState
from hyperdescent.meta.sampling.evolution_strategies import ES
from hyperdescent.meta.sampling.forward_gradient import ForwardGradient
from hyperdescent.meta.training.coordinates import Coordinates
from hyperdescent.meta.training.estimate import Estimate
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training

STEPS, SIZE = 12, 12


@pytest.fixture(scope="module")
def run():
    train, valid = examples(24, 5), examples(16, 5, seed=1)
    problem = problem_from_module(mlp, F.cross_entropy, train, valid, batch_size=8)
    given = {name: VALUES[name] for name in ("beta1", "beta2", "eps")}
    schedules = {"lr": find_schedule(f"piecewise:{SIZE - 1}")}
    return Training(problem, find_rule("adam"), STEPS, schedules, values=given | {"lr": 0.03})


def exact(run, point):
    """The gradient in unconstrained coordinates."""
    estimate, _ = Replay(compile=False)(run, point, seed=3)
    return pulled(run, point, estimate.grad)


def pulled(run, point, grad):
    space = Coordinates({name: run.hypers[name] for name in point})
    return space.pull(space.free(point), grad)


class TestAlong:
    @pytest.mark.parametrize("compile", [False, True])
    def test_slopes_are_the_gradient_times_the_directions(self, run, compile, monkeypatch):
        monkeypatch.setattr(
            "hyperdescent.meta.forward.tangent_step.TangentMachine._compiled",
            lambda self, graph: graph,
        )
        point = run.start(["lr", "beta1"])
        draw = torch.Generator().manual_seed(0)
        directions = [
            {n: torch.randn(x.shape, dtype=DOUBLE, generator=draw) for n, x in point.items()}
            for _ in range(3)
        ]
        reverse, _ = Replay(compile=False)(run, point, seed=3)
        expected = [sum(float((reverse.grad[n] * d[n]).sum()) for n in d) for d in directions]
        found = Forward(compile=compile).along(run, point, directions, seed=3)
        assert found.loss == pytest.approx(reverse.loss, rel=1e-13)
        assert found.grad["along"].tolist() == pytest.approx(expected, rel=1e-10)

    def test_a_hyper_that_the_held_out_loss_contains(self):
        toy = Toy(following(1.0), lambda w, h: (h["x"] * w).sum(), torch.zeros(2).double(), x=(2,))
        run, point = descent(toy, 5, 0.3), {"x": torch.tensor([0.4, -0.7], dtype=DOUBLE)}
        reverse, _ = Replay(compile=False)(run, point, seed=0)
        along = [{"x": torch.tensor([1.0, 2.0], dtype=DOUBLE)}]
        found = Forward(compile=False).along(run, point, along, seed=0)
        expected = float(reverse.grad["x"] @ along[0]["x"])
        assert float(found.grad["along"]) == pytest.approx(expected, rel=1e-12)

    def test_not_of_a_part_of_a_run(self, run):
        point = run.start(["lr"])
        with pytest.raises(ValueError, match="every=2 goes on from tangents in other directions"):
            Forward(every=2).along(run, point, [point], seed=0)


class TestForwardGradient:
    @pytest.mark.parametrize("guess", [None, Guess()])
    def test_along_as_many_directions_as_numbers_it_is_exact(self, run, guess):
        point = run.start(["lr", "beta1"])
        estimate, _ = ForwardGradient(SIZE, guess, compile=False)(run, point, seed=3)
        reverse, _ = Replay(compile=False)(run, point, seed=3)
        for name, value in reverse.grad.items():
            torch.testing.assert_close(estimate.grad[name], value, rtol=1e-8, atol=1e-12)
            assert not estimate.note.stderr[name].any()

    @pytest.mark.parametrize("wrong", [0.0, 3.0])
    def test_the_mean_is_the_gradient_whatever_the_guess(self, run, wrong, monkeypatch):
        """And its squared error is n / directions - 1 times the norm of what was not guessed."""
        point = run.start(["lr", "beta1"])
        g = exact(run, point)
        c = wrong * g.abs()
        monkeypatch.setattr(Guess, "at", lambda self, z, past: c)
        count, calls = 4, 1000

        def along(self, training, point, directions, *, seed):
            """At no cost: that these are the slopes is tested above."""
            space = Coordinates({name: training.hypers[name] for name in point})
            ones = {n: torch.ones_like(x) for n, x in point.items()}
            through = space.pull(space.free(point), ones)
            rows = torch.stack([space.layout.flatten(d) for d in directions]) / through
            return Estimate(1.0, {"along": rows @ g})

        monkeypatch.setattr(Forward, "along", along)
        found = []
        for seed in range(calls):
            estimate, _ = ForwardGradient(count)(run, point, seed=seed)
            found.append(pulled(run, point, estimate.grad))
        each = torch.stack(found)
        stderr = each.std(0) / math.sqrt(calls)
        assert ((each.mean(0) - g).abs() < 4 * stderr).all()
        error = (each - g).square().sum(1).mean()
        expected = (SIZE / count - 1) * (g - c).square().sum()
        assert float(error / expected) == pytest.approx(1, abs=0.1)

    def test_its_error_is_what_it_says(self, run):
        point, ratios = run.start(["lr", "beta1"]), []
        for seed in range(30):
            estimate, _ = ForwardGradient(6, None, compile=False)(run, point, seed=seed)
            # Seeds draw batches too, so the gradient is that of the seed.
            reverse, _ = Replay(compile=False)(run, point, seed=seed)
            ratios += [
                (estimate.grad[n] - reverse.grad[n]) / estimate.note.stderr[n] for n in point
            ]
        # Normal ones have their median at 0.67.
        size = float(torch.cat([r.flatten() for r in ratios]).abs().median())
        assert 0.5 < size < 0.9

    def test_going_downhill_the_past_takes_most_of_the_noise_away(self):
        scale = torch.arange(1.0, 13.0, dtype=DOUBLE)
        toy = Toy(following(1.0), lambda w, h: (scale * w**2).sum() / 2, 0 * scale, x=(SIZE,))
        run, late = descent(toy, 3, 1.0), {}
        for name, guess in (("none", None), ("past", Guess())):
            method, carry, errors = ForwardGradient(2, guess, compile=False), None, []
            x = torch.linspace(0.5, 1, SIZE, dtype=DOUBLE)
            for seed in range(30):
                estimate, carry = method(run, {"x": x}, carry, seed=seed)
                g = scale * x
                errors.append(float((estimate.grad["x"] - g).norm() / g.norm()))
                x = x - 0.02 * g / g.norm()
            late[name] = sum(errors[10:]) / 20
        assert late["none"] > 1.5 and late["past"] < late["none"] / 5

    def test_divergence_is_an_outcome_and_keeps_the_past(self):
        toy = Toy(following(1.0), lambda w, h: (w**2).sum(), torch.ones(3).double(), x=(3,))
        point = {"x": torch.ones(3, dtype=DOUBLE)}
        method = ForwardGradient(2, compile=False)
        _, past = method(descent(toy, 3, 0.5), point, seed=0)
        estimate, kept = method(descent(toy, 200, 1e3), point, past, seed=0)
        assert estimate.note.outcome is Outcome.DIVERGED and kept is past

    def test_bad_numbers(self):
        with pytest.raises(ValueError, match="directions=0 measures nothing"):
            ForwardGradient(0)


class TestGuess:
    def test_as_many_slopes_as_numbers_at_one_place_are_the_gradient(self):
        g, z = torch.tensor([1.0, -2.0, 3.0], dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
        moves = torch.randn(3, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
        guess = Guess(ridge=1e-12)
        past = guess.add(None, z, moves, moves @ g)
        torch.testing.assert_close(guess.at(z, past), g, rtol=1e-6, atol=0)
        assert not guess.at(z, None).any()

    def test_it_is_the_least_squares_that_it_says(self):
        draw = torch.Generator().manual_seed(1)
        z, moves = (torch.randn(n, 5, dtype=DOUBLE, generator=draw) for n in (1, 20))
        guess, past = Guess(nearest=100, length=2.0, ridge=0.1), None
        for move in moves:
            past = guess.add(past, 0.3 * move, move[None], torch.ones(1, dtype=DOUBLE))
        weight = (-(past.z - z).square().sum(1) / (2 * 2.0**2)).exp()
        rows = past.directions
        normal = rows.T @ (weight[:, None] * rows) + 0.1 * torch.eye(5, dtype=DOUBLE)
        expected = torch.linalg.solve(normal, rows.T @ (weight * past.slopes))
        torch.testing.assert_close(guess.at(z[0], past), expected, rtol=1e-8, atol=1e-10)

    def test_it_remembers_the_latest_and_reads_the_nearest(self):
        z, guess, past = torch.zeros(2, dtype=DOUBLE), Guess(nearest=2, kept=3, ridge=1e-9), None
        for k in range(5):
            place = torch.tensor([float(k), 0.0], dtype=DOUBLE)
            moves = torch.tensor([[1.0, 0.0]], dtype=DOUBLE)
            past = guess.add(past, place, moves, torch.tensor([float(k)], dtype=DOUBLE))
        assert past.slopes.tolist() == [2, 3, 4]
        # Of 2 and 3; the far one counts for less.
        assert 2 < float(guess.at(z, past)[0]) < 2.5

    def test_slopes_in_other_numbers_are_refused(self):
        past = Guess(kept=2).add(None, torch.zeros(3), torch.eye(3), torch.ones(3))
        assert len(past.slopes) == 2
        with pytest.raises(ValueError, match="2 learned numbers go on from slopes in 3; begin"):
            Guess().at(torch.zeros(2), past)

    def test_what_diverged_is_not_remembered(self):
        z = torch.zeros(2, dtype=DOUBLE)
        moves, changes = torch.eye(2, dtype=DOUBLE), torch.tensor([math.nan, 1.0], dtype=DOUBLE)
        assert len(Guess().add(None, z, moves, changes).slopes) == 1

    @pytest.mark.parametrize("name", ["nearest", "kept", "length", "ridge"])
    def test_bad_numbers(self, name):
        with pytest.raises(ValueError, match=f"{name}=0"):
            Guess(**{name: 0})


class TestEvolution:
    def test_a_guess_takes_noise_away_and_adds_no_bias(self):
        """On a quadratic the smoothed gradient is the gradient."""
        scale = torch.arange(1.0, 9.0, dtype=DOUBLE)
        toy = Toy(following(1.0), lambda w, h: (scale * w**2).sum() / 2, 0 * scale, x=(8,))
        run, x = descent(toy, 3, 1.0), torch.linspace(0.5, 1, 8, dtype=DOUBLE)
        errors, found = {}, {}
        for name, guess in (("none", None), ("past", Guess())):
            carry, grads = None, []
            for seed in range(120):
                estimate, carry = ES(2, 0.01, guess)(run, {"x": x}, carry, seed=seed)
                grads.append(estimate.grad["x"])
            found[name] = torch.stack(grads[20:])
            errors[name] = float((found[name] - scale * x).norm(dim=1).mean())
        assert errors["past"] < errors["none"] / 3
        for each in found.values():
            stderr = each.std(0) / 10
            assert ((each.mean(0) - scale * x).abs() < 4 * stderr + 1e-6).all()

    def test_not_beside_a_guide(self):
        with pytest.raises(ValueError, match="a guess or a guide"):
            ES(guess=Guess(), guide=Replay())


def test_a_past_is_plain_tensors():
    past = Guess().add(None, torch.zeros(1), torch.ones(1, 1), torch.ones(1))
    assert isinstance(past, GuessState) and all(isinstance(x, torch.Tensor) for x in past)
