"""The benchmark of the drop-in optimizers: both sides do the same step, what is left out is said,
and what is measured is written. Nothing is timed against a bound.
"""

import sys
import time

import pytest
import torch

from hyperdescent.inner.torch_form.compiled import compiled_step
from hyperdescent.scripts import command
from hyperdescent.scripts.bench import run_optimizers
from hyperdescent.studies.benchmarks import optimizers as optimizers_bench
from hyperdescent.studies.benchmarks import optimizers_report
from hyperdescent.studies.benchmarks.optimizers import (
    MODELS,
    RIVALS,
    Model,
    Rival,
    Row,
    Steps,
    bench_optimizers,
    find_models,
    find_rivals,
    memory_of,
    steps_of,
)
from hyperdescent.studies.measure.device import CPU
from hyperdescent.studies.measure.timing import Grown, run_isolated

TINY = Model("tiny", "three tensors", ((4, 3), (5,), (2, 3, 2, 2)))
NOT_COMPILED = (
    "UserWarning: a step of {} with compile=True is not compiled: TORCH_COMPILE_DISABLE=1 is set"
)
# Theirs is another form of the rule, as its docstring says; in a benchmark that does not matter.
APART = {"ademamix", "ano", "grams", "muon", "scion", "shampoo", "prodigy", "schedulefreeadamw"}


@pytest.fixture
def quick(monkeypatch):
    """No process of its own for memory, one step per round, and nothing that is compiled."""
    monkeypatch.setattr(optimizers_bench, "run_isolated", lambda measure, *given, limit: Grown(1.5))
    monkeypatch.setattr(optimizers_bench, "steps_of", lambda seconds: 1)
    monkeypatch.setitem(MODELS, "tiny", TINY)


def test_the_models_are_what_they_say():
    assert 11e6 < MODELS["12m"].numel < 13e6
    assert len(MODELS["small"].shapes) == 2000
    first, second = (TINY.parameters(CPU) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(p.grad is not None and p.grad.any() for p in first)


@pytest.mark.parametrize("name", [name for name in find_rivals(()) if name not in APART])
def test_ours_takes_the_steps_of_its_rival(name):
    rival, _ = RIVALS[name]
    ends = []
    for make in (lambda params: optimizers_bench._ours(name, params), rival.make):
        params = TINY.parameters(CPU)
        optimizer = make(params)
        for _ in range(3):
            optimizer.step()
        ends.append(params)
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_row_has_a_time_per_round_of_each_side(quick):
    told = []
    (row,) = bench_optimizers([TINY], ["adam"], repeats=2, say=told.append)
    assert (row.model, row.rule, row.rival) == ("tiny", "adam", "torch.optim.Adam")
    assert {side: len(each) for side, each in row.seconds.items()} == dict.fromkeys(
        ("ours", "theirs", "fused"), 2
    )
    assert row.left_out == {"compiled": NOT_COMPILED.format("Adam")}
    sides = zip(row.seconds["ours"], row.seconds["fused"], strict=True)
    assert row.ratios("ours", "fused") == [a / b for a, b in sides]
    assert row.ratios("compiled", "fused") == []
    kinds = ("ours", "compiled", "theirs", "fused")
    assert told[:4] == [f"tiny, adam: memory, {side}" for side in kinds]
    assert told[4] == "tiny, adam: time, round 0 of 2, ours"
    assert told[-1] == "tiny, adam: time, round 2 of 2, fused"


def test_what_can_be_compiled_is_a_side_of_its_own(quick, monkeypatch):
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    monkeypatch.setattr(torch, "compile", lambda graph, **options: graph)
    compiled_step.cache_clear()
    (row,) = bench_optimizers([TINY], ["lion"], repeats=1)
    compiled_step.cache_clear()
    assert len(row.ratios("compiled", "theirs")) == 1 and row.first > 0 and not row.left_out


def test_a_round_has_as_many_steps_as_fill_it():
    assert [steps_of(s) for s in (0.0, 1e-4, 0.01, 0.05, 0.3, 60.0)] == [100, 100, 25, 5, 1, 1]


def test_the_first_round_is_for_finding_that_out(monkeypatch):
    monkeypatch.setattr(optimizers_bench, "steps_of", lambda seconds: 3)
    taken = []

    class Counts:
        def step(self):
            taken.append(1)

    a_round = Steps(Counts(), CPU)
    counts = [(a_round(), len(taken))[1] for _ in range(3)]
    assert (counts, a_round.count) == ([2, 5, 8], 3)


def test_memory_is_of_fewer_steps_where_they_are_slow(monkeypatch):
    taken = []

    class Counts:
        def step(self):
            taken.append(1)

    optimizers_bench._several(Counts())
    assert len(taken) == 8  # RAdam's waiting for its averages ends with the sixth.
    monkeypatch.setattr(optimizers_bench, "_PATIENCE", 0.0)
    optimizers_bench._several(Counts())
    assert len(taken) == 8 + 2


def test_what_takes_too_long_is_ended():
    begun = time.perf_counter()
    grown = run_isolated(_sleeps, limit=1.0)
    assert time.perf_counter() - begun < 60.0
    assert (grown.mib, grown.left_out) == (None, "its process was ended after 1 s")


def _sleeps():
    time.sleep(600)


class Breaks(torch.optim.SGD):
    """A form that cannot make its second step."""

    def step(self):
        if self.state[None]:
            raise RuntimeError("no second step\nin more lines")
        self.state[None] = 1


def test_what_fails_is_left_out_and_the_rest_is_measured(quick, monkeypatch):
    monkeypatch.setattr(torch.optim, "Adam", lambda params, **given: Breaks(params))
    adam, sgd = bench_optimizers([TINY], ["adam", "sgd"], repeats=1)
    failed = "RuntimeError: no second step"
    assert adam.left_out == {
        "compiled": NOT_COMPILED.format("Adam"), "theirs": failed, "fused": failed
    }  # fmt: skip
    assert [*adam.seconds] == ["ours"] and len(sgd.ratios("ours", "theirs")) == 1
    text = optimizers_report.section([adam, sgd], "the command")
    assert f"- adam, torch.optim.Adam, left out: {failed}" in text
    assert f"- adam, torch.optim.Adam, fused, left out: {failed}" in text
    assert f"theirs left out: {failed}" in optimizers_report.line(adam)


def test_what_has_no_memory_to_tell_of_is_left_out(quick, monkeypatch):
    ended = Grown(None, left_out="its process was ended after 300 s")
    monkeypatch.setattr(optimizers_bench, "run_isolated", lambda measure, *given, limit: ended)
    (row,) = bench_optimizers([TINY], ["lion"], repeats=1)
    assert row.left_out == dict.fromkeys(("ours", "compiled", "theirs"), ended.left_out)
    assert not row.seconds


def test_muon_has_its_matrices_apart():
    matrices, rest = RIVALS["muon"][0].make(TINY.parameters(CPU)).param_groups
    assert [p.ndim for p in matrices["params"]] == [2, 4] and matrices["use_muon"]
    assert [p.ndim for p in rest["params"]] == [1] and not rest["use_muon"]


@pytest.mark.parametrize("name", find_rivals(()))
def test_every_rival_steps(name):
    params = TINY.parameters(CPU)
    begun = [p.clone() for p in params]
    optimizer = RIVALS[name][0].make(params)
    for _ in range(2):
        optimizer.step()
    assert not any(map(torch.equal, params, begun))


def test_memory_is_of_the_state(monkeypatch):
    large = Model("large", "", ((2**21,),))  # 8 MiB, and Adam's two slots are 16
    for who in ("ours", "theirs"):
        assert 12 < memory_of(large, "adam", who, CPU).mib < 60


def test_what_is_not_installed_is_left_out_and_said(quick, monkeypatch):
    monkeypatch.setitem(RIVALS, "adam", (Rival("no_such_package", "Adam"), {}))
    (row,) = bench_optimizers([TINY], ["adam"], repeats=1)
    assert row.left_out["theirs"] == "no_such_package is not here" and [*row.seconds] == ["ours"]
    text = optimizers_report.section([row], "the command")
    assert "- adam, no_such_package.Adam, left out: no_such_package is not here" in text


def test_names_that_do_not_exist_are_answered():
    with pytest.raises(ValueError, match="there is no rule with a rival 'adamm'; did you mean"):
        find_rivals(["adamm"])
    with pytest.raises(ValueError, match="there is no model '12'; did you mean '12m'"):
        find_models(["12"])
    with pytest.raises(ValueError, match="repeats=0 measures nothing"):
        next(bench_optimizers([TINY], ["adam"], repeats=0))


def test_a_table_shows_what_was_measured(quick):
    row = Row(
        *("tiny", "adam", "element", "torch.optim.Adam"),
        seconds={
            "ours": [0.002, 0.003, 0.001],
            "compiled": [0.001, 0.001, 0.001],
            "theirs": [0.004, 0.004, 0.004],
            "fused": [0.001, 0.002, 0.001],
        },
        grown={"ours": Grown(9.54), "compiled": Grown(8.0), "theirs": Grown(13.0)},
        first=3.21,
    )
    text = optimizers_report.section([row], "the command")
    assert (
        "| adam | element | torch.optim.Adam | 2.00 | 0.500 (0.250-0.750) | 1.50 (1.00-2.00)"
        in text
    )
    assert "| 1.00 | 0.250 (0.250-0.250) | 1.00 (0.50-1.00) | 3.2 | 9.5 | 8.0 | 13 |" in text
    assert "Medians (lowest-highest) of 3 rounds." in text and "`the command`" in text
    assert f"three tensors, {4 * 3 + 5 + 24} weights" in text


def test_the_command_keeps_a_section_per_model(quick, monkeypatch, capsys, tmp_path):
    file = tmp_path / "B.md"
    said = ["hyperdescent", "bench", "optimizers", "--model", "tiny", "--only", "sgd,lion"]
    monkeypatch.setattr(sys, "argv", [*said, "--repeats", "1", "--out", str(file)])
    try:
        command.main()
    except SystemExit as done:
        assert not done.code
    text = file.read_text()
    assert text.count("## A step of the drop-in optimizers") == 1
    assert "| sgd |" in text and "| lion |" in text
    assert "bench optimizers --model tiny --only sgd,lion --repeats 1 --threads 1" in text
    assert "kept in" in capsys.readouterr().out


def test_an_interrupt_loses_nothing_that_was_measured(quick, monkeypatch, capsys, tmp_path):
    def interrupted(params, **given):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim, "Adam", interrupted)
    file = tmp_path / "B.md"
    with pytest.raises(KeyboardInterrupt):
        run_optimizers("tiny", "sgd,adam,lion", 1, file, "cpu")
    text, told = file.read_text(), capsys.readouterr().out
    assert "| sgd |" in text and "| adam |" not in text
    assert "bench optimizers --model tiny --only sgd --repeats 1" in text
    assert "times the time of torch.optim.SGD, fused" in told and "kept in" in told
