"""Results of the benchmark of metagradients, as tables for a terminal and for a Markdown file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from ..search.provenance import provenance
from .bench import OURS, PLAIN, Result, Row
from .peers import PEERS

if TYPE_CHECKING:
    from rich.table import Table

NAME = "metagradient"


def table(result: Result) -> Table:
    """One workload: a row per method, a column per quantity."""
    from rich.box import SIMPLE
    from rich.table import Table

    title = f"{result.workload}: {_described(result)}"
    shown = Table(title=title, box=SIMPLE, padding=(0, 1), collapse_padding=True)
    shown.add_column("method")
    shown.add_column("time / plain")
    shown.add_column("MiB", justify="right")
    for hyper in result.truth:
        shown.add_column(f"error {hyper}", justify="right")
    shown.add_row(PLAIN, _seconds(result), _mib(result.mib), *["" for _ in result.truth])
    for row in result.rows:
        errors = [_error(result, row, hyper) for hyper in result.truth]
        shown.add_row(row.method, _ratio(row), _mib(row.mib), *errors)
    doubts = [f"{difference.doubt:.1e}" for difference in result.truth.values()]
    shown.add_row("finite differences are sure to", "", "", *doubts)
    return shown


def left_out(result: Result) -> list[str]:
    """A sentence for everything that this workload lacks."""
    told = [f"{result.workload} is left out: {result.left_out}"] if result.left_out else []
    return told + [
        f"{result.workload}, {row.method}: {row.left_out}" for row in result.rows if row.left_out
    ]


def section(results: Sequence[Result], command: str) -> str:
    """The Markdown of all results, one table per quantity."""
    measured = [result for result in results if not result.left_out]
    parts = ["## One exact metagradient", _preface(command), _workloads(results)]
    if measured:
        parts += [
            "### Time",
            "In units of plain `torch.optim` training of the same steps in the same round; median "
            f"(lowest-highest) of {len(measured[0].seconds)} rounds, float32.",
            _grid(measured, PLAIN, _seconds, lambda result, row: _ratio(row)),
            "### Peak memory",
            f"Growth over resting memory of one call in a fresh process, MiB{_how(measured)}.",
            _grid(measured, PLAIN, lambda r: _mib(r.mib), lambda result, row: _mib(row.mib)),
            "### Relative error",
            "Of the derivative in each hyper, in float64, against finite differences (Romberg) of "
            "plain `torch.optim` trainings after the steps in brackets.",
            _grid(
                measured, "finite differences are sure to", _doubts, _errors, lambda r: _judged(r)
            ),
        ]
    notes = [f"- {peer.name}: {peer.note}." for peer in PEERS.values()]
    reasons = [f"- {told}." for result in results for told in left_out(result)]
    return "\n\n".join([*parts, "### Notes", "\n".join(notes + reasons)])


def write_section(file: Path, text: str, name: str = NAME) -> None:
    """Put text between the file's markers of that name, at its end if it has none."""
    opening, closing = f"<!-- bench: {name} -->", "<!-- /bench -->"
    whole = f"{opening}\n{text}\n{closing}"
    before = file.read_text(encoding="utf-8") if file.exists() else "# Benchmarks\n"
    head, found, rest = before.partition(opening)
    if not found:
        after = f"{before.rstrip()}\n\n{whole}\n"
    else:
        _, closed, tail = rest.partition(closing)
        if not closed:
            raise ValueError(
                f"{file} has {opening} without {closing} after it; add that line where the "
                "section ends, or remove the first"
            )
        after = f"{head}{whole}{tail}"
    file.write_text(after, encoding="utf-8")


def _preface(command: str) -> str:
    origin = provenance()
    packages = sorted({p.package for p in PEERS.values() if not p.missing} - {"torch"})
    versions = [f"torch {origin['torch']}", *(f"{name} {version(name)}" for name in packages)]
    ours = ", ".join(OURS)
    return (
        "The gradient of the held-out loss in the hypers named, through all steps of training, by "
        f"this project ({ours}) and by others on the same weights and batches.\n\n"
        f"Made {str(origin['time'])[:10]} by `{command}` on {origin['cpu']}, {origin['cpus']} "
        f"cores, {origin['memory_gib']} GiB, {origin['threads']} thread(s); Python "
        f"{origin['python']}, hyperdescent {origin['hyperdescent']}, {', '.join(versions)}."
    )


def _workloads(results: Sequence[Result]) -> str:
    return _markdown(
        ["workload", "what", "update", "steps"],
        [[r.workload, r.what, r.rule, f"{r.steps:,}"] for r in results],
    )


def _grid(
    results: Sequence[Result],
    first: str,
    of_result: Callable[[Result], str],
    of_row: Callable[[Result, Row], str],
    heading: Callable[[Result], str] = lambda result: result.workload,
) -> str:
    """A column for every workload; the first row is about the workload itself."""
    rows = [[first, *map(of_result, results)]]
    for i, row in enumerate(results[0].rows):
        name = f"**{row.method}**" if row.method in OURS else row.method
        rows.append([name, *(of_row(result, result.rows[i]) for result in results)])
    return _markdown(["method", *map(heading, results)], rows)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _described(result: Result) -> str:
    return f"{result.what}; {result.rule}, {result.steps:,} steps"


def _judged(result: Result) -> str:
    return f"{result.workload} [{result.judged}]: {' / '.join(result.truth)}"


def _how(results: Sequence[Result]) -> str:
    if all(result.exact_memory for result in results):
        return ""
    return " (this system cannot clear its record of the peak: read small numbers as upper bounds)"


def _seconds(result: Result) -> str:
    return f"{_spread(result.seconds)} s" if result.seconds else "-"


def _ratio(row: Row) -> str:
    return _spread(row.ratios) if row.ratios else "left out" if row.left_out else "-"


def _spread(values: Sequence[float]) -> str:
    """The median and the extremes, to the same digits, such as "2.76 (2.70-2.81)"."""
    middle = median(values)
    digits = max(0, 2 - math.floor(math.log10(middle))) if middle < 1 else 2
    low, high = (f"{x:.{digits}f}" for x in (min(values), max(values)))
    return f"{middle:.{digits}f} ({low}-{high})"


def _mib(mib: float | None) -> str:
    return "-" if mib is None else f"{mib:,.1f}" if mib < 10 else f"{mib:,.0f}"


def _error(result: Result, row: Row, hyper: str) -> str:
    error = result.error(row, hyper)
    if error is None:
        return "refused" if row.slopes else "-"
    return "NaN" if math.isnan(error) else f"{error:.1e}"


def _errors(result: Result, row: Row) -> str:
    return " / ".join(_error(result, row, hyper) for hyper in result.truth)


def _doubts(result: Result) -> str:
    return " / ".join(f"{difference.doubt:.1e}" for difference in result.truth.values())


__all__ = ["left_out", "section", "table", "write_section"]
