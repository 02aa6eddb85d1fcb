"""Declarations of hyperparameters: coordinates, legal values, starting values."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperdescent.inner.core.hyper import (
    Choice,
    Integer,
    decay,
    fraction,
    learning_rate,
    positive,
    weight_decay,
)

RATE, KEPT, SHARE = learning_rate(1e-3), decay(0.9), fraction(0.3)
KINDS = pytest.mark.parametrize("hyper", [RATE, KEPT, SHARE], ids=["rate", "decay", "fraction"])


def number(x):
    return torch.tensor(x, dtype=torch.float64)


class TestCoordinates:
    @given(st.floats(1e-12, 1e6))
    def test_rates_invert(self, value):
        assert float(RATE.value(RATE.free(number(value)))) == pytest.approx(value, rel=1e-14)

    @given(st.floats(1e-6, 1 - 1e-6))
    def test_decays_invert(self, value):
        back = float(KEPT.value(KEPT.free(number(value))))
        # What is kept and what is dropped both matter: 1 - beta is the length of the average.
        assert back == pytest.approx(value, rel=1e-12)
        assert 1 - back == pytest.approx(1 - value, rel=1e-9)

    @given(st.floats(0, 1))
    def test_fractions_are_their_own_coordinate(self, value):
        assert float(SHARE.free(number(value))) == value

    @given(st.floats(-30, 30))
    def test_every_coordinate_of_a_rate_or_decay_is_legal(self, free):
        RATE.check("lr", RATE.value(number(free)))
        KEPT.check("beta", KEPT.value(number(free)))

    def test_a_factor_is_a_step_of_the_same_length_anywhere(self):
        steps = [float(RATE.free(number(2 * x)) - RATE.free(number(x))) for x in (1e-5, 1e-2)]
        assert steps == pytest.approx([math.log(2)] * 2)

    @KINDS
    def test_the_box_is_the_search_range(self, hyper):
        low, high = (float(hyper.value(number(edge))) for edge in hyper.box())
        assert (low, high) == pytest.approx(hyper.search, rel=1e-9)
        assert low < high

    @KINDS
    def test_the_default_is_legal_and_inside_the_search_range(self, hyper):
        hyper.check("it", hyper.default)
        assert hyper.search[0] <= hyper.default <= hyper.search[1]


class TestCheck:
    @pytest.mark.parametrize(
        ("hyper", "value", "message"),
        [
            (RATE, -0.1, r"x=-0.1 is outside \[0, inf\); its default is 0.001"),
            (RATE, math.nan, r"x=nan is outside \[0, inf\)"),
            (RATE, math.inf, r"x=inf is outside \[0, inf\)"),
            (KEPT, 1.0, r"x=1 is outside \[0, 1\); its default is 0.9"),
            (KEPT, -0.5, r"x=-0.5 is outside \[0, 1\)"),
            (SHARE, 1.5, r"x=1.5 is outside \[0, 1\]; its default is 0.3"),
            (RATE, torch.tensor([1.0, -2.0, 3.0]), "x=-2 is outside"),
        ],
    )
    def test_illegal_values(self, hyper, value, message):
        with pytest.raises(ValueError, match=message):
            hyper.check("x", value)

    @pytest.mark.parametrize(
        ("hyper", "value"), [(RATE, 0), (KEPT, 0.0), (SHARE, 1.0), (SHARE, 0.0), (RATE, 1e9)]
    )
    def test_edges_are_legal(self, hyper, value):
        hyper.check("x", value)

    def test_options(self):
        Choice(False, (False, True)).check("nesterov", True)
        with pytest.raises(ValueError, match="nesterov=3 is not one of False, True"):
            Choice(False, (False, True)).check("nesterov", 3)

    @pytest.mark.parametrize("option", [math.tanh, (1, 2), torch.tensor(1.0)], ids=repr)
    def test_options_are_plain(self, option):
        with pytest.raises(
            TypeError, match=r"which a saved run cannot hold.*give its name instead"
        ):
            Choice(None, (None, True, 3, 0.5, "a", option))
        with pytest.raises(TypeError, match="None, bool, int, float or str"):
            Choice(option, (1, 2))

    def test_whole_numbers(self):
        Integer(3, 1, 5).check("steps", 5)
        for value in (0, 6, 2.0, True, "3"):
            with pytest.raises(ValueError, match=r"is not a whole number in \[1, 5\]"):
                Integer(3, 1, 5).check("steps", value)


class TestStart:
    def test_a_value_without_a_coordinate_cannot_start(self):
        message = r"lr=0 has no place on its log scale.*start inside \[1e-05, 1\] or leave lr out"
        with pytest.raises(ValueError, match=message):
            RATE.check_start("lr", number([0.1, 0.0]))
        RATE.check_start("lr", number(0.1))
        SHARE.check_start("share", number(0.0))

    def test_a_default_of_zero_starts_elsewhere(self):
        assert weight_decay(0.0).starting_value(number(6.0)) == 1e-4
        assert weight_decay(0.1).starting_value(number(6.0)) == 0.1
        assert decay(0.0, start=0.5).starting_value(number(6.0)) == 0.5

    @pytest.mark.parametrize("shape", [(), (2,), (4, 2)])
    def test_has_the_shape_of_the_hyperparameter(self, shape):
        sizes = number([6.0, 24.0]) if shape else number(6.0)
        start = RATE.shaped(*shape).starting_value(sizes)
        assert torch.equal(start, torch.full(shape, 1e-3, dtype=torch.float64))

    def test_follows_the_size_of_the_tensor(self):
        alpha = positive(2.0, search=(0.1, 1e4), size_power=0.5)
        per_tensor = alpha.shaped(2).starting_value(number([4.0, 100.0]))
        torch.testing.assert_close(per_tensor, number([4.0, 20.0]))
        assert alpha.starting_value(number(100.0)) == 20

    def test_is_a_tensor_of_its_own(self):
        start = RATE.shaped(3).starting_value(number(1.0))
        start[0] += 1  # An expanded number would change in all three places.
        assert torch.equal(start, number([1.001, 0.001, 0.001]))
