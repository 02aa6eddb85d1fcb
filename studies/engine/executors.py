"""Where the cells of a study run: one after another here, or as Ray tasks on any cluster."""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch

C = TypeVar("C")
R = TypeVar("R")

# ray.wait looks at every task it is given each time; a cluster needs no more than this in flight.
_IN_FLIGHT = 1000
# A lost machine is forgiven; a cell that ends its process each time should not do so for hours.
_RETRIES = 1


@dataclass(frozen=True)
class Failure:
    """Why a cell has no result. where: the innermost line, such as "hyper.py:71 in check"."""

    error: str
    where: str = ""

    @staticmethod
    def of(error: Exception) -> Failure:
        frames = traceback.extract_tb(error.__traceback__)
        last = frames[-1]
        where = f"{os.path.basename(last.filename)}:{last.lineno} in {last.name}"
        return Failure(f"{type(error).__name__}: {error}", where)


class Executor(Protocol):
    """Runs a function on cells that do not depend on each other."""

    def map(
        self,
        function: Callable[[C], R],
        cells: Sequence[C],
        progress: Callable[[int, R | Failure], object] | None = None,
    ) -> list[R | Failure]:
        """The results in the order of cells, a Failure where one raised.

        progress(index, result) is called here as each cell ends, in any order. When interrupted,
        the cells that still run are given up; what progress has seen is what there is.
        """
        ...


class Serial:
    """One cell after another in this process."""

    def map(
        self,
        function: Callable[[C], R],
        cells: Sequence[C],
        progress: Callable[[int, R | Failure], object] | None = None,
    ) -> list[R | Failure]:
        results: list[R | Failure] = []
        for index, cell in enumerate(cells):
            results.append(_attempt(function, cell))
            if progress:
                progress(index, results[-1])
        return results


class OnRay:
    """One Ray task per cell, with the same numbers as Serial on the same kind of processor.

    address: of a running cluster, as ray.init takes it; without one, that in RAY_ADDRESS, or else
    Ray is started on this machine. An already connected Ray is used as it is. Leaving the `with`
    block disconnects (and stops) what was started here. A cell whose process dies is tried
    once more, then becomes a Failure.
    """

    def __init__(self, address: str | None = None, cpus_per_cell: float = 1) -> None:
        self.address, self.cpus_per_cell = address, cpus_per_cell
        self._started = False

    def __enter__(self) -> OnRay:
        self._start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._started:
            import ray

            ray.shutdown()
            self._started = False

    def map(
        self,
        function: Callable[[C], R],
        cells: Sequence[C],
        progress: Callable[[int, R | Failure], object] | None = None,
    ) -> list[R | Failure]:
        self._start()
        results: dict[int, R | Failure] = {}
        with closing(_tasks(function, cells, self.cpus_per_cell)) as ended:
            for index, result in ended:
                results[index] = result
                if progress:
                    progress(index, result)
        return [results[index] for index in range(len(cells))]

    def _start(self) -> None:
        # Ray's own default would join whatever was last started here, or wait for it.
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        # Ray reads this when it is imported.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            import ray

            if not ray.is_initialized():
                ray.init(
                    address=address,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
                self._started = True
        largest = max(node["Resources"].get("CPU", 0) for node in _nodes() if node["Alive"])
        if address == "local" and self.cpus_per_cell > largest:
            self.close()
            raise ValueError(
                f"cpus_per_cell={self.cpus_per_cell:g} but no machine of this Ray has more than "
                f"{largest:g}; no cell would ever start"
            )


def _nodes() -> list[dict[str, Any]]:
    import ray

    return ray.nodes()  # type: ignore[no-any-return,no-untyped-call]  # ray has no types for it


def _tasks(
    function: Callable[[C], R], cells: Sequence[C], cpus: float
) -> Generator[tuple[int, R | Failure]]:
    """(index, result) of each cell as its task ends; closed early, it cancels the others."""
    import ray

    task: Any = ray.remote(num_cpus=cpus, max_retries=_RETRIES)(_attempt)
    shared = ray.put(function)
    waiting = iter(enumerate(cells))
    running: dict[Any, int] = {}
    try:
        while True:
            for index, cell in islice(waiting, _IN_FLIGHT - len(running)):
                running[task.remote(shared, cell)] = index
            if not running:
                return
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            try:
                result = ray.get(done)
            except ray.exceptions.RayError as error:
                result = Failure(f"{type(error).__name__}: {error}")  # Its lines are Ray's own.
            yield running.pop(done), result
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _attempt(function: Callable[[C], R], cell: C) -> R | Failure:
    with _one_thread():
        try:
            return function(cell)
        except Exception as error:
            return Failure.of(error)


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch on one thread inside: how a sum is split among threads decides its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


__all__ = ["Executor", "Failure", "OnRay", "Serial"]
