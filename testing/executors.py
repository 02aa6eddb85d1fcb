"""What every executor promises: results in order, failures as data, progress as it goes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..studies.engine.executors import Executor, Failure
from .contracts import Check, run_checks

_CELLS = list(range(8))


def _square(x: int) -> int:
    return x * x


def _odd_ones_fail(x: int) -> int:
    if x % 2:
        raise ValueError(f"{x} is odd")
    return x


def _in_order(executor: Executor) -> None:
    found = executor.map(_square, _CELLS)
    assert found == [x * x for x in _CELLS], f"map(square, {_CELLS}) is {found}"
    assert executor.map(_square, []) == [], "map(square, []) is not []"


def _failures(executor: Executor) -> None:
    found = executor.map(_odd_ones_fail, _CELLS)
    assert [x for x in found if not isinstance(x, Failure)] == _CELLS[::2], f"it gives {found}"
    failed = [x for x in found if isinstance(x, Failure)]
    said = [x.error for x in failed]
    assert said == [f"ValueError: {x} is odd" for x in _CELLS[1::2]], f"failures say {said}"


def _progress(executor: Executor) -> None:
    seen: dict[int, object] = {}
    found = executor.map(_square, _CELLS, lambda index, result: seen.update({index: result}))
    assert seen == dict(enumerate(found)), f"progress saw {seen}"


def _interrupt(executor: Executor) -> None:
    seen: list[int] = []

    def stop(index: int, result: object) -> None:
        seen.append(index)
        raise KeyboardInterrupt

    try:
        executor.map(_square, _CELLS, stop)
    except KeyboardInterrupt:
        assert len(seen) == 1, f"after an interrupt {len(seen) - 1} more cells were told of"
    else:
        raise AssertionError("an interrupt in progress did not come through")
    again = executor.map(_square, _CELLS)
    assert again == [x * x for x in _CELLS], f"after an interrupt map gives {again}"


def executor_checks(executor: Executor) -> Iterator[Check]:
    """The contract of an executor, a check per property.

    Args:
        executor: to be checked.
    """
    yield Check(
        "results come in the order of cells",
        partial(_in_order, executor),
        "put results back by their cell's index",
    )
    yield Check(
        "a cell that raises is a Failure, and the others are done",
        partial(_failures, executor),
        "catch what a cell raises and return Failure.of(error)",
    )
    yield Check(
        "progress is told of every cell",
        partial(_progress, executor),
        "call progress(index, result) in this process as each cell ends",
    )
    yield Check(
        "an interrupt ends it, and it can be used again",
        partial(_interrupt, executor),
        "let what progress raises through, and give up cells that still run",
    )


def check_executor(executor: Executor) -> None:
    """Raise AssertionError unless an executor holds what every executor promises.

    Args:
        executor: one of your own.
    """
    run_checks(f"the executor {type(executor).__name__}", executor_checks(executor))


__all__ = ["check_executor", "executor_checks"]
