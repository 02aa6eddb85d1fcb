"""Studies that come with the package, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import cleaning, million, one_pass
from .record import Record


@dataclass(frozen=True)
class BuiltIn:
    """cells: () -> (the cells, sentences on what is left out and why). work: a cell's record.
    measures: the columns of its table.
    """

    what: str
    cells: Callable[[], tuple[Sequence[Any], Sequence[str]]]
    work: Callable[[Any], Record]
    measures: Sequence[str]


STUDIES: Mapping[str, BuiltIn] = {
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


__all__ = ["STUDIES", "BuiltIn"]
