"""What the commands print."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ..meta.outcome import Outcome

if TYPE_CHECKING:
    from torch import Tensor

    from ..inner.rule import Rule
    from ..search.result import Result
    from ..studies.record import Record

_SHOWN = 4


def console() -> Console:
    """The terminal, or plain lines of 100 columns where there is none."""
    return Console(width=None if sys.stdout.isatty() else 100, highlight=False)


def show_result(result: Result, out: Path | None) -> None:
    """The learned values against the defaults, and how they were found."""
    screen = console()
    told = Table(title=f"{result.rule.name} on {result.settings['problem']}")
    for column in ("hyperparameter", "default", "learned"):
        told.add_column(column)
    for name in dict.fromkeys([*result.rule.hypers, *result.in_force]):
        before, after = result.defaults[name], result.in_force[name]
        if not before.equal(after):
            told.add_row(name, _spelled(before), _spelled(after))
    for name in sorted(set(result.options) & set(result.settings["learn"])):
        told.add_row(
            name,
            str(result.rule.choices[name].default) if name in result.rule.choices else "",
            str(result.options[name]),
        )
    screen.print(told)
    spread = max(result.losses) - min(result.losses) if len(result.losses) > 1 else None
    over = (
        f" (mean over {len(result.losses)} training seeds, range {spread:.4f})"
        if spread is not None
        else ""
    )
    screen.print(f"held-out loss {result.loss:.4f}{over} after {len(result.history)} evaluations")
    screen.print(f"route: {result.route}, because {result.reason}")
    if result.outcome is not Outcome.OK:
        screen.print(f"outcome: {result.outcome}: {result.outcome.sentence}")
    if out is not None:
        screen.print(f"kept in {out}: result.json, schedule.png; the same command goes on from it")


def run_study_file(file: Path, out: Path, address: str | None, serial: bool) -> None:
    """Run a study with a line of progress per cell, and print its table."""
    from ..studies.report import table
    from ..studies.run import run
    from ..studies.study import read_study

    screen = console()
    study = read_study(file)
    records = run(
        study,
        address=None if serial else address or "local",
        out=out / "records.jsonl",
        progress=lambda record: screen.print(one_line(record), style="dim"),
    )
    screen.print(table(records, title=study.name))


def one_line(record: Record) -> str:
    """A record as a line of progress."""
    arm, outcome = record.inputs["arm"], record.outcome or record.error
    told = arm["name"] if isinstance(arm, dict) else arm
    return f"{told}, seed {record.inputs['seed']}: {outcome}, {record.measures}"


def show_rules(rules: Mapping[str, Rule]) -> None:
    told = Table()
    for column in ("rule", "hyperparameters (default)", "options", "buffers"):
        told.add_column(column)
    for name, rule in rules.items():
        hypers = ", ".join(f"{n} ({h.default:g})" for n, h in rule.hypers.items())
        options = ", ".join(f"{n}={v}" for n, v in rule.options().items())
        told.add_row(name, hypers, options, ", ".join(rule.slots))
    console().print(told)


def show_problems() -> None:
    from ..studies.problems import PROBLEMS

    told = Table()
    for column in ("problem", "what"):
        told.add_column(column)
    for name, make in PROBLEMS.items():
        told.add_row(name, (make.__doc__ or "").partition("\n")[0])
    console().print(told)


def _spelled(value: Tensor) -> str:
    numbers = value.flatten().tolist()
    if len(numbers) > _SHOWN and len(set(numbers)) == 1:
        return f"{numbers[0]:.4g} throughout"
    if len(numbers) > _SHOWN:
        picked = [numbers[i * (len(numbers) - 1) // (_SHOWN - 1)] for i in range(_SHOWN)]
        return " … ".join(f"{x:.3g}" for x in picked)
    return ", ".join(f"{x:.4g}" for x in numbers)
