"""Progress goes to whoever asked for it, and never to a result's stdout."""

import math

from hyperdescent.search.progress import watching
from hyperdescent.search.run_log import Event

EVENTS = [Event("gradient", 2.0, 2.0, 0.1), Event("search", math.inf, 1.0, 0.9)]


def test_a_callable_sees_the_events():
    seen = []
    with watching(seen.append) as watch:
        for event in EVENTS:
            watch(event)
    assert seen == EVENTS


def test_false_is_silent(capsys):
    with watching(False) as watch:
        for event in EVENTS:
            watch(event)
    assert capsys.readouterr() == ("", "")


def test_true_never_writes_to_stdout(capsys):
    with watching(True) as watch:
        for event in EVENTS:
            watch(event)
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with watching(True) as watch:
        for event in EVENTS:
            watch(event)
    told = capsys.readouterr()
    assert told.out == ""
    assert "evaluations" in told.err
