"""What the commands print of a study, and the exit code that goes with it."""

import pytest

from hyperdescent.meta.outcome import Outcome
from hyperdescent.scripts.show import one_line, show_records
from hyperdescent.studies.record import Record, Records


def record(outcome=Outcome.OK, error=None):
    return Record(
        study="s",
        inputs={"problem": {"name": "wine-mlp"}, "arm": {"name": "adam"}, "seed": 3},
        outcome=outcome,
        measures={"valid": {"loss": 0.12345 if outcome is Outcome.OK else None}},
        error=error,
    )


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
