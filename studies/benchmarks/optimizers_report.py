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
from .optimizers import MODELS, Pair

if TYPE_CHECKING:
    from rich.table import Table

NAME = "optimizers"
_HEADER = ["rule", "over", "beside", "ours, ms", "time / theirs", "MiB", "MiB, theirs"]


def table(pairs: Sequence[Pair]) -> Table:
    """The rules on one model for a terminal."""
    return for_terminal(_described(pairs[0]), [_HEADER, *map(_cells, pairs)], words=3)


def line(pair: Pair) -> str:
    """One pair, as it is measured."""
    if pair.left_out:
        return f"{pair.rule} left out: {pair.left_out}"
    ours, theirs = (in_mib(grown.mib) for grown in pair.grown)
    times = f"{spread(pair.ratios)} times the time of {pair.rival}"
    return f"{pair.rule}: {times}, {ours} MiB beside {theirs}"


def write(file: Path, pairs: Sequence[Pair], command: str) -> None:
    """Put the measurements on one model into a Markdown file."""
    write_section(file, _INTRODUCTION, NAME)
    where = " on a GPU" if pairs[0].gpu else ""
    write_section(file, section(pairs, command), f"{NAME} {pairs[0].model}{where}")


def section(pairs: Sequence[Pair], command: str) -> str:
    """The Markdown of one model."""
    measured = [pair for pair in pairs if pair.seconds]
    packages = {pair.rival.partition(".")[0] for pair in measured}
    exact = all(grown.exact for pair in pairs for grown in pair.grown)
    rounds = max((len(pair.seconds) for pair in pairs), default=0)
    return "\n\n".join(
        [
            f"### {_described(pairs[0])}",
            origin_of(command, packages, pairs[0].gpu),
            f"Medians (lowest-highest) of {rounds} rounds.{doubtful_peak(exact)}",
            markdown(_HEADER, list(map(_cells, pairs))),
        ]
    )


_INTRODUCTION = """\
## A step of the drop-in optimizers

`hyperdescent.optim` beside the foreach form of `torch.optim` and, where that has no such rule,
beside `pytorch_optimizer` at its defaults: the same weights and gradients in float32, each with the
same lr, SGD with momentum 0.9. Time is the ratio of both in the same round; memory what an
optimizer takes beside weights and gradients, its state included, in a process of its own."""


def _described(pair: Pair) -> str:
    model = MODELS[pair.model]
    where = f", on one {pair.gpu}" if pair.gpu else ""
    return f"{model.what}, {model.numel:,} weights{where}"


def _cells(pair: Pair) -> list[str]:
    if pair.left_out:
        return [pair.rule, pair.over, f"{pair.rival}, left out: {pair.left_out}", *["-"] * 4]
    ours, theirs = (in_mib(grown.mib) for grown in pair.grown)
    milliseconds = f"{1e3 * median(pair.seconds):.2f}"
    return [pair.rule, pair.over, pair.rival, milliseconds, spread(pair.ratios), ours, theirs]


__all__ = ["line", "section", "table", "write"]
