"""Results of the study of every rule, as a table for a terminal and a section of a file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...inner.registry import find_rule
from ..engine.record import Record, Records
from ..engine.summary import group_of, spelled, spread
from ..measure.markdown import for_terminal, markdown, origin_of, write_section
from .optimizers import ARMS, FACTORS, NAME, SETTING, of_arm, rates_of, reached, scanned_of

if TYPE_CHECKING:
    from rich.table import Table

_HEADER = ["rule", "at defaults", "tuned", "accuracy", "reached", "route", "tuning s", "s"]
# Of the width of its range, how near to an edge of it a value is at that edge.
_EDGE = 0.01
_FEW = 10


def table(records: Records, title: str) -> Table:
    return for_terminal(title, [_HEADER, *map(_cells, _by_loss(records))], words=1)


def remarks(records: Records) -> list[str]:
    """How many rules reached the target, and why each of the others did not, as far as is known."""
    trained = [record for record in records if record.error is None]
    missed = [record for record in _by_loss(trained) if reached(record.measures) < SETTING.seeds]
    told = (
        f"{len(trained) - len(missed)} of {len(trained)} tuned rules end below a validation loss "
        f"of {SETTING.target:g} under all of {SETTING.seeds} seeds."
    )
    return [told, *(f"{_name(record)}: {why(record)}" for record in missed)]


def write(file: Path, records: Records, command: str) -> None:
    """Put the results into a Markdown file."""
    write_section(file, section(records, command), f"study {NAME}")


def section(records: Records, command: str) -> str:
    told, *missed = remarks(records)
    searched = [
        f"- {_name(record)}: searched, as {record.tuned.reason}"
        for record in _by_loss(records)
        if record.tuned
        and record.tuned.route == "search"
        and reached(record.measures) == SETTING.seeds
    ]
    failed = [f"- {_name(record)}: failed, {record.error}" for record in records if record.error]
    return "\n".join(
        [
            f"### Every rule as an optimizer: `{command}`",
            "",
            origin_of(command, ()),
            "",
            _introduction(records),
            "",
            markdown(_HEADER, [_cells(record) for record in _by_loss(records)]),
            "",
            told,
            *(["", *(f"- {each}" for each in missed)] if missed else []),
            *(["", *failed] if failed else []),
            *(["", "Of those that reached it:", "", *searched] if searched else []),
        ]
    )


def _introduction(records: Records) -> str:
    budgets = dict.fromkeys(f"{record.inputs['arm']['budget']:g}" for record in records)  # type: ignore[index, call-overload]  # a mapping
    return f"""\
Each rule is tuned for {" or ".join(budgets)} s on {SETTING.problem}, {SETTING.steps} steps, in its
learning rates (or what takes their place: reps_rel, d_coef) and in what it has of momentum, beta1,
beta2, beta, alpha, scale, gamma and weight_decay, from its defaults; rates fall along half a
cosine, but for rules that average weights. `result.optimizer(model)` and its scheduler then train
the same net in a plain PyTorch loop under {SETTING.seeds} seeds that tuning has not seen, beside
the optimizer at its defaults. Validation loss, mean and standard deviation; tuning saw these
examples, not these starts. "Reached" counts the tuned trainings that end below {SETTING.target:g};
seconds are of tuning and of one training. A rule that missed is listed with how far tuning came,
and with the best of one training at each of {len(FACTORS)} rates from 1/16 to 1024 times the tuned
one, the other numbers as tuned. Tuning stops by the clock, so numbers vary from run to run.
What is tuned, and where rates fall, was chosen on this very problem."""


def why(record: Record) -> str:
    """What the record tells of a rule that missed the target."""
    told = []
    diverged = of_arm(record.measures, "tuned", "valid", "loss").count(None)
    if diverged:
        told.append(f"{diverged} tuned trainings diverged")
    tuned = record.tuned
    if tuned is None:
        return "it was not tuned"
    count = int(record.measures["tuning"]["evaluations"] or 0)
    told.append(
        f"{', '.join(_moved(record))} in {count} evaluation{'s' * (count != 1)}"
        f"{', too few to go far' if count < _FEW else ''}"
    )
    if edge := [name for name, value in _values(record).items() if _at_edge(record, name, value)]:
        told.append(f"{', '.join(edge)} at the edge of its range")
    told += _scanned(record)
    if tuned.route == "search":
        told.append(f"searched, as {tuned.reason}")
    return "; ".join(told)


def _scanned(record: Record) -> Iterable[str]:
    """What a grid of rates says of the first seed: whether tuning could have gone further."""
    grid = {float(f): loss for f, loss in record.measures.get("rates", {}).items()}
    ended = {factor: loss for factor, loss in grid.items() if loss is not None}
    if not ended or record.tuned is None:
        return
    name = scanned_of(find_rule(_name(record)))
    best = min(ended, key=lambda factor: ended[factor])
    rate = best * _values(record)[name]
    yield f"of a grid around it {name} = {rate:.2g} is best, with {ended[best]:.3f}"
    low, high = find_rule(_name(record)).hypers[name].search
    if not low <= rate <= high:
        yield f"which is outside its range, {low:g} to {high:g}"
    elif best == max(grid):
        yield "the last of the grid"


def _moved(record: Record) -> Iterable[str]:
    """From where to where the learned rates went."""
    rule = find_rule(_name(record))
    for name, value in _values(record).items():
        if name in rates_of(rule):
            yield f"{name} {rule.hypers[name].default:.2g} → {value:.2g}"


def _at_edge(record: Record, name: str, value: float) -> bool:
    hyper = find_rule(_name(record)).hypers[name]
    low, high = hyper.box()
    at = _coordinate(hyper, value)
    # Where tuning starts outside its range, the range reaches there.
    return min(at - low, high - at) < _EDGE * (high - low)


def _coordinate(hyper: Any, value: float) -> float:
    if hyper.scale == "log":
        return math.log(value) if value > 0 else -math.inf
    if hyper.scale == "logit":
        return math.log(value / (1 - value)) if value > 0 else -math.inf
    return value


def _values(record: Record) -> dict[str, float]:
    """The tuned values of the rule's own hypers, of a scheduled one its peak."""
    hypers, tuned = find_rule(_name(record)).hypers, record.tuned.hypers if record.tuned else {}
    named = {name.removesuffix(".peak"): value for name, value in tuned.items()}
    # Learned hypers of this study are one number each.
    return {name: float(value) for name, value in named.items() if name in hypers}  # type: ignore[arg-type]


def _name(record: Record) -> str:
    return group_of(record)[1]


def _by_loss(records: Iterable[Record]) -> list[Record]:
    """Best first; what diverged or failed last."""

    def order(record: Record) -> float:
        loss = record.measures.get("valid", {}).get("loss")
        return math.inf if loss is None else loss

    return sorted(records, key=order)


def _cells(record: Record) -> Sequence[str]:
    if record.error is not None or record.tuned is None:
        return [_name(record), "failed", *["-"] * 6]
    return [
        _name(record),
        *(_spelled(of_arm(record.measures, arm, "valid", "loss")) for arm in ARMS),
        _spelled(of_arm(record.measures, "tuned", "valid", "accuracy")),
        f"{reached(record.measures)}/{SETTING.seeds}",
        record.tuned.route,
        f"{record.tuned.seconds:.0f}",
        f"{record.seconds or math.nan:.2f}",
    ]


def _spelled(values: Sequence[float | None]) -> str:
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        return f"{len(values) - len(finite)} of {len(values)} diverged"
    return spelled(spread(finite))


__all__ = ["remarks", "section", "table", "why", "write"]
