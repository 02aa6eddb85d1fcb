"""Every route with its reason in words."""

import pytest
import torch

from hyperdescent.inner.core.hyper import Choice, decay, learning_rate, temperature
from hyperdescent.inner.core.rule import rule
from hyperdescent.inner.numerics.elementwise import sign
from hyperdescent.inner.registry import find_rule
from hyperdescent.inner.schedules.schedule import find_schedule
from hyperdescent.meta.meta_optimizer import Descent
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training
from hyperdescent.search.route import choose_route, reconsider
from hyperdescent.search.space import Space


@rule(
    "Signed",
    lr=learning_rate(0.1),
    share=decay(0.5, rough="it enters through a sign"),
    smooth=Choice(False, (False, True)),
    temperature=temperature(),
)
def signed(p, g, s, t, lr, share, smooth, temperature):
    return p - lr * sign(g - share, smooth, temperature), s


@pytest.fixture
def space(problem):
    def make(*learn, rule="sgd", **more):
        return Space(Training(problem, find_rule(rule), 5, **more), learn)

    return make


def test_smooth_hypers_are_descended(space):
    decision = choose_route(space("lr", "momentum"))
    assert decision.route == "gradient"
    assert "all 2 learned numbers are smooth" in decision.reason


def test_numbers_are_counted_not_names(space):
    decision = choose_route(space("lr", schedules={"lr": find_schedule("piecewise:7")}))
    assert "all 7 learned numbers" in decision.reason


def test_discrete_hypers_are_searched_and_named_with_their_kind(space):
    decision = choose_route(space("momentum", "nesterov", "width"))
    assert decision.route == "search"
    assert "nesterov (choice), width (integer)" in decision.reason
    assert "lr" not in decision.reason


def test_search_can_be_asked_for(space):
    decision = choose_route(space("lr"), "search")
    assert (decision.route, decision.reason) == ("search", "search was asked for")


def test_gradient_can_be_asked_for(space):
    decision = choose_route(space("lr"), "gradient")
    assert decision.route == "gradient"
    assert decision.reason.startswith("asked for")


def test_insisting_on_a_gradient_that_is_not_there_names_the_hypers(space):
    with pytest.raises(ValueError, match=r"nesterov \(choice\), width \(integer\)") as told:
        choose_route(space("momentum", "nesterov", "width"), "gradient")
    assert "route='auto'" in str(told.value)


def test_an_unknown_route_lists_the_known_and_the_nearest(space):
    with pytest.raises(ValueError, match="'gradients'; did you mean 'gradient'") as told:
        choose_route(space("lr"), "gradients")
    assert "auto, gradient, search" in str(told.value)


class TestReconsider:
    def descent(self, outcome):
        return Descent(torch.zeros(1), {}, outcome=outcome, reason="the reason")

    def test_while_it_goes_well_nothing_changes(self, space):
        assert reconsider(self.descent(Outcome.OK), space("lr")) is None

    @pytest.mark.parametrize("outcome", [o for o in Outcome if o is not Outcome.OK])
    @pytest.mark.parametrize(("asked", "route"), [("auto", "search"), ("gradient", "gradient")])
    def test_else_it_searches_unless_the_gradient_was_insisted_on(
        self, space, outcome, asked, route
    ):
        decision = reconsider(self.descent(outcome), space("lr"), asked)
        assert decision.route == route
        assert outcome.sentence in decision.reason
        assert "the reason" in decision.reason

    def test_more_numbers_than_can_be_searched_stay(self, space):
        many = space("lr", schedules={"lr": find_schedule("piecewise:1001")})
        decision = reconsider(self.descent(Outcome.NOISY), many)
        assert decision.route == "gradient"
        assert decision.reason.endswith("1001 numbers are too many to search")


def test_hypers_whose_derivative_is_no_guide_are_searched_with_the_reason(space):
    assert choose_route(space("lr", rule=signed)).route == "gradient"
    decision = choose_route(space("lr", "share", rule=signed))
    assert decision.route == "search"
    assert decision.reason == "there is no useful gradient in share: it enters through a sign"


def test_knobs_of_a_schedule_of_them_are_searched_too(space):
    cosine = {"share": find_schedule("cosine")}
    decision = choose_route(space("share", rule=signed, schedules=cosine))
    assert decision.route == "search" and "share.peak: it enters" in decision.reason


def test_a_smooth_surrogate_gives_the_gradient_back(space):
    smooth = signed.choose(smooth=True)
    assert choose_route(space("lr", "share", "temperature", rule=smooth)).route == "gradient"


def test_insisting_on_a_gradient_that_is_no_guide_names_the_way_out(space):
    with pytest.raises(
        ValueError, match=r"cannot learn share of signed \(share: it enters"
    ) as told:
        choose_route(space("lr", "share", rule=signed), "gradient")
    assert "give smooth=True, leave it out of learn" in str(told.value)
