"""The demonstration in a few seconds instead of two minutes, through Ray and all."""

import io
import json
import shutil
from contextlib import redirect_stdout

import matplotlib.image
import pytest

from hyperdescent.scripts import demo
from hyperdescent.scripts.demo import FRESH_SEEDS, run_demo
from hyperdescent.studies.engine.record import Records, read


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, what it printed) of a demonstration that ended well."""
    folder = tmp_path_factory.mktemp("demo")
    with redirect_stdout(io.StringIO()) as told, pytest.MonkeyPatch.context() as patch:
        # On a busy machine two seconds are refused as too few; here they need not find anything.
        patch.setattr("hyperdescent.search.tune.check_budget", lambda *given: None)
        assert run_demo(folder, "2s", seed=0, address=None) == 0
    return folder, told.getvalue()


@pytest.fixture
def out(run):
    return run[0]


@pytest.mark.sampled(0)
def test_without_a_terminal_there_are_some_lines_and_a_table_of_losses(run):
    told = run[1]
    assert sum(" of 15: " in line for line in told.splitlines()) == 3
    assert "15 of 15: " in told and ", seed 100" in told
    table = told[told.index("mean ±") : told.index(" s in all")]
    for measure in ("valid loss", "valid accuracy", "test loss", "test accuracy"):
        assert all(word in table for word in measure.split())
    assert "seconds" not in table


def test_interrupted_cells_leave_no_result_and_say_how_to_go_on(out, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "demo"
    shutil.copytree(out, folder)
    for name in ("result.json", "schedule.png"):
        (folder / name).unlink()
    some = Records("demo", tuple(read(folder / "records.jsonl")[:4]), missing=11)
    monkeypatch.setattr(demo, "run_study", lambda *given, **named: some)
    assert run_demo(folder, "2s", seed=0, address=None) == 130
    told = capsys.readouterr().out
    assert "11 more cells have not run" in told and "the same command goes on" in told
    assert not (folder / "result.json").exists() and not (folder / "schedule.png").exists()


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
