"""What the commands print."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ..inner.core.messages import unknown
from ..inner.registry import WRAPPERS
from ..meta.training.outcome import Outcome
from .catalogue import memory

if TYPE_CHECKING:
    from torch import Tensor

    from ..inner.core.rule import Rule
    from ..search.result import Result
    from ..studies.engine.record import Record, Records
    from ..studies.library.registry import Report

INTERRUPTED = "interrupted; the same command goes on from here"
_SHOWN = 4


def console() -> Console:
    """The terminal, or plain lines of 100 columns where there is none."""
    return Console(width=None if sys.stdout.isatty() else 100, highlight=False)


@contextmanager
def telling(screen: Console) -> Iterator[Callable[[str], object]]:
    """What is being done: in place on a terminal, a line each elsewhere."""
    if screen.is_terminal:
        with screen.status("") as status:
            yield status.update
    else:
        yield lambda told: screen.print(told, style="dim", markup=False)


def show_result(result: Result, out: Path | None) -> None:
    """The learned values against the defaults, and how they were found."""
    screen = console()
    told = Table(title=f"{result.rule.name} on {result.settings['problem']}")
    for column in ("hyperparameter", "default", "learned"):
        told.add_column(column)
    learned = {name.partition(".")[0] for name in result.hypers}
    for name in dict.fromkeys([*result.rule.hypers, *result.in_force]):
        before, after = result.defaults[name], result.in_force[name]
        if name in learned or not before.equal(after):
            told.add_row(name, _spelled(before), _spelled(after))
    for name in sorted(set(result.options) & set(result.settings["learn"])):
        told.add_row(
            name,
            str(result.rule.choices[name].default) if name in result.rule.choices else "",
            str(result.options[name]),
        )
    screen.print(told)
    screen.print(f"held-out loss {result.loss:.4f}, {_how_sure(result)}")
    screen.print(f"route: {result.route}, because {result.reason}")
    if result.outcome is not Outcome.OK:
        screen.print(f"outcome: {result.outcome}: {result.outcome.sentence}")
    if out is not None:
        screen.print(f"kept in {out}: result.json, schedule.png; the same command goes on from it")


def _how_sure(result: Result) -> str:
    """What the held-out loss is the loss of."""
    evaluations = f"{len(result.history)} evaluations"
    if not result.losses:
        return f"the lowest of {evaluations} with a seed each, so partly luck"
    low, high = min(result.losses), max(result.losses)
    seeds = f"{len(result.losses)} fresh training seeds ({low:.4f} to {high:.4f})"
    return f"the mean over {seeds}, after {evaluations}"


def show_study(
    file: Path,
    out: Path,
    address: str | None,
    serial: bool,
    *,
    options: Mapping[str, str] | None = None,
    into: Path | None = None,
) -> int:
    """Run a study from a file or by name with a line of progress per cell, and print its table; the
    exit code. options: of a study that has some. into: a Markdown file for its section.
    """
    from ..studies.engine.run import run_cells, run_study
    from ..studies.engine.study import read_study
    from ..studies.library.registry import STUDIES

    screen = console()
    given: dict[str, Any] = {
        "address": None if serial else address or "local",
        "out": out / "records.jsonl",
        "progress": lambda record: screen.print(one_line(record), style="dim", markup=False),
    }
    name = str(file)
    options = options or {}
    if name not in STUDIES and (file.suffix or file.exists()):
        _refuse(name, options, (), into is not None)
        study = read_study(file)
        return show_records(run_study(study, **given), study.name)
    if name not in STUDIES:
        raise ValueError(unknown("there is neither a file nor a study", name, STUDIES))
    built_in = STUDIES[name]
    _refuse(name, options, built_in.options, into is not None and built_in.report is None)
    cells, left_out = built_in.cells(**options)
    for told in left_out:
        screen.print(told, markup=False)
    records = run_cells(name, cells, built_in.work, **given)
    if into is not None and built_in.report is not None and records.records:
        said = "".join(f" --{option} {value}" for option, value in options.items())
        built_in.report.write(into, records, f"hyperdescent study {name} --out {out}{said}")
        screen.print(f"kept in {into}", markup=False)
    return show_records(records, name, built_in.measures, built_in.report)


def _refuse(name: str, options: Mapping[str, str], known: Sequence[str], no_section: bool) -> None:
    """Raise ValueError for what a study does not take."""
    for option in options:
        if option not in known:
            raise ValueError(f"the study {name} takes no --{option}")
    if no_section:
        raise ValueError(f"the study {name} writes no Markdown; its records are in --out")


def show_records(
    records: Records,
    title: str,
    measures: Sequence[str] | None = None,
    report: Report | None = None,
) -> int:
    """The table of a study, and what is not in it; the exit code, 0 if nothing is."""
    from ..studies.engine.summary import table

    screen = console()
    if records.records:
        screen.print(report.table(records, title) if report else table(records, title, measures))
    for told in report.remarks(records) if report else ():
        screen.print(told, markup=False)
    failed = [record for record in records if record.error]
    if failed:
        told = f"{len(failed)} of {len(records)} cells failed, first {one_line(failed[0])}"
        screen.print(told, markup=False)
    if records.missing:
        screen.print(INTERRUPTED)
        return 130
    return 1 if failed else 0


def one_line(record: Record) -> str:
    """A record as a line of progress, such as "adam on wine-mlp, seed 3: valid loss 0.1234"."""
    from ..studies.engine.summary import group_of

    problem, arm = group_of(record)
    return f"{arm} on {problem}, seed {record.inputs['seed']}: {_ended(record)}"


def _ended(record: Record) -> str:
    if record.outcome is not Outcome.OK:
        return str(record.outcome or record.error)
    loss = record.measures.get("valid", {}).get("loss")
    if loss is not None:
        return f"valid loss {loss:.4f}"
    return ", ".join(
        f"{split} {name} {value:.3g}"
        for split, measured in record.measures.items()
        for name, value in measured.items()
        if value is not None
    )


def show_rules(rules: Mapping[str, Rule]) -> None:
    told = Table()
    for column in ("rule", "hyperparameters: default (tuned in)", "options", "memory"):
        told.add_column(column)
    for name, rule in rules.items():
        hypers = ", ".join(
            f"{n} {h.default:g} ({h.search[0]:g} to {h.search[1]:g})"
            for n, h in rule.hypers.items()
        )
        options = ", ".join(f"{n}={v}" for n, v in rule.options().items())
        told.add_row(name, hypers, options, memory(rule))
    console().print(told)
    console().print(
        "Wrappers, as in clip_norm(adamw, max_norm=0.5): " + ", ".join(WRAPPERS), markup=False
    )


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
