"""The space both routes share: what is smooth, what is discrete, and how Optuna sees it."""

import math

import optuna
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hyperdescent.inner.registry import find_rule
from hyperdescent.inner.schedules.schedule import find_schedule
from hyperdescent.meta.training.training import Training
from hyperdescent.search.optuna_space import distributions, parameters, suggest
from hyperdescent.search.space import Point, Space


@pytest.fixture
def space(problem):
    def make(*learn, rule="sgd", options=None, schedules=None, **more):
        found = {name: find_schedule(spec) for name, spec in (schedules or {}).items()}
        chosen = find_rule(rule).choose(**options or {})
        return Space(Training(problem, chosen, 5, found, **more), learn)

    return make


EVERYTHING = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "width", "activation")


def trial(space, numbers):
    """A real trial in which these numbers are asked for first; the rest is drawn."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(numbers)
    return study.ask()


def drawn(space, count=30):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [suggest(space, study.ask()) for _ in range(count)]


def test_smooth_and_discrete_are_told_apart(space):
    found = space(*EVERYTHING)
    assert list(found.smooth) == ["lr", "momentum", "dampening", "weight_decay"]
    assert list(found.discrete) == ["nesterov", "width", "activation"]


def test_a_scheduled_hyper_stands_for_all_its_knobs(space):
    found = space("lr", "momentum", schedules={"lr": "one_cycle", "momentum": "piecewise:3"})
    assert list(found.smooth) == ["lr.peak", "lr.up", "lr.div", "lr.final_div", "momentum.knots"]
    assert found.start().smooth["momentum.knots"].shape == (3,)


def test_one_knob_can_be_learned_alone(space):
    found = space("lr.up", schedules={"lr": "one_cycle"})
    assert list(found.smooth) == ["lr.up"]


def test_a_name_given_twice_is_learned_once(space):
    assert list(space("momentum", "momentum", "nesterov", "nesterov").smooth) == ["momentum"]


@pytest.mark.parametrize(
    ("learn", "nearest"), [("momentun", "momentum"), ("nesterow", "nesterov"), ("widht", "width")]
)
def test_an_unknown_name_lists_the_known_and_the_nearest(space, learn, nearest):
    with pytest.raises(ValueError, match=f"{learn!r}; did you mean {nearest!r}") as told:
        space("lr", learn)
    for known in EVERYTHING:
        assert known in str(told.value)
    assert "sgd on toy" in str(told.value)


def test_nothing_to_learn_lists_what_there_is(space):
    with pytest.raises(ValueError, match="nothing to learn") as told:
        space()
    assert "momentum" in str(told.value)


class TestStart:
    def test_it_is_inside_every_distribution(self, space):
        found = space(*EVERYTHING, schedules={"lr": "piecewise:3"})
        numbers, ranges = parameters(found, found.start()), distributions(found)
        assert set(numbers) == set(ranges)
        for key, number in numbers.items():
            assert ranges[key]._contains(ranges[key].to_internal_repr(number))

    def test_given_values_and_chosen_options_are_where_it_begins(self, space):
        found = space(
            "lr", "nesterov", options={"nesterov": True}, values={"lr": 0.05, "momentum": 0.5}
        )
        start = found.start()
        assert start.smooth["lr"].item() == 0.05
        assert start.discrete == {"nesterov": True}

    def test_a_start_outside_the_search_range_widens_it(self, space):
        found = space("lr", values={"lr": 50.0})
        assert parameters(found, found.start()) == {"lr": 50.0}
        assert distributions(found)["lr"].high == 50.0
        assert found.smooth["lr"].box()[1] == pytest.approx(math.log(50.0))


class TestNumbers:
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(lr=st.floats(1e-4, 10), momentum=st.floats(0.05, 0.99999), share=st.floats(0, 0.9))
    def test_a_point_survives_the_way_through_a_trial(self, space, lr, momentum, share):
        found = space(*EVERYTHING, schedules={"lr": "piecewise:2"})
        values = {"momentum": momentum, "dampening": share, "weight_decay": 1e-3}
        smooth = {n: torch.tensor(v, dtype=torch.float64) for n, v in values.items()}
        smooth["lr.knots"] = torch.tensor([lr, 1e-3], dtype=torch.float64)
        point = Point(smooth, {"nesterov": False, "width": 5, "activation": "gelu"})
        back = suggest(found, trial(found, parameters(found, point)))
        assert back.discrete == point.discrete
        assert set(back.smooth) == set(smooth)
        for name, value in smooth.items():
            # A logit near 1 costs digits: 1 - 0.99999 has 11 of float64's 16.
            torch.testing.assert_close(back.smooth[name], value, rtol=1e-9, atol=0)

    def test_a_vector_has_a_number_for_each_entry(self, space):
        found = space("lr", schedules={"lr": "piecewise:3"})
        point = Point({"lr.knots": torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)})
        assert parameters(found, point) == {
            "lr.knots[0]": 0.1,
            "lr.knots[1]": 0.2,
            "lr.knots[2]": 0.3,
        }

    def test_a_matrix_keeps_its_shape(self, space):
        found = space("lr", granularity={"lr": "tensor"}, schedules={"lr": "piecewise:2"})
        knots = torch.linspace(0.1, 0.8, 8, dtype=torch.float64).reshape(2, 4)
        back = suggest(found, trial(found, parameters(found, Point({"lr.knots": knots}))))
        torch.testing.assert_close(back.smooth["lr.knots"], knots)


class TestDistributions:
    def test_each_kind(self, space):
        found = distributions(space(*EVERYTHING))
        d = optuna.distributions
        assert found["lr"] == d.FloatDistribution(1e-4, 10.0, log=True)
        assert found["dampening"] == d.FloatDistribution(0.0, 0.9)
        assert found["nesterov"] == d.CategoricalDistribution((False, True))
        assert found["activation"] == d.CategoricalDistribution(("tanh", "gelu"))
        assert found["width"] == d.IntDistribution(2, 8, log=True)
        low, high = torch.tensor([0.05, 0.99999], dtype=torch.float64).logit().tolist()
        assert (found["momentum"].low, found["momentum"].high) == pytest.approx((low, high))
        assert not found["momentum"].log

    def test_draws_are_legal_and_fill_the_range(self, space):
        found = space(*EVERYTHING)
        points = drawn(found, 60)
        for point in points:
            for name, value in point.smooth.items():
                low, high = found.smooth[name].search
                found.smooth[name].check(name, value)
                # Where it means nothing, dampening is off.
                assert value == 0 or low * (1 - 1e-9) <= value <= high * (1 + 1e-9)
                assert value.dtype == torch.float64
            found.at(point.discrete)
        rates = torch.stack([p.smooth["lr"] for p in points]).log10()
        # Log-uniform on [-4, 1]: a quarter of the draws on either side of the middle at least.
        assert 0.25 < (rates < -1.5).double().mean() < 0.75
        kept = torch.stack([p.smooth["momentum"] for p in points])
        assert (kept > 0.99).any() and (kept < 0.5).any()
        assert {p.discrete["width"] for p in points} == set(range(2, 9))
        assert {p.discrete["activation"] for p in points} == {"tanh", "gelu"}

    def test_too_many_numbers_say_how_many_and_what_to_do(self, space):
        found = space("lr", schedules={"lr": "piecewise:1001"})
        with pytest.raises(ValueError, match="1001 numbers are too many") as told:
            distributions(found)
        assert "coarser granularity or fewer knots" in str(told.value)


class TestConditions:
    def test_dampening_is_asked_for_only_where_it_acts(self, space):
        found = space("momentum", "dampening", "nesterov", values={"dampening": 0.3})
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        seen = set()
        for _ in range(20):
            asked = study.ask()
            point = suggest(found, asked)
            nesterov = point.discrete["nesterov"]
            assert ("dampening" in asked.params) == (not nesterov)
            assert ("dampening" in parameters(found, point)) == (not nesterov)
            if nesterov:
                assert point.smooth["dampening"] == 0
            seen.add(nesterov)
        assert seen == {False, True}

    @pytest.mark.parametrize(("nesterov", "asked_for"), [(False, True), (True, False)])
    def test_a_condition_on_an_option_that_is_not_learned(self, space, nesterov, asked_for):
        found = space(
            "momentum", "dampening", options={"nesterov": nesterov}, values={"dampening": 0.0}
        )
        assert ("dampening" in parameters(found, found.start())) == asked_for

    def test_every_drawn_point_makes_an_optimizer(self, space):
        from hyperdescent.inner.torch_form.optimizer import torch_form

        found = space("momentum", "dampening", "nesterov")
        for point in drawn(found):
            training = found.at(point.discrete)
            values = {name: value.item() for name, value in point.smooth.items()}
            group = torch_form(training.rule)([torch.zeros(1)], **values).param_groups[0]
            assert {name: group[name] for name in values} == values


class TestAt:
    def test_options_reach_the_rule_and_the_problem(self, space):
        found = space("momentum", "nesterov", "width")
        training = found.at({"nesterov": True, "width": 7})
        assert training.rule.options()["nesterov"] is True
        assert training.problem.start(0)[0]["0.weight"].shape == (7, 5)
        # And the space itself is what it was.
        assert found.training.problem.start(0)[0]["0.weight"].shape == (4, 5)

    def test_nothing_discrete_is_the_same_training(self, space):
        found = space("lr")
        assert found.at({}) is found.training


def test_an_option_that_contradicts_the_values_in_force_is_told(space):
    with pytest.raises(ValueError, match="nesterov=True needs momentum > 0"):
        space("lr", "nesterov")


def test_a_given_value_of_the_wrong_shape_is_told(space):
    with pytest.raises(ValueError, match=r"lr is given \(3,\) values and has one"):
        space("lr", values={"lr": torch.tensor([0.1, 0.2, 0.3])})
