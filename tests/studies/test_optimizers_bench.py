"""The benchmark of the drop-in optimizers: both sides do the same step, what is left out is said,
and what is measured is written. Nothing is timed against a bound.
"""

import sys

import pytest
import torch

from hyperdescent.scripts import command
from hyperdescent.studies import optimizers_bench, optimizers_report
from hyperdescent.studies.device import CPU
from hyperdescent.studies.measured import Grown
from hyperdescent.studies.optimizers_bench import (
    MODELS,
    RIVALS,
    Model,
    Pair,
    Rival,
    bench_optimizers,
    find_models,
    find_rivals,
    memory_of,
)

TINY = Model("tiny", "three tensors", ((4, 3), (5,), (2, 3, 2, 2)))
# Theirs is another form of the rule, as its docstring says; in a benchmark that does not matter.
APART = {"ademamix", "ano", "grams", "muon", "scion", "shampoo", "prodigy", "schedulefreeadamw"}


@pytest.fixture
def quick(monkeypatch):
    """No process of its own for memory."""
    monkeypatch.setattr(optimizers_bench, "alone", lambda measure, *given: Grown(1.5))
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


def test_a_pair_has_a_time_per_round_of_each(quick):
    told = []
    (pair,) = bench_optimizers([TINY], ["adam"], repeats=2, say=told.append)
    assert (pair.model, pair.rule, pair.rival) == ("tiny", "adam", "torch.optim.Adam")
    assert len(pair.seconds) == len(pair.others) == len(pair.ratios) == 2
    assert pair.ratios == [a / b for a, b in zip(pair.seconds, pair.others, strict=True)]
    assert told[0] == "tiny, adam: time, round 0 of 2, ours"
    assert told[-1] == "tiny, adam: memory, other"


def test_memory_is_of_the_state(monkeypatch):
    large = Model("large", "", ((2**21,),))  # 8 MiB, and Adam's two slots are 16
    for who in ("ours", "other"):
        assert 12 < memory_of(large, "adam", who, CPU).mib < 60


def test_what_is_not_installed_is_left_out_and_said(quick, monkeypatch):
    monkeypatch.setitem(RIVALS, "adam", (Rival("no_such_package", "Adam"), {}))
    (pair,) = bench_optimizers([TINY], ["adam"], repeats=1)
    assert pair.left_out == "no_such_package is not here" and not pair.seconds
    text = optimizers_report.section([pair], "the command")
    assert "| adam | element | no_such_package.Adam: no_such_package is not here | - |" in text


def test_names_that_do_not_exist_are_answered():
    with pytest.raises(ValueError, match="there is no rule with a rival 'adamm'; did you mean"):
        find_rivals(["adamm"])
    with pytest.raises(ValueError, match="there is no model '12'; did you mean '12m'"):
        find_models(["12"])
    with pytest.raises(ValueError, match="repeats=0 measures nothing"):
        next(bench_optimizers([TINY], ["adam"], repeats=0))


def test_a_table_shows_what_was_measured(quick):
    pair = Pair(
        *("tiny", "adam", "element", "torch.optim.Adam"),
        seconds=[0.002, 0.003, 0.001],
        others=[0.004, 0.004, 0.004],
        grown=(Grown(9.54), Grown(13.0)),
    )
    text = optimizers_report.section([pair], "the command")
    assert "| adam | element | torch.optim.Adam | 2.00 | 0.500 (0.250-0.750) | 9.5 | 13 |" in text
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
