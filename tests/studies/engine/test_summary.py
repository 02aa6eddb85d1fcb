"""Reports: the arithmetic, the order of the study, and what they do not hide."""

import io
import json

from rich.console import Console

from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.studies.engine.record import Record, Records
from hyperdescent.studies.engine.summary import spread, summary, table


def record(arm, seed, loss, outcome=Outcome.OK, problem="p", **options):
    return Record(
        study="s",
        inputs={
            "problem": {"name": problem, "options": options},
            "arm": {"name": arm},
            "seed": seed,
        },
        outcome=outcome,
        measures={"valid": {"loss": loss}} if outcome else {},
        seconds=2.0 if outcome else None,
        error=None if outcome else "ValueError: no",
    )


RECORDS = [
    record("z", 0, 3.0),
    record("z", 1, 5.0),
    record("z", 2, 10.0),
    record("z", 3, None, Outcome.DIVERGED),
    record("z", 4, None, None),
    record("a", 0, 1.0),
    record("a", 0, 1.0, problem="q", width=8),
]


def test_rows_are_in_the_order_of_the_study():
    assert [(row["problem"], row["arm"]) for row in summary(RECORDS)] == [
        ("p", "z"),
        ("p", "a"),
        ("q(width=8)", "a"),
    ]


def test_spread_over_seeds_and_what_is_not_in_it():
    row = summary(RECORDS)[0]
    assert row["measures"]["valid loss"] == {"mean": 6.0, "std": 13**0.5, "median": 5.0, "n": 3}
    assert (row["cells"], row["trained"], row["diverged"], row["failed"]) == (5, 3, 1, 1)


def test_one_seed_has_no_deviation():
    assert spread([2.0]) == {"mean": 2.0, "std": None, "median": 2.0, "n": 1}


def test_the_summary_is_json():
    assert json.loads(json.dumps(summary(RECORDS), allow_nan=False)) == summary(RECORDS)


def test_a_table_of_chosen_measures():
    console = Console(file=io.StringIO(), width=120)
    console.print(table(RECORDS, measures=("test loss", "valid loss")))
    text = console.file.getvalue()
    assert text.index("test loss") < text.index("valid loss") and "6.0 ±3.6" in text
    assert "seconds" not in text


def test_the_table_shows_every_row_and_what_is_missing():
    console = Console(file=io.StringIO(), width=120)
    console.print(table(Records("s", tuple(RECORDS), missing=2), title="rates"))
    text = console.file.getvalue()
    assert "2 more cells have not run" in text
    assert "rates" in text and "q(width=8)" in text
    assert "6.0 ±3.6" in text and "3/5" in text


def test_a_median_beside_the_mean():
    records = [record("sgd", seed, loss) for seed, loss in enumerate((1.0, 2.0, 9.0))]
    shown = table(records, measures=["valid loss", "median valid loss", "median test loss"])
    mean, median, missing = (next(iter(column.cells)) for column in shown.columns[-3:])
    assert mean.startswith("4") and (median, missing) == ("2", "-")
