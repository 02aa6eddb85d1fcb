"""Tuning in one training from random starts: what is drawn, each method, and the study by name."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hyperdescent.meta.hypergradient import train
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.scripts.show import show_study
from hyperdescent.studies.engine.record import Record, read
from hyperdescent.studies.library import one_pass
from hyperdescent.studies.library.one_pass import (
    METHODS,
    SETTING,
    OnePassCell,
    start_of,
    train_from_start,
)
from hyperdescent.studies.problems import load_problem

SMALL = replace(SETTING, steps=100)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(one_pass, "SETTING", SMALL)
    monkeypatch.setattr(one_pass, "STARTS", 1)
    monkeypatch.setattr(one_pass, "PROBLEMS", ("diabetes-mlp",))


def test_starts_are_uniform_in_the_logarithm_and_a_function_of_their_seed():
    starts = [start_of(seed) for seed in range(300)]
    for name in ("lr", "weight_decay"):
        low, high = map(math.log, getattr(SETTING, name))
        shares = torch.tensor([(math.log(s[name]) - low) / (high - low) for s in starts])
        assert bool(((shares >= 0) & (shares <= 1)).all())
        assert float(shares.mean()) == pytest.approx(0.5, abs=0.05)
        assert float(shares.std()) == pytest.approx(12**-0.5, abs=0.03)
    assert start_of(3) == starts[3] != starts[4]


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_from_the_start(small, method):
    record = train_from_start(OnePassCell("diabetes-mlp", method, 0))
    assert record.outcome is Outcome.OK and set(record.measures) >= {"valid", "test"}
    assert Record.from_line(record.line()) == record
    problem, start = load_problem("diabetes-mlp"), start_of(0)
    plain = train(problem, "adamw", steps=SMALL.steps, values=start, seed=0)
    loss = plain.measures["valid"]["loss"]
    if method == "random":
        assert record.measures["valid"]["loss"] == loss
    elif method.startswith("Optuna"):
        assert record.measures["valid"]["loss"] <= loss
    else:
        assert record.measures["valid"]["loss"] != loss


def test_optuna_ends_with_the_best_of_its_trainings(small, monkeypatch):
    ended = []

    def train_and_tell(problem, start, seed):
        ended.append(as_it_is(problem, start, seed))
        return ended[-1]

    as_it_is = one_pass._as_it_is
    monkeypatch.setattr(one_pass, "_as_it_is", train_and_tell)
    losses = []
    for start in range(3):
        record = train_from_start(OnePassCell("diabetes-mlp", "Optuna, 3 trainings", start))
        three, ended = [t.measures["valid"]["loss"] for t in ended], []
        assert len(three) == 3 and record.measures["valid"]["loss"] == min(three)
        losses.append(three.index(min(three)))
    assert any(losses)


def test_a_rate_that_is_far_too_low_is_raised(small, monkeypatch):
    monkeypatch.setattr(one_pass, "SETTING", replace(SETTING, steps=500))
    monkeypatch.setattr(one_pass, "start_of", lambda seed: {"lr": 1e-5, "weight_decay": 1e-3})
    loss = {
        method: train_from_start(OnePassCell("diabetes-mlp", method, 0)).measures["valid"]["loss"]
        for method in ("random", "one-pass")
    }
    assert loss["one-pass"] < 0.9 * loss["random"]


def test_divergence_is_an_outcome(small, monkeypatch):
    monkeypatch.setattr(one_pass, "start_of", lambda seed: {"lr": 1e38, "weight_decay": 1.0})
    record = train_from_start(OnePassCell("diabetes-mlp", "random", 0))
    assert record.outcome is Outcome.DIVERGED and record.measures == {}


def test_the_study_by_name(small, monkeypatch, tmp_path, capsys):
    few = {name: METHODS[name] for name in ("random", "one-pass")}
    monkeypatch.setattr(one_pass, "METHODS", few)
    assert show_study(Path(one_pass.NAME), tmp_path, None, True) == 0
    told = capsys.readouterr().out
    assert "median" in told and "one-pass" in told
    assert len(read(tmp_path / "records.jsonl")) == 2
