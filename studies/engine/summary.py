"""Records summed up over seeds, as plain data and as a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, TypedDict

from ..problems import label_of
from .record import Record, Records

if TYPE_CHECKING:
    from rich.table import Table


_MEDIAN = "median "


class Spread(TypedDict):
    """Of n numbers; std is the sample's, null for one number."""

    mean: float
    std: float | None
    median: float
    n: int


class SummaryRow(TypedDict):
    """One arm on one problem. Only trainings that stayed finite are in the measures: read them
    with trained < cells in mind.
    """

    problem: str
    arm: str
    cells: int
    trained: int
    diverged: int
    failed: int
    measures: dict[str, Spread]


def summary(records: Iterable[Record]) -> list[SummaryRow]:
    """A row for each problem and arm, in the order of the records."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault(group_of(record), []).append(record)
    return [_row(problem, arm, group) for (problem, arm), group in groups.items()]


def table(
    records: Records | Iterable[Record],
    title: str | None = None,
    measures: Sequence[str] | None = None,
) -> Table:
    """The summary for a terminal: mean and standard deviation of each measure over seeds.

    measures: the ones to show, such as "valid loss"; all without; "median valid loss" is its
    median. n: how many trained, of how many cells.
    """
    from rich.box import SIMPLE
    from rich.table import Table

    rows = summary(records)
    if measures is None:
        measures = list(dict.fromkeys(name for row in rows for name in row["measures"]))
    missing = records.missing if isinstance(records, Records) else 0
    caption = f"{missing} more cells have not run" if missing else None
    shown = Table(title=title, caption=caption, box=SIMPLE, padding=(0, 1), collapse_padding=True)
    # One problem alone is the title's to name.
    of_row: tuple[Literal["problem", "arm"], ...] = ("problem", "arm")
    headings = of_row if len({row["problem"] for row in rows}) > 1 else of_row[1:]
    for heading in (*headings, "n"):
        shown.add_column(heading, no_wrap=True)
    for measure in measures:
        # A narrow terminal breaks a cell before its deviation, never inside a number.
        shown.add_column(measure, justify="right", min_width=8)
    for row in rows:
        cells = [_cell(row["measures"], name) for name in measures]
        names = [row[heading] for heading in headings]
        shown.add_row(*names, f"{row['trained']}/{row['cells']}", *cells)
    return shown


def group_of(record: Record) -> tuple[str, str]:
    """The problem with its options, and the arm: the row of `summary` that a record is in."""
    problem, arm = record.inputs["problem"], record.inputs["arm"]
    if not isinstance(problem, dict) or not isinstance(arm, dict):
        raise ValueError("a record's inputs must hold its problem and its arm as mappings")
    options = problem.get("options")
    label = label_of(str(problem["name"]), options if isinstance(options, dict) else {})
    return label, str(arm["name"])


def _row(problem: str, arm: str, records: Sequence[Record]) -> SummaryRow:
    numbers: dict[str, list[float]] = {}
    trained = [r for r in records if r.outcome == "ok"]
    for record in trained:
        for name, value in _numbers(record).items():
            numbers.setdefault(name, []).append(value)
    return SummaryRow(
        problem=problem,
        arm=arm,
        cells=len(records),
        trained=len(trained),
        diverged=sum(r.outcome == "diverged" for r in records),
        failed=sum(r.outcome is None for r in records),
        measures={name: spread(values) for name, values in numbers.items()},
    )


def _numbers(record: Record) -> dict[str, float]:
    """The measures of a record by one name each, such as "valid loss"."""
    numbers = {
        f"{split} {name}": value
        for split, measured in record.measures.items()
        for name, value in measured.items()
        if value is not None
    }
    if record.tuned is not None:
        numbers["tuning seconds"] = record.tuned.seconds
    if record.seconds is not None:
        numbers["seconds"] = record.seconds
    return numbers


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(
        mean=statistics.fmean(values),
        std=statistics.stdev(values) if len(values) > 1 else None,
        median=statistics.median(values),
        n=len(values),
    )


def _cell(measures: dict[str, Spread], name: str) -> str:
    of_median = measures.get(name.removeprefix(_MEDIAN))
    if name.startswith(_MEDIAN) and of_median:
        return f"{of_median['median']:.4g}"
    return spelled(measures.get(name))


def spelled(spread: Spread | None) -> str:
    """The mean to the second digit of its deviation, such as "0.285 ±0.012"."""
    if spread is None:
        return "-"
    mean, std = spread["mean"], spread["std"]
    if not std:
        return f"{mean:.4g}"
    digits = 1 - math.floor(math.log10(std))
    if not 0 <= digits <= 6:
        return f"{mean:.4g} ±{std:.2g}"
    return f"{mean:.{digits}f} ±{std:.{digits}f}"


__all__ = ["Spread", "SummaryRow", "group_of", "spelled", "spread", "summary", "table"]
