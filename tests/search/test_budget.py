"""Budgets as people write them, and the clock that counts earlier sessions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperdescent.search import budget
from hyperdescent.search.budget import Clock, seconds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("60s", 60),
        ("60", 60),
        ("5m", 300),
        ("5min", 300),
        ("1.5h", 5400),
        ("2d", 172800),
        (" 10 s ", 10),
        (".5s", 0.5),
        (3, 3),
        (0.25, 0.25),
    ],
)
def test_times(text, expected):
    assert seconds(text) == expected
    assert isinstance(seconds(text), float)


@given(st.floats(1e-3, 1e6))
def test_a_number_of_seconds_is_itself_with_and_without_its_unit(number):
    assert seconds(number) == number
    assert seconds(f"{number:.3f}s") == pytest.approx(number, abs=1e-3)


@pytest.mark.parametrize("text", ["", "soon", "5 weeks", "1h30m", "-5s", "s", "1.2.3s", ".", "5S"])
def test_what_is_not_a_time_is_quoted_with_an_example(text):
    with pytest.raises(ValueError, match=r"60s, 5m or 1\.5h") as told:
        seconds(text)
    assert repr(text) in str(told.value)


@pytest.mark.parametrize("number", [0, -1, float("inf"), float("nan"), "0s"])
def test_what_is_not_positive_is_refused(number):
    with pytest.raises(ValueError, match="is not a positive time"):
        seconds(number)


def test_the_clock_counts_earlier_sessions(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: now[0])
    clock = Clock(10.0, spent=3.0)
    assert (clock.spent, clock.left, clock.progress) == (3, 7, 0.3)
    now[0] += 9
    assert (clock.spent, clock.left, clock.progress) == (12, -2, 1.2)
