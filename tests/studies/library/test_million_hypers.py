"""A hyper per weight: the study at a size for tests, and its problem against what it says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from hyperdescent.meta.problems.problem import loss_at
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.scripts.show import show_study
from hyperdescent.studies.engine.record import Record, read
from hyperdescent.studies.library import million_hypers as million
from hyperdescent.studies.library.million_hypers import (
    GRID,
    METHODS,
    PLAIN,
    SETTING,
    MillionCell,
    learn_penalties,
    million_problem,
)

SMALL = replace(SETTING, width=16, steps=120, lr=0.01, grid=4, rounds=1, round=20)
WEIGHTS = 64 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(million, "SETTING", SMALL)
    monkeypatch.setattr(million, "SEEDS", 1)
    # It is for the whole process, and other tests are in this one.
    monkeypatch.setattr(million, "return_freed_blocks", lambda: None)


def test_there_are_a_million_of_them():
    problem = million_problem(SETTING, 0)
    params, _ = problem.start(0)
    weights = sum(p.numel() for p in params.values())
    hyper = problem.hypers["l2"]
    assert weights >= 1_000_000 and hyper.shape == (weights,) and hyper.dtype == torch.float32


def test_the_penalty_is_half_the_weighted_square_of_every_weight():
    problem = million_problem(SMALL, 0)
    params, buffers = problem.start(0)
    l2 = torch.rand(WEIGHTS, generator=torch.Generator().manual_seed(0))
    loss, _ = loss_at(problem, params, buffers, {"l2": l2}, 0, 0)
    plain, _ = loss_at(problem, params, buffers, {"l2": 0 * l2}, 0, 0)
    flat = torch.cat([p.flatten() for p in params.values()])
    assert float(loss - plain) == pytest.approx(float((l2 * flat**2).sum() / 2), rel=1e-4)
    inputs, target = problem.batch(0, 0)
    model = problem.make_model()
    model.load_state_dict(params)
    assert float(plain) == pytest.approx(float(F.cross_entropy(model(inputs), target).detach()))


def test_plain_training_is_the_same_by_torch_and_here(small):
    problem = million_problem(SMALL, 0)
    ours = million.train(
        problem, "adam", steps=30, values={"lr": SMALL.lr, "l2": torch.zeros(WEIGHTS)}
    )
    theirs = million._by_torch(problem, 30)
    assert ours.measures["test"]["loss"] == pytest.approx(theirs.measures["test"]["loss"], rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_their_own_fit_the_held_out_data_better_than_one(small, method):
    record, single = (learn_penalties(MillionCell(name, 0)) for name in (method, GRID))
    assert record.outcome is single.outcome is Outcome.OK
    assert record.measures["valid"]["loss"] < single.measures["valid"]["loss"]
    assert record.measures["step"]["cost"] > 1 and record.seconds > 0
    memory = record.measures["memory"]
    assert memory["times"] == pytest.approx(memory["MiB"] * 2**20 / (12 * WEIGHTS))
    assert Record.from_line(record.line()) == record


def test_divergence_is_an_outcome(small, monkeypatch):
    monkeypatch.setattr(million, "SETTING", replace(SMALL, lr=1e38, rounds=0))
    monkeypatch.setattr(million, "_step_cost", lambda problem, go: 1.0)
    record = learn_penalties(MillionCell(next(iter(METHODS)), 0))
    assert record.outcome is Outcome.DIVERGED and record.measures == {}


def test_the_study_by_name(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(million, "METHODS", {})
    assert show_study(Path(million.NAME), tmp_path, None, True) == 0
    told = capsys.readouterr().out
    for part in (PLAIN, GRID, "memory", "accuracy"):
        assert part in told
    assert len(read(tmp_path / "records.jsonl")) == 2
