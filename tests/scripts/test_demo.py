"""The demonstration in a few seconds instead of two minutes, through Ray and all."""

import json

import matplotlib.image
import pytest

from hyperdescent.scripts.demo import FRESH_SEEDS, run_demo


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    run_demo(folder, "2s", seed=0, address=None)
    return folder


def test_result_holds_what_is_needed_to_repeat_it(out):
    result = json.loads((out / "result.json").read_text())
    assert set(result["tuners"]) == {"hyperdescent", "tpe"}
    for name, route in (("hyperdescent", "gradient"), ("tpe", "search")):
        tuner = result["tuners"][name]
        assert tuner["route"] == route and tuner["reason"]
        assert tuner["settings"]["budget"] == 2.0
        assert len(tuner["hypers"]["lr.knots"]) == 16
        assert tuner["provenance"]["torch"]
    assert result["study"]["seeds"] == list(FRESH_SEEDS)


def test_every_arm_is_trained_on_every_fresh_seed_and_tested(out):
    rows = json.loads((out / "result.json").read_text())["summary"]
    assert [row["arm"] for row in rows] == ["default", "hyperdescent", "tpe"]
    for row in rows:
        assert row["cells"] == len(FRESH_SEEDS)
        assert {"valid loss", "valid accuracy", "test loss", "test accuracy"} <= set(
            row["measures"]
        )
    lines = (out / "records.jsonl").read_text().splitlines()
    assert len(lines) == 3 * len(FRESH_SEEDS)


def test_the_picture_shows_something(out):
    pixels = matplotlib.image.imread(out / "schedule.png")
    assert pixels.shape[1] > 1000
    assert pixels[..., :3].std() > 0.01


def test_a_second_call_keeps_what_is_there(out, capsys):
    before = (out / "records.jsonl").read_text()
    run_demo(out, "2s", seed=0, address=None)
    assert (out / "records.jsonl").read_text() == before
    assert "hyperdescent" in capsys.readouterr().out
