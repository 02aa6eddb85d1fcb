"""The log: rows of plain values, the best so far, and the way back from the folder."""

import json
import math

import pytest
import torch

from hyperdescent.meta.meta_optimizer import Descent
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.search.budget import Clock
from hyperdescent.search.run_folder import RunFolder
from hyperdescent.search.run_log import Log
from hyperdescent.search.space import Point


def point(lr, **discrete):
    return Point({"lr": torch.tensor(lr), "knots": torch.tensor([lr, 2 * lr])}, discrete)


@pytest.fixture
def filled():
    log = Log(Clock(10.0))
    for loss, lr in ((3.0, 0.1), (math.inf, 0.2), (1.0, 0.3), (math.nan, 0.4), (2.0, 0.5)):
        log.note("gradient", loss, point(lr, width=4), outcome="ok")
    return log


def test_best_points_come_first_and_failures_never(filled):
    assert filled.best_loss == 1
    assert [p.smooth["lr"].item() for p in filled.best(9)] == pytest.approx([0.3, 0.5, 0.1])
    assert len(filled.best(2)) == 2


def test_rows_are_json(filled):
    assert len(filled.rows) == 5
    assert [row["loss"] for row in filled.rows] == [3, None, 1, None, 2]
    text = json.dumps(filled.rows, allow_nan=False)
    assert json.loads(text) == filled.rows
    assert filled.rows[0]["options"] == {"width": 4}
    assert filled.rows[0]["outcome"] == "ok"


def test_an_empty_log_has_no_best():
    log = Log(Clock(1.0))
    assert (log.best_loss, log.best()) == (math.inf, [])


def test_watchers_see_every_evaluation():
    seen = []
    log = Log(Clock(10.0), watch=seen.append)
    for loss in (2.0, math.inf, 1.0):
        log.note("search", loss, point(0.1))
    assert [event.loss for event in seen] == [2, math.inf, 1]
    assert [event.best for event in seen] == [2, 2, 1]
    assert [event.progress for event in seen] == sorted(event.progress for event in seen)


def test_the_folder_brings_everything_back(tmp_path, filled):
    filled.folder = RunFolder(tmp_path)
    z = torch.randn(3, dtype=torch.float64)
    filled.descent = Descent(
        z,
        {"m": z + 1},
        anchor=z + 2,
        failures=3,
        scale=0.25,
        carry=object(),
        outcome=Outcome.NOISY,
        reason="why",
    )
    filled.save()
    back = Log(Clock(20.0), RunFolder(tmp_path))
    back.resume()
    assert back.rows == filled.rows
    assert back.best_loss == 1
    assert [loss for loss, _ in back.found] == [3, 1, 2]
    torch.testing.assert_close(back.best()[0].smooth, filled.best()[0].smooth, check_dtype=False)
    assert back.best()[0].discrete == {"width": 4}
    assert filled.rows[-1]["seconds"] <= back.clock.spent
    assert back.clock.budget == 20
    assert back.descent.outcome is Outcome.NOISY
    assert (back.descent.failures, back.descent.scale, back.descent.reason) == (3, 0.25, "why")
    assert back.descent.carry is None
    torch.testing.assert_close(back.descent.z, z, rtol=0, atol=0)
    torch.testing.assert_close(back.descent.anchor, z + 2, rtol=0, atol=0)
    torch.testing.assert_close(back.descent.slots["m"], z + 1, rtol=0, atol=0)


def test_a_new_folder_changes_nothing(tmp_path):
    log = Log(Clock(1.0), RunFolder(tmp_path))
    log.resume()
    assert (log.rows, log.found, log.descent) == ([], [], None)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch, filled):
    monkeypatch.chdir(tmp_path)
    filled.save()
    filled.resume()
    assert list(tmp_path.iterdir()) == []


def test_the_first_evaluation_is_on_disk_at_once(tmp_path):
    log = Log(Clock(10.0), RunFolder(tmp_path))
    log.note("search", 1.0, point(0.1))
    assert len(RunFolder(tmp_path).load_state()["rows"]) == 1
