"""Data cleaning: what is drawn, what is learned, and the study as a user runs it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hyperdescent.inner.registry import find_rule
from hyperdescent.meta.bilevel.bamm import BAMM
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training
from hyperdescent.scripts.show import show_study
from hyperdescent.studies.engine.record import Record, read
from hyperdescent.studies.library import data_cleaning as cleaning
from hyperdescent.studies.library.data_cleaning import (
    BASELINES,
    METHODS,
    SETTINGS,
    CleaningCell,
    clean,
    cleaning_cells,
)

SMALL = replace(SETTINGS["digits"], train=120, valid=200, steps=40, moves=40, rate=0.3)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(cleaning, "SETTINGS", {"digits": SMALL})
    monkeypatch.setattr(cleaning, "SEEDS", 1)


class TestData:
    def test_half_of_the_labels_are_changed_and_all_of_these_to_another(self):
        data = cleaning._draw("digits", 0)
        x, y = SETTINGS["digits"].load()
        assert int(data.wrong.sum()) == 250 and len(data.test[1]) == 797
        true = {tuple(image.tolist()): int(label) for image, label in zip(x, y, strict=True)}
        told = [true[tuple(image.tolist())] for image in data.train[0]]
        assert torch.equal(torch.tensor(told) != data.train[1], data.wrong)

    def test_no_example_is_in_two_parts(self):
        data = cleaning._draw("digits", 3)
        parts = [{tuple(x.tolist()) for x in p[0]} for p in (data.train, data.valid, data.test)]
        assert sum(map(len, parts)) == len(set().union(*parts))

    def test_a_draw_is_a_function_of_its_seed(self):
        one, again, other = (cleaning._draw("digits", seed) for seed in (0, 0, 1))
        assert torch.equal(one.train[1], again.train[1])
        assert not torch.equal(one.train[1], other.train[1])


def test_a_weight_that_is_never_drawn_has_no_gradient_and_equal_examples_equal_ones():
    """U16 of the specification, through the study's own problem."""
    data = cleaning._draw("digits", 0)
    x, y = (part[:20].clone() for part in data.train)
    x[1], y[1] = x[0], y[0]
    problem = cleaning.cleaning_problem((x.double(), y), (data.valid[0].double(), data.valid[1]))
    problem = replace(problem, make_model=lambda: cleaning._Softmax(64).double(), batch_size=20)
    run = Training(problem, find_rule("sgd"), 10, values={"lr": 1.0})
    estimate, _ = Replay()(run, run.start(["weight"]), seed=0)
    assert float(estimate.grad["weight"][0]) == float(estimate.grad["weight"][1]) != 0
    once = Training(replace(problem, batch_size=5), find_rule("sgd"), 1, values={"lr": 1.0})
    estimate, _ = Replay()(once, once.start(["weight"]), seed=0)
    assert int((estimate.grad["weight"] == 0).sum()) == 15


class TestCells:
    def test_every_method_and_every_baseline_of_every_data_there_is(self, monkeypatch):
        monkeypatch.delenv("HYPERDESCENT_DATA", raising=False)
        cells, left_out = cleaning_cells()
        assert len(cells) == 3 * (len(METHODS) + len(BASELINES))
        (told,) = left_out
        assert told.startswith("mnist-t10k is left out: mnist-t10k-images-idx3-ubyte.gz is needed")

    def test_the_oracle_is_better_than_the_noise(self, small):
        found = {
            name: clean(CleaningCell("digits", name, 0)).measures["test"]["accuracy"]
            for name in BASELINES
        }
        assert found["oracle + validation"] > found["noisy only"] + 5
        assert found["validation only"] > found["noisy only"]

    @pytest.mark.parametrize("method", METHODS)
    def test_each_method_tells_wrong_labels_better_than_chance(self, small, method):
        record = clean(CleaningCell("digits", method, 0))
        assert record.outcome is Outcome.OK and record.seconds > 0
        labels = record.measures["labels"]
        # Half are wrong: calling all of them so has F1 2/3.
        assert labels["F1"] > 0.75 and labels["precision"] > 0.75
        assert Record.from_line(record.line()) == record

    def test_measures_are_what_they_are_called(self, small):
        data = cleaning._draw("digits", 0)
        z = torch.where(data.wrong, -1.0, 1.0).double()
        judged = cleaning._judged(SMALL, data, z)
        assert judged["labels"] == {"precision": 1, "recall": 1, "F1": 1}
        expected = clean(CleaningCell("digits", "oracle + validation", 0)).measures["test"]
        assert judged["test"]["accuracy"] == expected["accuracy"]
        assert cleaning._judged(SMALL, data, -z)["labels"]["F1"] == 0
        assert cleaning._judged(SMALL, data, 0 * z + 1)["labels"]["F1"] == 0
        all_called = cleaning._judged(SMALL, data, 0 * z - 1)["labels"]
        assert all_called["recall"] == 1 and all_called["precision"] == 0.5

    def test_a_method_that_diverges_is_an_outcome(self, small, monkeypatch):
        monkeypatch.setattr(cleaning, "SETTINGS", {"digits": replace(SMALL, lr=1e38)})
        record = clean(CleaningCell("digits", "K=1", 0))
        assert record.outcome is Outcome.DIVERGED and record.measures == {}


def test_the_study_by_name(small, monkeypatch, tmp_path, capsys):
    few = {name: METHODS[name] for name in ("K=1", "BAMM")}
    monkeypatch.setattr(cleaning, "METHODS", few)
    arguments = cleaning.NAME, tmp_path, None, True

    assert show_study(Path(arguments[0]), *arguments[1:]) == 0
    told = capsys.readouterr().out
    for part in ("validation only", "oracle", "labels F1", "test weighted", "BAMM on digits"):
        assert part in told
    count = len(read(tmp_path / "records.jsonl"))
    assert count == len(few) + len(BASELINES)
    assert show_study(Path(arguments[0]), *arguments[1:]) == 0
    assert len(read(tmp_path / "records.jsonl")) == count


def test_a_folder_of_its_name_is_not_taken_for_a_file(small, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path(cleaning.NAME).mkdir()
    monkeypatch.setattr(cleaning, "METHODS", {})
    assert show_study(Path(cleaning.NAME), Path(cleaning.NAME), None, True) == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_key_is_the_same_in_every_process(method):
    assert " at 0x" not in str(CleaningCell("digits", method, 0).inputs)


def test_what_decides_the_numbers_is_in_the_key(monkeypatch):
    one = Record("s", CleaningCell("digits", "BAMM", 0).inputs, None).key
    monkeypatch.setattr(cleaning, "SETTINGS", {"digits": replace(SMALL, moves=7)})
    two = Record("s", CleaningCell("digits", "BAMM", 0).inputs, None).key
    monkeypatch.setitem(METHODS, "BAMM", replace(METHODS["BAMM"], make=lambda: BAMM(rate=0.3)))
    three = Record("s", CleaningCell("digits", "BAMM", 0).inputs, None).key
    assert len({one, two, three}) == 3


def test_an_unknown_name_is_told(tmp_path):
    with pytest.raises(ValueError, match="neither a file nor a study 'data-cleanin'; did you mean"):
        show_study(Path("data-cleanin"), tmp_path, None, True)
