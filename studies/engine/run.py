"""A study's cells, each trained once: what is already on record is not done again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from ...inner.core.hyper import Tensors
from ...inner.registry import find_rule
from ...inner.schedules.schedule import find_schedule
from ...meta.problems.data import Split
from ...meta.problems.problem import Problem
from ...meta.training.loop import run_training
from ...meta.training.outcome import Outcome
from ...meta.training.training import Training
from ...search.folder_lock import sole_writer
from ...search.provenance import provenance
from ...search.route import choose_route
from ...search.space import Space
from ..problems import load_problem
from .executors import Executor, Failure, OnRay, Serial
from .record import Json, Measures, Record, Records, Tuned, append, key_of, plain, read

if TYPE_CHECKING:  # Workers need no pydantic classes beyond those they are sent.
    from .study import Arm, ProblemSpec, Study


@dataclass(frozen=True)
class Cell:
    """One training of a study."""

    study: str
    problem: ProblemSpec
    arm: Arm
    steps: int
    seed: int

    @property
    def inputs(self) -> dict[str, Json]:
        """All that decides the numbers, as JSON has it."""
        return {
            "problem": self.problem.model_dump(mode="json"),
            "arm": self.arm.model_dump(mode="json"),
            "steps": self.steps,
            "seed": self.seed,
        }


def run_study(
    study: Study,
    executor: Executor | None = None,
    address: str | None = None,
    out: str | Path | None = None,
    progress: Callable[[Record], object] | None = None,
) -> Records:
    """Train every cell of a study that out does not hold yet, and return all its records.

    A cell that raises leaves a record with the error, and is tried again by the next run.
    Interrupted by Ctrl-C, the records so far are returned. Arms that tune stop by the clock, so
    their numbers vary from run to run; those of all others do not.

    Args:
        study: problems, arms and seeds, as `read_study` reads them.
        executor: what trains cells, in place of an address; one after another without both.
        address: of a Ray cluster; "local" starts one on this machine's processors.
        out: a file of records, appended to as cells end; a second run in its folder meanwhile
            raises BlockingIOError.
        progress: a function that is given every record.
    """
    check(study)
    return run_cells(study.name, cells_of(study), train_cell, executor, address, out, progress)


class AnyCell(Protocol):
    """What a cell of any study has: inputs, all that decides its numbers, as JSON has it."""

    @property
    def study(self) -> str: ...

    @property
    def inputs(self) -> dict[str, Json]: ...


C = TypeVar("C", bound=AnyCell)


def run_cells(
    name: str,
    cells: Sequence[C],
    work: Callable[[C], Record],
    executor: Executor | None = None,
    address: str | None = None,
    out: str | Path | None = None,
    progress: Callable[[Record], object] | None = None,
) -> Records:
    """work on every cell that out does not hold yet, as `run_study` does on those of a study."""
    if executor is not None and address is not None:
        raise ValueError("give an executor or the address of a Ray cluster, not both")
    with _on_record(out) as done:
        waiting = [cell for cell in cells if key_of(cell.inputs) not in done]

        def keep(index: int, result: Record | Failure) -> None:
            record = _failed(waiting[index], result) if isinstance(result, Failure) else result
            if out is not None:
                append(out, record)
            done[record.key] = record
            if progress:
                progress(record)

        if waiting:
            try:
                with _executor(executor, address) as chosen:
                    chosen.map(work, waiting, keep)
            except KeyboardInterrupt:
                pass  # Records.missing says so.
    records = tuple(done[key] for cell in cells if (key := key_of(cell.inputs)) in done)
    return Records(name, records, len(cells) - len(records))


@contextmanager
def _on_record(out: str | Path | None) -> Iterator[dict[str, Record]]:
    """By key what out holds and need not run again, while no other run adds to it."""
    if out is None:
        yield {}
        return
    with sole_writer(Path(out).parent):
        yield {record.key: record for record in read(out) if record.error is None}


def cells_of(study: Study) -> list[Cell]:
    return [
        Cell(study.name, problem, arm, study.steps, seed)
        for problem in study.problems
        for arm in study.arms
        for seed in study.seeds
    ]


def check(study: Study) -> None:
    """Raise ValueError if a cell could not even begin, before any of them runs for hours."""
    for spec in study.problems:
        problem = _problem(spec)
        for arm in study.arms:
            try:
                training = _training(problem, arm, study.steps)
                if arm.learn:
                    space = Space(training, arm.learn)
                    choose_route(space, arm.route or "auto")
                    space.start()
                else:
                    training.start(())
            except (TypeError, ValueError) as error:
                raise ValueError(f"arm {arm.name!r} on {spec.label}: {error}") from error


def train_cell(cell: Cell) -> Record:
    """Tune if the arm asks for it, train once, and measure on what was held out."""
    training = _training(_problem(cell.problem), cell.arm, cell.steps)
    point: Tensors = {}
    tuned = None
    if cell.arm.learn:
        training, point, tuned = _tune(training, cell)
    began = time.perf_counter()
    resolved = training.resolve(point)
    run = run_training(training, resolved, cell.seed)
    seconds = time.perf_counter() - began
    measures: Measures = {}
    for split in _held_out(training.problem):
        measured = {"loss": math.nan}
        if run.ok:
            measured = training.measure(run.state, resolved.at(cell.steps - 1), split)
        measures[split] = {name: _finite(value) for name, value in measured.items()}
    trained = all(value is not None for split in measures.values() for value in split.values())
    return Record(
        study=cell.study,
        inputs=cell.inputs,
        outcome=Outcome.OK if trained else Outcome.DIVERGED,
        measures=measures,
        seconds=seconds,
        tuned=tuned,
        provenance=provenance(),
    )


def _tune(training: Training, cell: Cell) -> tuple[Training, Tensors, Tuned]:
    """The training with the options that were found, the values that were found, and how."""
    from ...search.tune import tune

    arm = cell.arm
    asked: dict[str, Any] = {"route": arm.route, "budget": arm.budget}
    began = time.perf_counter()
    result = tune(
        training.problem,
        training.rule,
        learn=arm.learn,
        steps=training.steps,
        schedules=training.schedules,
        granularity=training.granularity,
        values=training.values,
        seed=cell.seed,
        progress=False,
        **{name: value for name, value in asked.items() if value is not None},
    )
    if result.outcome is Outcome.INTERRUPTED:
        raise KeyboardInterrupt  # tune keeps its best point; a study must not record it as done.
    options = {name: value for name, value in result.options.items() if name in arm.learn}
    tuned = Tuned(
        hypers={name: plain(value) for name, value in result.hypers.items()},
        options={name: plain(value) for name, value in options.items()},
        loss=_finite(result.loss),
        outcome=result.outcome,
        route=result.route,
        reason=result.reason,
        seconds=time.perf_counter() - began,
    )
    return Space(training, arm.learn).at(options), result.hypers, tuned


def _held_out(problem: Problem) -> list[Split]:
    held_out: tuple[Split, ...] = ("valid", "test")
    return [split for split in held_out if split in problem.splits]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _problem(spec: ProblemSpec) -> Problem:
    return load_problem(spec.name, **spec.options)


def _training(problem: Problem, arm: Arm, steps: int) -> Training:
    return Training(
        problem,
        find_rule(arm.rule).choose(**arm.options),
        steps,
        schedules={name: find_schedule(spec) for name, spec in arm.schedules.items()},
        granularity=arm.granularity,
        values={
            name: torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
            for name, value in arm.values.items()
        },
    )


def _failed(cell: AnyCell, failure: Failure) -> Record:
    where = f" ({failure.where})" if failure.where else ""
    return Record(
        study=cell.study,
        inputs=cell.inputs,
        outcome=None,
        error=failure.error + where,
        provenance=provenance(),
    )


@contextmanager
def _executor(executor: Executor | None, address: str | None) -> Iterator[Executor]:
    """The executor to use; one that is started here is closed here."""
    if executor is not None:
        yield executor
    elif address is not None:
        with OnRay(address) as on_ray:
            yield on_ray
    else:
        yield Serial()


__all__ = ["AnyCell", "Cell", "cells_of", "check", "run_cells", "run_study", "train_cell"]
