"""Every rule as an optimizer: the plain loop against the package's own, the records, the report."""

import json
import math
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from typer.testing import CliRunner

from hyperdescent.inner.registry import RULES, find_rule
from hyperdescent.inner.torch_form import optimizer as optim
from hyperdescent.meta.training.loop import run_training
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training
from hyperdescent.scripts.command import app
from hyperdescent.scripts.show import show_study
from hyperdescent.search import budget
from hyperdescent.studies.engine.record import Record, Records, read
from hyperdescent.studies.engine.summary import spelled, spread
from hyperdescent.studies.library import optimizers as drop_in
from hyperdescent.studies.library import optimizers_report as drop_in_report
from hyperdescent.studies.library.optimizers import (
    SETTING,
    DropInCell,
    drop_in_cells,
    learned_of,
    make_model,
    measure,
    of_arm,
    scheduled_of,
    train_plainly,
    tune_and_train,
)
from hyperdescent.studies.problems import load_problem

SMALL = replace(SETTING, steps=8, seeds=2)


@pytest.fixture
def small(monkeypatch):
    """Few steps, and budgets that count readings of the clock."""
    ticks = count()
    clock = SimpleNamespace(monotonic=lambda: next(ticks) / 100)
    monkeypatch.setattr(budget, "time", clock)
    for module in (drop_in, drop_in_report):
        monkeypatch.setattr(module, "SETTING", SMALL)


def trained_by_sgd(tuned, data, seed):
    """The net trained by SGD at its defaults, or along half a cosine from the tuned peak."""
    model, given = make_model(seed), dict(tuned or {})
    peak, floor = given.pop("lr.peak", None), given.pop("lr.floor", None)
    rates = {} if peak is None else {"lr": peak}
    optimizer, scheduler = optim.SGD(model.parameters(), **rates, **given), None
    if peak is not None:
        down = [(1 + math.cos(math.pi * i / SMALL.steps)) / 2 for i in range(SMALL.steps)]
        table = [floor + (1 - floor) * x for x in down]
        scheduler = LambdaLR(optimizer, lambda i: table[min(i, SMALL.steps - 1)])
    batches = drop_in.draw_batches(*data["train"], seed)
    train_plainly(model, optimizer, batches, scheduler)
    return model


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("sgd", {"lr": 0.1, "momentum": 0.9}),
        ("schedulefreesgd", {"lr": 2.0}),  # Its result is not where it takes gradients.
        ("aegd", {"lr": 0.1}),  # It needs the loss.
    ],
)
def test_the_plain_loop_trains_as_the_package_does(name, given):
    rule, problem, seed, steps = find_rule(name), load_problem("digits-mlp"), 3, 20
    training = Training(problem, rule, steps, values=given)
    resolved = training.resolve({})
    expected = training.params(run_training(training, resolved, seed).state, resolved.at(steps - 1))

    model = make_model(0)
    model.load_state_dict(problem.start(seed)[0])
    optimizer = optim.torch_form(rule)(model.parameters(), **given)
    train_plainly(model, optimizer, (problem.batch(i, seed) for i in range(steps)))

    for found, wanted in zip(model.state_dict().values(), expected.values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_net_and_what_is_measured_are_those_of_the_problem():
    problem, model = load_problem("digits-mlp"), make_model(5)
    params = dict(model.named_parameters())
    assert list(params) == list(problem.start(0)[0])
    for split in ("valid", "test"):
        expected = problem.measure({n: p.detach() for n, p in params.items()}, {}, split)
        assert measure(model, *problem.splits[split].whole()) == pytest.approx(expected, rel=1e-5)


def test_a_start_and_its_batches_are_functions_of_the_seed(small):
    x, y = torch.arange(100.0)[:, None], torch.arange(100)
    drawn = {s: torch.cat([b for _, b in drop_in.draw_batches(x, y, s)]) for s in (0, 1)}
    again = torch.cat([b for _, b in drop_in.draw_batches(x, y, 0)])
    assert torch.equal(drawn[0], again) and not torch.equal(drawn[0], drawn[1])
    assert len(again) == SMALL.steps * SMALL.batch_size
    before = torch.random.get_rng_state()
    one, same, other = (make_model(s)[0].weight for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)


class TestCells:
    def test_every_rule_has_one_and_learns_a_rate(self):
        cells, left_out = drop_in_cells()
        assert [cell.rule for cell in cells] == list(RULES) and left_out == []
        for rule in RULES.values():
            learned = learned_of(rule)
            assert learned[0] in ("lr", "reps_rel", "d_coef")
            assert learned[0] not in rule.rough()
            averages = rule.readout is not None and rule.name not in ("stochasticnesterov", "agnes")
            assert ("lr" in scheduled_of(rule)) != averages

    @pytest.mark.parametrize(
        ("name", "learned"),
        [
            ("adamw", ["lr", "beta1", "beta2", "weight_decay"]),
            ("alphagrad", ["lr", "alpha", "momentum", "weight_decay"]),
            ("lion", ["lr", "beta1", "beta2", "weight_decay"]),
            ("dog", ["reps_rel", "weight_decay", "gamma"]),
            ("prodigy", ["d_coef", "beta1", "beta2", "weight_decay"]),  # Its lr is 1 by design.
            ("muon", ["lr", "aux_lr", "momentum", "weight_decay"]),
        ],
    )
    def test_what_is_learned(self, name, learned):
        assert learned_of(find_rule(name)) == learned

    def test_what_decides_the_numbers_is_in_the_key(self, monkeypatch):
        def key(cell):
            return Record("s", cell.inputs, None).key

        keys = {key(DropInCell(rule, b)) for rule in ("sgd", "adamw") for b in (1.0, 2.0)}
        monkeypatch.setattr(drop_in, "SETTING", SMALL)
        keys.add(key(DropInCell("sgd", 1.0)))
        hypers = {**RULES["sgd"].hypers, "lr": replace(RULES["sgd"].hypers["lr"], search=(0.1, 1))}
        monkeypatch.setitem(RULES, "sgd", replace(RULES["sgd"], hypers=hypers))
        keys.add(key(DropInCell("sgd", 1.0)))
        assert len(keys) == 6

    def test_a_rule_that_is_not_there(self):
        with pytest.raises(ValueError, match="there is no rule 'sgdd'"):
            drop_in_cells(rules="sgdd")


class TestRecord:
    def test_it_holds_each_training_of_both_optimizers(self, small):
        record = tune_and_train(DropInCell("sgd", 0.3))
        assert record.outcome is Outcome.OK and Record.from_line(record.line()) == record
        tuned = record.tuned.hypers
        assert set(tuned) == {"lr.peak", "lr.floor", "momentum", "weight_decay"}
        assert record.measures["tuning"]["evaluations"] > 0
        data = drop_in._data()
        for arm, given in {"defaults": None, "tuned": tuned}.items():
            for seed in range(SMALL.seeds):
                model = trained_by_sgd(given, data, seed)
                for split in ("valid", "test"):
                    expected = measure(model, *data[split])
                    found = record.measures[f"{arm} {split} {seed}"]
                    assert found == pytest.approx(expected, rel=1e-6)
        losses = of_arm(record.measures, "tuned", "valid", "loss")
        assert record.measures["valid"]["loss"] == pytest.approx(sum(losses) / len(losses))

    def test_a_grid_of_rates_tells_where_a_rule_that_missed_could_have_got(self, small):
        record = tune_and_train(DropInCell("sgd", 0.3))
        grid = record.measures["rates"]
        assert [float(factor) for factor in grid] == list(drop_in.FACTORS)
        assert grid["1"] == of_arm(record.measures, "tuned", "valid", "loss")[0]
        data, tuned = drop_in._data(), record.tuned.hypers
        model = trained_by_sgd({**tuned, "lr.peak": 16 * tuned["lr.peak"]}, data, 0)
        assert grid["16"] == pytest.approx(measure(model, *data["valid"])["loss"], rel=1e-6)
        best = min(grid, key=grid.get)
        rate = float(best) * tuned["lr.peak"]
        told = f"of a grid around it lr = {rate:.2g} is best, with {grid[best]:.3f}"
        assert told in drop_in_report.why(record)

    def test_a_rule_whose_metagradient_takes_too_long_is_searched(self, small, monkeypatch):
        def refusing(*given, route="auto", **more):
            if route == "auto":
                raise ValueError("budget=1 s is too small")
            return tune(*given, route=route, **more)

        tune = drop_in.tune
        monkeypatch.setattr(drop_in, "tune", refusing)
        tuned = tune_and_train(DropInCell("sgd", 0.3)).tuned
        assert (tuned.route, tuned.reason) == ("search", "budget=1 s is too small")

    def test_divergence_is_an_outcome(self, small, monkeypatch):
        def wild(*given, **more):
            result = tune(*given, **more)
            result.in_force["lr"].fill_(1e30)
            return result

        tune = drop_in.tune
        monkeypatch.setattr(drop_in, "tune", wild)
        record = tune_and_train(DropInCell("sgd", 0.3))
        assert record.outcome is Outcome.DIVERGED
        assert record.measures["valid"] == {"loss": None, "accuracy": None}
        assert None not in of_arm(record.measures, "defaults", "valid", "loss")
        cells = drop_in_report._cells(record)
        assert cells[2] == "2 of 2 diverged" and cells[4] == "0/2"
        assert drop_in_report.why(record).startswith("2 tuned trainings diverged; lr 0.001 → ")


class TestReport:
    @pytest.fixture
    def records(self, small):
        cells, _ = drop_in_cells(rules="sgd,schedulefreesgd", budget="0.3s")
        return Records("optimizers", tuple(tune_and_train(cell) for cell in cells))

    def test_the_table_is_what_the_records_hold_best_first(self, records):
        rows = [drop_in_report._cells(record) for record in drop_in_report._by_loss(records)]
        means = {
            record.inputs["arm"]["name"]: record.measures["valid"]["loss"] for record in records
        }
        assert [row[0] for row in rows] == sorted(means, key=means.get)
        for record in records:
            (row,) = (row for row in rows if row[0] == record.inputs["arm"]["name"])
            for at, arm, name in ((1, "defaults", "loss"), (2, "tuned", "loss")):
                values = [record.measures[f"{arm} valid {s}"][name] for s in range(SMALL.seeds)]
                assert row[at] == spelled(spread(values))
            assert row[5] == record.tuned.route
        text = drop_in_report.section(records, "a command")
        assert all(" | ".join(row) in text for row in rows) and "tuned for 0.3 s on" in text

    def test_a_rule_that_misses_the_target_is_listed_and_one_that_reaches_it_is_not(
        self, records, monkeypatch
    ):
        by_name = {record.inputs["arm"]["name"]: record for record in records}
        worst = {
            name: max(of_arm(record.measures, "tuned", "valid", "loss"))
            for name, record in by_name.items()
        }
        best, other = sorted(worst, key=worst.get)
        between = worst[best] + 1e-6
        for module in (drop_in, drop_in_report):
            monkeypatch.setattr(module, "SETTING", replace(SMALL, target=between))
        told, *missed = drop_in_report.remarks(records)
        assert told.startswith("1 of 2 tuned rules") and len(missed) == 1
        assert missed[0].startswith(f"{other}: ") and "lr " in missed[0]
        for module in (drop_in, drop_in_report):
            monkeypatch.setattr(module, "SETTING", replace(SMALL, target=100.0))
        assert len(drop_in_report.remarks(records)) == 1

    def test_a_value_at_the_edge_of_its_range_is_told(self, records):
        record = next(r for r in records if r.inputs["arm"]["name"] == "sgd")
        edge = {**record.tuned.hypers, "lr.peak": RULES["sgd"].hypers["lr"].search[1]}
        moved = replace(record, tuned=replace(record.tuned, hypers=edge))
        assert "lr at the edge of its range" in drop_in_report.why(moved)


class TestCommand:
    def test_it_resumes_and_replaces_its_section(self, small, tmp_path, capsys):
        out, into = tmp_path / "run", tmp_path / "B.md"
        given = {"options": {"rules": "sgd", "budget": "0.3s"}, "into": into}
        assert show_study(Path("optimizers"), out, None, True, **given) == 0
        told = capsys.readouterr().out
        for part in ("at defaults", "reached", "sgd", "gradient", "validation loss"):
            assert part in told
        (line,) = (out / "records.jsonl").read_text().splitlines()
        assert json.loads(line)["inputs"]["arm"]["name"] == "sgd"
        first = into.read_text()
        assert show_study(Path("optimizers"), out, None, True, **given) == 0
        assert len(read(out / "records.jsonl")) == 1 and into.read_text() == first

        given["options"]["rules"] = "sgd,schedulefreesgd"
        assert show_study(Path("optimizers"), out, None, True, **given) == 0
        assert [r.inputs["arm"]["name"] for r in read(out / "records.jsonl")] == [
            "sgd",
            "schedulefreesgd",
        ]
        text = into.read_text()
        assert text.count("<!-- bench: study optimizers -->") == 1
        assert "| schedulefreesgd |" in text and "--rules sgd,schedulefreesgd" in text

    def test_a_cell_that_raises_is_told_in_table_and_section(self, small, tmp_path, monkeypatch):
        monkeypatch.setattr(drop_in, "_data", lambda: 1 / 0)
        given = {"options": {"rules": "sgd", "budget": "0.3s"}, "into": tmp_path / "B.md"}
        assert show_study(Path("optimizers"), tmp_path, None, True, **given) == 1
        text = (tmp_path / "B.md").read_text()
        assert "| sgd | failed |" in text and "sgd: failed, ZeroDivisionError" in text

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["one-pass", "--rules", "sgd"], "the study one-pass takes no --rules"),
            (["one-pass", "--into", "x.md"], "one-pass writes no Markdown"),
            (["optimizers", "--budget", "3x"], "budget='3x' is not a time"),
        ],
    )
    def test_what_a_study_does_not_take(self, tmp_path, arguments, message):
        ran = CliRunner().invoke(app, ["study", *arguments, "--out", str(tmp_path), "--serial"])
        assert ran.exit_code == 1 and message in str(ran.exception)
