"""What the commands print of a study, and the exit code that goes with it."""

import pytest
import torch

from hyperdescent.inner.registry import find_rule
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.scripts.show import one_line, show_records, show_result
from hyperdescent.search.result import Result
from hyperdescent.studies.engine.record import Record, Records


def record(outcome=Outcome.OK, error=None):
    return Record(
        study="s",
        inputs={"problem": {"name": "wine-mlp"}, "arm": {"name": "adam"}, "seed": 3},
        outcome=outcome,
        measures={"valid": {"loss": 0.12345 if outcome is Outcome.OK else None}},
        error=error,
    )


def result(**learned):
    """AdamW with these values learned, in a result that says what show_result needs."""
    rule = find_rule("adamw")
    given = {name: torch.tensor(v, dtype=torch.float64) for name, v in learned.items()}
    return Result(
        rule=rule,
        hypers=given,
        options=rule.options(),
        loss=0.5,
        losses=[0.5],
        outcome=Outcome.OK,
        route="gradient",
        reason="of a test",
        in_force=rule.values(given),
        defaults=rule.values(),
        scheduled=[],
        settings={"problem": "wine-mlp", "learn": list(learned)},
    )


def test_every_learned_hyper_has_a_line_and_no_other(capsys):
    show_result(result(lr=0.02, beta1=0.9), None)
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    found = [[cell.strip() for cell in line[1:4]] for line in lines]
    assert found == [["lr", "0.001", "0.02"], ["beta1", "0.9", "0.9"]]


FAILED = record(None, "ValueError: no [/such] thing")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (record(), "adam on wine-mlp, seed 3: valid loss 0.1235"),
        (record(Outcome.DIVERGED), "adam on wine-mlp, seed 3: diverged"),
        (FAILED, "adam on wine-mlp, seed 3: ValueError: no [/such] thing"),
    ],
)
def test_a_record_is_a_line_of_progress(given, told):
    assert one_line(given) == told


@pytest.mark.parametrize(
    ("records", "missing", "code", "told"),
    [
        ((record(),), 0, 0, "0.1235"),
        ((record(), FAILED), 0, 1, f"1 of 2 cells failed, first {one_line(FAILED)}"),
        ((record(),), 4, 130, "interrupted; the same command goes on from here"),
        ((record(),), 4, 130, "4 more cells have not run"),
        ((), 4, 130, "interrupted; the same command goes on from here"),
        ((FAILED,), 4, 130, "1 of 1 cells failed"),
    ],
)
def test_the_exit_code_says_whether_every_cell_has_its_numbers(
    capsys, records, missing, code, told
):
    assert show_records(Records("s", records, missing), "s") == code
    assert told in capsys.readouterr().out
