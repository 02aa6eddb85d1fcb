"""Measurements as text: numbers with their spread, Markdown tables, sections of a file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from ...search.provenance import provenance

if TYPE_CHECKING:
    from rich.table import Table


def for_terminal(title: str, cells: Sequence[Sequence[str]], words: int) -> Table:
    """A table of a header and rows, whose first so many columns are words, the others numbers."""
    from rich.box import SIMPLE
    from rich.table import Table

    shown = Table(title=title, box=SIMPLE, padding=(0, 1), collapse_padding=True)
    header, *rows = cells
    for i, name in enumerate(header):
        shown.add_column(name, justify="left" if i < words else "right")
    for row in rows:
        shown.add_row(*row)
    return shown


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_section(file: Path, text: str, name: str) -> None:
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


def origin_of(command: str, packages: Iterable[str], gpu: str = "") -> str:
    """When, how and where something was measured, and with what beside torch."""
    driven = f"one {gpu}, driven by " if gpu else ""
    origin, others = provenance(), sorted({*packages} - {"torch"})
    versions = [f"torch {origin['torch']}", *(f"{name} {version(name)}" for name in others)]
    return (
        f"Made {str(origin['time'])[:10]} by `{command}` on {driven}{origin['cpu']}, "
        f"{origin['cpus']} cores, {origin['memory_gib']} GiB, {origin['threads']} thread(s); "
        f"Python {origin['python']}, hyperdescent {origin['hyperdescent']}, {', '.join(versions)}."
    )


def spread(values: Sequence[float]) -> str:
    """The median and the extremes, to the same digits, such as "2.76 (2.70-2.81)"."""
    middle = median(values)
    digits = max(0, 2 - math.floor(math.log10(middle))) if 0 < middle < 1 else 2
    low, high = (f"{x:.{digits}f}" for x in (min(values), max(values)))
    return f"{middle:.{digits}f} ({low}-{high})"


def doubtful_peak(exact: bool) -> str:
    """What to say beside memory where it was not measured exactly."""
    if exact:
        return ""
    return " This system cannot clear its record of the peak: read small MiB as upper bounds."


def in_mib(mib: float | None) -> str:
    return "-" if mib is None else f"{mib:,.1f}" if mib < 10 else f"{mib:,.0f}"


__all__ = [
    "doubtful_peak",
    "for_terminal",
    "in_mib",
    "markdown",
    "origin_of",
    "spread",
    "write_section",
]
