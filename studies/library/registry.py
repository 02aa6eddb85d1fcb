"""Studies that come with the package, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.record import Record, Records
from . import data_cleaning as cleaning
from . import million_hypers as million
from . import one_pass
from . import optimizers as drop_in
from . import optimizers_report as drop_in_report

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Report:
    """table: of records under a title. remarks: what else there is to say of them. write: both,
    into a Markdown file, with the command that made them.
    """

    table: Callable[[Records, str], Table]
    remarks: Callable[[Records], Sequence[str]]
    write: Callable[[Path, Records, str], None]


@dataclass(frozen=True)
class BuiltIn:
    """cells: (options) -> (the cells, sentences on what is left out and why). work: a cell's
    record. measures: the columns of its table. options: names of what cells takes. report: in
    place of that table.
    """

    what: str
    cells: Callable[..., tuple[Sequence[Any], Sequence[str]]]
    work: Callable[[Any], Record]
    measures: Sequence[str] = ()
    options: Sequence[str] = ()
    report: Report | None = None


STUDIES: Mapping[str, BuiltIn] = {
    drop_in.NAME: BuiltIn(
        "every rule tuned, then used as an optimizer in a plain PyTorch loop",
        drop_in.drop_in_cells,
        drop_in.tune_and_train,
        options=("rules", "budget"),
        report=Report(drop_in_report.table, drop_in_report.remarks, drop_in_report.write),
    ),
    cleaning.NAME: BuiltIn(
        "a weight per training example, half of whose labels are wrong",
        cleaning.cleaning_cells,
        cleaning.clean,
        cleaning.MEASURES,
    ),
    million.NAME: BuiltIn(
        "an L2 weight per weight of a net, a million, learned in its one training",
        million.million_cells,
        million.learn_penalties,
        million.MEASURES,
    ),
    one_pass.NAME: BuiltIn(
        "AdamW's learning rate and weight decay learned in one training, from random starts",
        one_pass.one_pass_cells,
        one_pass.train_from_start,
        one_pass.MEASURES,
    ),
}


__all__ = ["STUDIES", "BuiltIn", "Report"]
