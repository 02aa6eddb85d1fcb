"""Results of the benchmark of the drop-in optimizers, as tables for a terminal and a file."""

from __future__ import annotations

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
from .optimizers import COMPILED, FUSED, MODELS, OURS, THEIRS, Row

if TYPE_CHECKING:
    from rich.table import Table

NAME = "optimizers"
_HEADER = [
    *("rule", "over", "beside", "ours, ms", "/ theirs", "/ fused"),
    *("compiled, ms", "/ theirs", "/ fused", "first, s"),
    *("MiB", "MiB, compiled", "MiB, theirs"),
]


def table(rows: Sequence[Row]) -> Table:
    """The rules on one model for a terminal."""
    return for_terminal(_described(rows[0]), [_HEADER, *map(_cells, rows)], words=3)


def line(row: Row) -> str:
    """One rule, as it is measured."""
    said = [f"{side} left out: {why}" for side, why in row.left_out.items()]
    for side in (OURS, COMPILED):
        for other in (THEIRS, FUSED):
            if ratios := row.ratios(side, other):
                said.append(f"{side} {spread(ratios)} times the time of {_called(row, other)}")
    return f"{row.rule}: {', '.join(said)}"


def _called(row: Row, side: str) -> str:
    return f"{row.rival}, fused" if side == FUSED else row.rival


def write(file: Path, rows: Sequence[Row], command: str) -> None:
    """Put the measurements on one model into a Markdown file."""
    write_section(file, _INTRODUCTION, NAME)
    where = " on a GPU" if rows[0].gpu else ""
    write_section(file, section(rows, command), f"{NAME} {rows[0].model}{where}")


def section(rows: Sequence[Row], command: str) -> str:
    """The Markdown of one model."""
    packages = {row.rival.partition(".")[0] for row in rows if THEIRS in row.seconds}
    exact = all(grown.exact for row in rows for grown in row.grown.values())
    rounds = max((len(each) for row in rows for each in row.seconds.values()), default=0)
    return "\n\n".join(
        [
            f"### {_described(rows[0])}",
            origin_of(command, packages, rows[0].gpu),
            f"Medians (lowest-highest) of {rounds} rounds.{doubtful_peak(exact)}",
            markdown(_HEADER, list(map(_cells, rows))),
            *_omissions(rows),
        ]
    )


_INTRODUCTION = """\
## A step of the drop-in optimizers

`hyperdescent.optim`, a rule as it is written and with `compile=True`, beside `torch.optim`'s
foreach form and its fused one, and where torch has no such rule beside `pytorch_optimizer` at its
defaults: the same weights and gradients in float32, each with the same lr, SGD with momentum 0.9.
All sides take their steps in the same rounds, and a ratio is of one round; "first" is the first
compiled step, most of which is compiling, and less where the code is on disk. Memory is what an
optimizer takes beside weights and gradients, its state included, in a process of its own.

As it is written, a rule is done in blocks that stay in cache and short tensors are gathered: on
many small tensors that is fast, on long ones on a CPU it is not, for every operation passes over
the block. Compiled, it is one pass."""


def _described(row: Row) -> str:
    model = MODELS[row.model]
    where = f", on one {row.gpu}" if row.gpu else ""
    return f"{model.what}, {model.numel:,} weights{where}"


def _cells(row: Row) -> list[str]:
    cells = [row.rule, row.over, row.rival]
    for side in (OURS, COMPILED):
        seconds = row.seconds.get(side)
        cells.append(f"{1e3 * median(seconds):.2f}" if seconds else "-")
        cells += [_spread(row.ratios(side, other)) for other in (THEIRS, FUSED)]
    cells.append(f"{row.first:.1f}" if row.first else "-")
    mib = (row.grown.get(side) for side in (OURS, COMPILED, THEIRS))
    return [*cells, *(in_mib(grown.mib) if grown else "-" for grown in mib)]


def _spread(ratios: Sequence[float]) -> str:
    return spread(ratios) if ratios else "-"


def _omissions(rows: Sequence[Row]) -> list[str]:
    """What was left out, a line each."""
    said = [
        f"- {row.rule}, {_called(row, side) if side in (THEIRS, FUSED) else side}, left out: {why}"
        for row in rows
        for side, why in row.left_out.items()
    ]
    return ["\n".join(said)] if said else []


__all__ = ["line", "section", "table", "write"]
