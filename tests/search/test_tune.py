"""tune() end to end: both routes, the fallbacks between them, stopping and going on."""

import json
import math
import time
from collections import defaultdict
from dataclasses import replace
from statistics import fmean, median

import pytest
import torch
from torch.nn import functional

from hyperdescent.inner.core.hyper import positive
from hyperdescent.inner.registry import find_rule
from hyperdescent.meta.meta_optimizer import MetaOptimizer
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.training.estimate import Estimate, Estimator
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.search import tune as module
from hyperdescent.search.folder_lock import sole_writer
from hyperdescent.search.result import Result
from hyperdescent.search.tune import tune

# From the default of 1e-3 four steps move nothing, not even the loss.
RATE = {"lr": 0.02}
SHORT = {"steps": 4, "budget": "1s", "progress": False}


def run(problem, rule="adamw", **more):
    return tune(problem, rule, **{**SHORT, **more})


def losses(result):
    return [row["loss"] for row in result.history]


def routes(result):
    return [row["route"] for row in result.history]


def stop_after(count):
    """A watcher that presses Ctrl-C."""
    seen = []

    def watch(event):
        seen.append(event)
        if len(seen) == count:
            raise KeyboardInterrupt

    return watch


def giving_up_after(count):
    """A meta-optimizer whose estimates fail after this many."""
    made = []

    class Failing(Estimator):
        def __call__(self, training, point, carry=None, *, seed):
            if training.steps < SHORT["steps"]:  # The probe's.
                return Replay()(training, point, seed=seed)
            made.append(seed)
            if len(made) > count:
                return Estimate.diverged(0, "the test says so"), None
            return Replay()(training, point, seed=seed)

    return MetaOptimizer(Failing(), patience=1)


def error_rate(output, target):
    return (output.argmax(1) != target).double().mean()


@pytest.mark.usefixtures("ticking")
class TestRoutes:
    @pytest.mark.parametrize("route", ["auto", "gradient", "search"])
    def test_it_lowers_the_loss(self, problem, route):
        result = run(problem, learn="lr,beta1", steps=10, route=route, budget="2s", values=RATE)
        assert result.outcome is Outcome.OK
        assert result.route == ("search" if route == "search" else "gradient")
        assert result.loss < 0.9 * losses(result)[0]
        assert set(result.hypers) == {"lr", "beta1"}
        assert result.hypers["lr"] > RATE["lr"]

    def test_discrete_options_are_searched(self, problem):
        result = run(problem, "sgd", learn="lr,momentum,nesterov,width,activation")
        assert result.route == "search"
        assert "nesterov (choice), width (integer), activation (choice)" in result.reason
        assert set(result.options) == {"nesterov", "width", "activation"}
        assert {row["options"]["width"] for row in result.history} > {4}
        assert result.rule.options()["nesterov"] == result.options["nesterov"]

    def test_every_evaluation_is_a_row(self, problem):
        events = []
        result = run(problem, progress=events.append)
        evaluations = [event for event in events if event.route != "confirm"]
        assert [event.loss for event in evaluations] == losses(result)
        assert [event.route for event in evaluations] == routes(result)
        assert routes(result).count("gradient") > 10
        for k, row in enumerate(result.history):
            assert row["outcome"] == "ok"
            assert row["seed"] == (k if row["route"] == "gradient" else 0)
            assert row["point"].keys() == {"lr"}
        told = [row["seconds"] for row in result.history]
        assert told == sorted(told)

    def test_the_fields_of_a_result(self, problem):
        result = run(
            problem,
            learn="lr,beta1",
            schedules={"lr": "piecewise:3"},
            values={"beta2": 0.95},
            seed=5,
        )
        assert set(result.hypers) == {"lr.knots", "beta1"}
        assert set(result.in_force) == {"lr", "beta1", "beta2", "eps", "weight_decay"}
        assert result.in_force["lr"].shape == (4,)
        assert result.in_force["beta2"] == result.defaults["beta2"] == 0.95
        torch.testing.assert_close(result.defaults["lr"], torch.full((4,), 1e-3).double())
        assert result.scheduled == ["lr"]
        assert result.loss == pytest.approx(sum(result.losses) / len(result.losses))
        assert "all 4 learned numbers" in result.reason
        settings = result.settings
        assert (settings["seed"], settings["rule"], settings["problem"]) == (5, "adamw", "toy")
        assert settings["learn"] == ["lr", "beta1"] and settings["budget"] == 1
        assert torch.__version__.startswith(result.provenance["torch"])
        assert not any(value.requires_grad for value in result.hypers.values())

    def test_the_loss_confirmed_is_that_of_the_point_returned(self, problem):
        result = run(problem)
        point, seen = result.hypers["lr"].item(), [row["point"]["lr"] for row in result.history]
        low, high = min(seen), max(seen)
        assert low <= point <= high
        assert result.loss < losses(result)[0]

    def test_hypers_of_the_loss_are_learned_too(self, make_problem):
        def penalized(output, target, hypers, params):
            weights = sum(p.square().sum() for p in params.values())
            return functional.cross_entropy(output, target) + hypers["l2"] * weights

        problem = make_problem(
            penalized,
            hypers={"l2": positive(0.1, search=(1e-6, 10.0))},
            outer_loss_fn=functional.cross_entropy,
        )
        result = run(problem, learn="l2,lr", steps=20)
        assert result.outcome is Outcome.OK
        assert result.hypers["l2"] < 0.1

    def test_the_global_generator_is_left_alone(self, problem):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        run(problem)
        run(problem, route="search")
        assert torch.equal(before, torch.get_rng_state())


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize("route", ["gradient", "search"])
class TestSeeds:
    def test_the_same_seed_evaluates_the_same(self, problem, route):
        # The clock counts readings here, and each run begins it at another one.
        one, two = (run(problem, learn="lr,beta1", route=route, seed=3) for _ in range(2))
        assert losses(one)[:8] == pytest.approx(losses(two)[:8], rel=1e-6)

    def test_another_seed_evaluates_otherwise(self, problem, route):
        one, two = (run(problem, learn="lr", route=route, seed=seed) for seed in (3, 4))
        assert not set(losses(one)) & set(losses(two))


@pytest.mark.usefixtures("ticking")
class TestFallback:
    def test_a_loss_without_a_gradient_is_searched(self, make_problem):
        result = run(make_problem(outer_loss_fn=error_rate), steps=10)
        assert result.route == "search"
        assert Outcome.NOT_DIFFERENTIABLE.sentence in result.reason
        assert "no graph" in result.reason
        assert result.outcome is Outcome.OK
        assert list(dict.fromkeys(routes(result))) == ["scan", "gradient", "search"]
        assert routes(result).count("gradient") == 1
        assert result.loss < losses(result)[0]

    def test_a_start_that_diverges_is_left_by_the_scan(self, make_problem):
        problem = make_problem(
            lambda output, target: (output - target[:, None]).square().mean(), spread=10
        )
        result = run(problem, "sgd", values={"lr": 10.0}, steps=40)
        first, *_ = result.history
        assert (first["route"], first["outcome"], first["loss"]) == ("scan", "diverged", None)
        descended = [row for row in result.history if row["route"] == "gradient"]
        assert result.route == "gradient" and descended[0]["point"]["lr"] < 1
        assert result.outcome is Outcome.OK
        assert math.isfinite(result.loss)
        assert result.hypers["lr"] < 1

    def test_an_end_before_anything_was_trusted_is_searched_from_the_best_seen(self, make_problem):
        result = run(make_problem(), meta=giving_up_after(0), values=RATE)
        assert result.route == "search"
        assert Outcome.DIVERGED.sentence in result.reason
        tried = [row for row in result.history if row["route"] != "search"]
        best = min((row for row in tried if row["loss"] is not None), key=lambda row: row["loss"])
        searched = result.history[len(tried)]
        assert searched["route"] == "search"
        assert searched["point"]["lr"] == pytest.approx(best["point"]["lr"])

    def test_a_hyper_that_does_nothing_stalls_and_is_searched(self, make_problem):
        problem = make_problem(
            lambda output, target, hypers, params: functional.cross_entropy(output, target),
            hypers={"unused": positive(1.0, search=(0.1, 10.0))},
            outer_loss_fn=functional.cross_entropy,
        )
        result = run(problem, learn="unused")
        assert result.route == "search"
        assert Outcome.STALLED.sentence in result.reason

    def test_insisting_on_the_gradient_reports_the_failure(self, make_problem):
        result = run(make_problem(outer_loss_fn=error_rate), route="gradient")
        assert result.route == "gradient"
        assert result.outcome is Outcome.NOT_DIFFERENTIABLE
        assert "no graph" in result.reason
        assert set(routes(result)) == {"scan", "gradient"}

    def test_nothing_finite_is_divergence_not_an_exception(self, make_problem):
        # Every rate in the search range diverges.
        problem = make_problem(
            lambda output, target: (1e3 * output - target[:, None]).square().mean(), spread=1e3
        )
        result = run(problem, "sgd", values={"lr": 1.0}, steps=40, budget="0.5s")
        assert result.outcome is Outcome.DIVERGED
        assert result.loss == math.inf
        assert result.hypers["lr"] == 1

    def test_what_the_gradient_found_is_known_to_the_search(self, make_problem, monkeypatch):
        seen = {}
        original = module.OptunaSearcher

        def searcher(space, start, **more):
            seen.update(more, start=start)
            return original(space, start, **more)

        monkeypatch.setattr(module, "OptunaSearcher", searcher)
        result = run(make_problem(), meta=giving_up_after(6), values=RATE)
        assert result.route == "search" and routes(result).count("gradient") == 7
        before = [row for row in result.history if row["route"] != "search"]
        ended = [row for row in before if row["loss"] is not None]
        assert [loss for _, loss in seen["known"]] == [row["loss"] for row in ended]
        best = min(ended, key=lambda row: row["loss"])
        assert seen["start"].smooth["lr"] == best["point"]["lr"]

    def test_too_many_numbers_to_search_keep_what_the_gradient_found(self, make_problem):
        result = run(
            make_problem(),
            schedules={"lr": "piecewise:1001"},
            meta=giving_up_after(6),
            values=RATE,
        )
        assert (result.route, result.outcome) == ("gradient", Outcome.DIVERGED)
        assert "1001 numbers are too many to search" in result.reason
        assert routes(result).count("gradient") == 7
        assert math.isfinite(result.loss)


class TestMessages:
    """Each names the thing, its value and the next move, before time is spent."""

    def test_a_budget_too_small_says_how_much_it_takes(self, problem):
        with pytest.raises(ValueError, match=r"budget=0.0001 s is too small for one meta") as told:
            run(problem, budget=1e-4, steps=50)
        assert "of 50 steps" in str(told.value) and "give at least" in str(told.value)

    def test_a_search_too(self, problem):
        with pytest.raises(ValueError, match="too small for one training of 50 steps"):
            run(problem, budget=1e-4, steps=50, route="search")

    def test_nan_in_the_data_is_found_at_step_0(self, make_problem):
        broken = torch.full((40, 5), math.nan), torch.zeros(40, dtype=torch.int64)
        with pytest.raises(ValueError, match="the train loss is nan at step 0") as told:
            run(make_problem(train=broken))
        assert "check the data for NaN" in str(told.value)

    def test_nan_in_the_held_out_data_is_found_at_step_0(self, make_problem):
        broken = torch.full((40, 5), math.nan), torch.zeros(40, dtype=torch.int64)
        with pytest.raises(ValueError, match="the held-out loss is nan at step 0"):
            run(make_problem(valid=broken))

    def test_a_start_without_a_logarithm_is_refused(self, problem):
        with pytest.raises(ValueError, match="lr=0 has no place on its log scale") as told:
            run(problem, values={"lr": 0.0})
        assert "leave lr out of learn" in str(told.value)

    def test_and_is_fine_where_it_is_not_learned(self, problem):
        result = run(problem, learn="beta1", values={"weight_decay": 0.0}, budget="0.2s")
        assert result.in_force["weight_decay"] == 0

    @pytest.mark.parametrize(
        ("given", "told"),
        [
            ({"beta1": 1.0}, r"beta1=1 is outside \[0, 1\)"),
            ({"lr": -1.0}, r"lr=-1 is outside \[0, inf\)"),
            ({"lr": math.nan}, r"lr=nan is outside"),
        ],
    )
    def test_a_value_out_of_bounds(self, problem, given, told):
        with pytest.raises(ValueError, match=told):
            run(problem, values=given)

    @pytest.mark.parametrize(
        ("wrong", "told", "known"),
        [
            ({"rule": "adamm"}, "'adamm'; did you mean 'adam'", "sgd"),
            ({"learn": "beta3"}, "'beta3'; did you mean 'beta", "weight_decay"),
            ({"learn": "lr,leraning_rate"}, "'leraning_rate'", "weight_decay"),
            ({"learn": ""}, "nothing to learn", "weight_decay"),
            ({"learn": ()}, "nothing to learn", "weight_decay"),
            ({"values": {"beta3": 1.0}}, "'beta3'; did you mean 'beta", "weight_decay"),
            ({"schedules": {"lr": "cosin"}}, "'cosin'; did you mean 'cosine'", "piecewise"),
            ({"schedules": {"lrr": "cosine"}}, "'lrr'; did you mean 'lr'", "beta1"),
            ({"schedules": {"lr": "cosine:3"}}, "cosine cannot take '3'", ""),
            ({"schedules": {"lr": "piecewise:1"}}, "at least 2 knots, not 1", "constant"),
            ({"granularity": {"lr": "tensors"}}, "'tensors'; did you mean 'tensor'", "element"),
            ({"granularity": {"lrr": "tensor"}}, "'lrr'; did you mean 'lr'", "beta1"),
            ({"route": "serach"}, "'serach'; did you mean 'search'", "auto"),
            ({"steps": 0}, "steps=0 trains nothing", ""),
            ({"budget": "soon"}, "budget='soon' is not a time", "1.5h"),
            ({"learn": "width", "route": "gradient"}, r"cannot learn width \(integer\)", "auto"),
        ],
    )
    def test_names_and_specs(self, problem, wrong, told, known, tmp_path):
        rule = wrong.pop("rule", "adamw")
        with pytest.raises(ValueError, match=told) as raised:
            run(problem, rule, out=tmp_path / "run", **wrong)
        assert known in str(raised.value)
        assert not (tmp_path / "run").exists()

    def test_options_that_contradict_each_other(self, problem):
        with pytest.raises(ValueError, match="nesterov=True needs momentum > 0"):
            run(problem, find_rule("sgd").choose(nesterov=True))


@pytest.mark.usefixtures("ticking")
class TestFolder:
    @pytest.mark.parametrize("route", ["gradient", "search"])
    def test_a_larger_budget_goes_on(self, problem, tmp_path, route):
        call = {"learn": "lr,beta1", "route": route, "out": tmp_path}
        first = run(problem, budget="0.5s", **call)
        second = run(problem, budget="1s", **call)
        assert len(second.history) > len(first.history) + 3
        assert second.history[: len(first.history)] == first.history
        scanned = routes(second).count("scan")
        assert routes(second)[:scanned] == ["scan"] * scanned
        seeds = [row["seed"] for row in second.history]
        assert seeds == [0] * scanned + list(range(scanned, len(seeds)))
        # The rows after the break are new points, not the old ones again.
        points = [tuple(row["point"].values()) for row in second.history]
        assert len(set(points)) >= len(points) - 1

    def test_a_continued_descent_moves_on_from_where_it_was(self, problem, tmp_path):
        first = run(problem, budget="0.5s", out=tmp_path)
        second = run(problem, budget="1s", out=tmp_path)
        before = first.history[-1]["point"]["lr"]
        after = second.history[len(first.history)]["point"]["lr"]
        assert abs(math.log(after / before)) <= 0.5

    @pytest.mark.parametrize("budget", ["1s", "0.5s"])
    def test_a_finished_run_is_only_read(self, problem, tmp_path, budget, monkeypatch):
        first = run(problem, out=tmp_path, budget="1s")

        def trained(*args):
            raise AssertionError("a finished run trained again")

        monkeypatch.setattr(module, "held_out_loss", trained)
        monkeypatch.setattr(module, "_descend", trained)
        second = run(problem, out=tmp_path, budget=budget)
        assert second.plain() == first.plain()

    def test_a_rule_of_the_users_own_can_be_read_back_too(self, problem, tmp_path):
        own = replace(find_rule("adam"), name="mine")
        first, second = (run(problem, own, out=tmp_path) for _ in range(2))
        assert second.plain() == first.plain()
        assert second.rule.name == "mine"

    def test_points_too_large_for_rows_go_on_too(self, problem, tmp_path):
        call = {"schedules": {"lr": "piecewise:1001"}, "values": RATE, "out": tmp_path}

        def watch(event):
            if event.route == "confirm":
                raise KeyboardInterrupt

        first = run(problem, budget="0.4s", progress=watch, **call)
        second = run(problem, budget="0.4s", **call)
        assert (first.outcome, second.outcome) == (Outcome.INTERRUPTED, Outcome.OK)
        assert {row["point"] for row in second.history} == {None}
        assert len(second.history) == len(first.history)

    def test_other_settings_are_refused_by_name(self, problem, tmp_path):
        run(problem, out=tmp_path, budget="0.3s")
        with pytest.raises(ValueError, match="seed was 0, now 1") as told:
            run(problem, out=tmp_path, seed=1, steps=5, values={"beta1": 0.8})
        for named in ("steps was 4, now 5", "values was {}, now {'beta1': 0.8}", str(tmp_path)):
            assert named in str(told.value)
        assert "budget" not in str(told.value)

    def test_a_mistake_corrected_may_use_the_same_folder(self, problem, tmp_path):
        with pytest.raises(ValueError, match="no place on its log scale"):
            run(problem, values={"lr": 0.0}, out=tmp_path)
        assert run(problem, values={"lr": 0.01}, out=tmp_path).outcome is Outcome.OK

    def test_a_folder_in_use_is_named(self, problem, tmp_path):
        with sole_writer(tmp_path), pytest.raises(BlockingIOError, match=str(tmp_path)):
            run(problem, out=tmp_path)

    def test_everything_is_written(self, problem, tmp_path):
        run(problem, out=tmp_path / "deep" / "run", route="search")
        names = {path.name for path in (tmp_path / "deep" / "run").iterdir()}
        assert names == {
            "lock",
            "result.json",
            "schedule.png",
            "settings.json",
            "state.pt",
            "trials.log",
        }

    def test_json_has_no_nan(self, make_problem, tmp_path):
        problem = make_problem(
            lambda output, target: (output - target[:, None]).square().mean(), spread=10
        )
        result = run(problem, "sgd", values={"lr": 10.0}, steps=40, out=tmp_path)
        assert None in losses(result)

        def never(constant):
            raise AssertionError(f"{constant} in result.json")

        json.loads((tmp_path / "result.json").read_text(), parse_constant=never)


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize("route", ["gradient", "search"])
class TestInterrupt:
    def test_the_best_so_far_is_returned_and_the_run_goes_on(self, problem, tmp_path, route):
        call = {"learn": "lr,beta1", "route": route, "out": tmp_path}
        first = run(problem, progress=stop_after(4), **call)
        assert first.outcome is Outcome.INTERRUPTED
        assert first.route == route
        assert first.loss == min(losses(first)) and first.losses == []
        best = min(first.history, key=lambda row: row["loss"])
        assert first.hypers["lr"] == best["point"]["lr"]
        assert Result.load(tmp_path / "result.json").outcome is Outcome.INTERRUPTED
        assert (tmp_path / "schedule.png").stat().st_size > 0

        second = run(problem, **call)
        assert second.outcome is Outcome.OK
        assert len(first.history) == 4
        assert second.history[:4] == first.history
        assert len(second.history) > 8

    def test_without_a_folder(self, problem, route):
        result = run(problem, route=route, progress=stop_after(2))
        assert result.outcome is Outcome.INTERRUPTED
        assert len(result.history) == 2

    def test_before_any_evaluation_it_goes_through(self, make_problem, tmp_path, route):
        def pressed(output, target):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(make_problem(pressed), route=route, out=tmp_path)
        assert not (tmp_path / "result.json").exists()
        # And leaves a folder that can be used.
        result = run(make_problem(), route=route, out=tmp_path, steps=3)
        assert result.outcome is Outcome.OK

    def test_while_confirming(self, problem, tmp_path, route):
        def watch(event):
            if event.route == "confirm":
                raise KeyboardInterrupt

        first = run(problem, route=route, out=tmp_path, progress=watch)
        assert first.outcome is Outcome.INTERRUPTED
        second = run(problem, route=route, out=tmp_path, budget="2s")
        assert second.outcome is Outcome.OK
        assert second.history[: len(first.history)] == first.history


class TestConfirm:
    @pytest.mark.usefixtures("ticking")
    def test_a_gradient_that_was_no_guide_loses_to_where_it_began(self, make_problem):
        class Uphill(Estimator):
            def __call__(self, training, point, carry=None, *, seed):
                estimate, carry = Replay()(training, point, seed=seed)
                return replace(estimate, grad={n: -g for n, g in estimate.grad.items()}), carry

        meta = MetaOptimizer(Uphill(), drift=math.inf, jump=math.inf)
        result = run(make_problem(), meta=meta, steps=10, budget="4s")
        means = defaultdict(list)
        for row in result.history:
            if row["route"] == "scan":
                means[row["point"]["lr"]].append(row["loss"])
        assert {len(under) for under in means.values()} == {4}
        best = min(means, key=lambda lr: fmean(means[lr]))
        assert median(losses(result)[-9:]) > 1.2 * fmean(means[best])
        assert result.hypers["lr"] == pytest.approx(best)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.usefixtures("ticking")
    def test_a_candidate_that_fails_a_fresh_seed_does_not_win(self, problem, monkeypatch, bad):
        calls, original = [], module.held_out_loss

        def held_out_loss(training, point, seed):
            calls.append(seed)
            # The first candidate of the first confirming seed.
            return torch.tensor(bad) if len(calls) == 1 else original(training, point, seed)

        monkeypatch.setattr(module, "held_out_loss", held_out_loss)
        result = run(problem)
        assert math.isfinite(result.loss)

    def test_the_budget_is_kept_on_a_real_clock(self, problem):
        began = time.monotonic()
        result = run(problem, budget="0.6s")
        # No promise of speed: it ends, and says what it spent.
        assert result.settings["spent"] <= time.monotonic() - began
        assert result.settings["spent"] > 0.5
