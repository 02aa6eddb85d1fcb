"""Results of the benchmark of metagradients, as tables for a terminal and for a Markdown file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from ..measure.markdown import (
    doubtful_peak,
    for_terminal,
    in_mib,
    markdown,
    origin_of,
    spread,
    write_section,
)
from .bfloat16 import KNOTS, PrecisionAgreement
from .metagradient import LARGE, OURS, PLAIN, RouteRow, WorkloadResult
from .metagradient_peers import PEERS

if TYPE_CHECKING:
    from rich.table import Table

NAME = "metagradient"


def table(result: WorkloadResult) -> Table:
    """One workload for a terminal: a row per method, a column per quantity."""
    title = f"{result.workload}{_where(result)}: {_described(result)}"
    return for_terminal(title, _cells(result), words=2)


def _cells(result: WorkloadResult) -> list[list[str]]:
    """The header and a row per method; the first and the last are about the workload itself."""
    hypers = list(result.truth)
    doubts = [f"{difference.doubt:.1e}" for difference in result.truth.values()]
    return [
        ["method", "time / plain", "MiB", *(f"error {hyper}" for hyper in hypers)],
        [PLAIN, _seconds(result), in_mib(result.mib), *("" for _ in hypers)],
        *(
            [row.method, _ratio(row), in_mib(row.mib), *(_error(result, row, h) for h in hypers)]
            for row in result.rows
        ),
        *([["finite differences are sure to", "", "", *doubts]] if doubts else []),
    ]


def remarks(result: WorkloadResult) -> list[str]:
    """A sentence for everything that this workload lacks, or that was not done as its row says."""
    told = [f"{result.workload} is left out: {result.left_out}"] if result.left_out else []
    for row in result.rows:
        _, by_autograd, why = row.how.partition("by autograd: ")
        told += [f"{result.workload}, {row.method}: {by_autograd}{why}"] if why else []
        # Where memory is short, what was kept is a result.
        kept = "" if result.judged or why else row.how
        told += [f"{result.workload}, {row.method}: {kept}"] if kept else []
        told += [f"{result.workload}, {row.method}: {row.left_out}"] if row.left_out else []
    return told


def write(file: Path, result: WorkloadResult, command: str) -> None:
    """Put a workload's measurements, and how to read them, into a Markdown file."""
    write_section(file, _introduction(), NAME)
    name = f"{NAME} {result.workload} {result.gpu}".rstrip()
    write_section(file, section(result, command), name)


def section(result: WorkloadResult, command: str) -> str:
    """The Markdown of one workload."""
    title = f"### {result.workload}{_where(result)}"
    origin = origin_of(command, _packages(), result.gpu)
    parts = [title, f"{_described(result)}. {origin}"]
    if not result.left_out:
        header, *rows = _cells(result)
        named = {*OURS, *LARGE}
        ours = [[f"**{row[0]}**", *row[1:]] if row[0] in named else row for row in rows]
        judged = (
            f"Errors after {result.judged:,} steps. "
            if result.judged not in (0, result.steps)
            else ""
        )
        parts += [
            f"{judged}Medians (lowest-highest) of {len(result.seconds)} rounds."
            f"{doubtful_peak(result.exact_memory)}"
        ]
        parts += [markdown(header, ours)]
    if reasons := [f"- {told}." for told in remarks(result)]:
        parts += ["\n".join(reasons)]
    return "\n\n".join(parts)


def trust_section(measured: Sequence[PrecisionAgreement], command: str) -> str:
    """The Markdown of what bfloat16 does to a metagradient."""
    header = ["workload", "lr", "steps", "cosine", "error"]
    rows = [
        [t.workload, f"{t.lr:g}", str(t.steps), *map(_three_digits, (t.cosines, t.errors))]
        for t in measured
    ]
    return "\n\n".join(
        [
            "## Metagradients through bfloat16",
            f"The gradient in {KNOTS} knots of Adam's learning rate with autocast=torch.bfloat16 "
            "beside the one in float32, same seeds: cosine between the two, and the norm of the "
            "difference in units of float32's; median (lowest-highest) over "
            f"{len(measured[0].cosines)} seeds. {origin_of(command, _packages())}",
            markdown(header, rows),
        ]
    )


def _three_digits(values: Sequence[float]) -> str:
    return f"{median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def _introduction() -> str:
    notes = [f"- {peer.name}: {peer.note}." for peer in PEERS.values()]
    return "\n\n".join(
        [
            "## One exact metagradient",
            "The gradient of the held-out loss in the hypers named, through all steps of training, "
            "by this project (bold) and by others on the same weights and batches, one thread, "
            "float32, compiled code at hand. Time is in units of plain `torch.optim` training of "
            "the same steps in the same round. Memory is the growth over resting memory of one "
            "call in a fresh process, on a GPU that of what torch has allocated there. Errors are "
            "relative, in float64, against finite differences (Romberg) of plain `torch.optim` "
            "trainings.",
            "\n".join(notes),
        ]
    )


def _where(result: WorkloadResult) -> str:
    return f" on {result.gpu}" if result.gpu else ""


def _packages() -> list[str]:
    """What the peers that could be run are installed as."""
    return [peer.package for peer in PEERS.values() if not peer.missing]


def _described(result: WorkloadResult) -> str:
    return f"{result.what}; {result.rule}, {result.steps:,} steps"


def _seconds(result: WorkloadResult) -> str:
    return f"{spread(result.seconds)} s" if result.seconds else "-"


def _ratio(row: RouteRow) -> str:
    return spread(row.ratios) if row.ratios else "left out" if row.left_out else "-"


def _error(result: WorkloadResult, row: RouteRow, hyper: str) -> str:
    error = result.error(row, hyper)
    if error is None:
        return "refused" if row.slopes else "-"
    return "NaN" if math.isnan(error) else f"{error:.1e}"


__all__ = ["remarks", "section", "table", "trust_section", "write", "write_section"]
