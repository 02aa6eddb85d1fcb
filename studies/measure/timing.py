"""Times in rounds, and memory in a process of its own."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, TypeVar

from .memory_meter import give_back

Say = Callable[[str], object]
K = TypeVar("K")


class Grown(NamedTuple):
    """Memory a method took in a process of its own, or why it was not run. seconds, how: of that
    one call.
    """

    mib: float | None
    exact: bool = True
    left_out: str = ""
    seconds: float = 0.0
    how: str = ""


def interleaved(
    methods: Mapping[K, Callable[[], Any]],
    repeats: int,
    say: Say,
    called: Callable[[K], str] = str,
    synchronize: Callable[[], object] = lambda: None,
) -> tuple[dict[K, list[float]], dict[K, Any]]:
    """(seconds of every method in every round, after one that does not count; its last answer).

    Methods follow each other in every round, so that whatever slows the machine down for a while
    slows all of them. synchronize: waits for what a device still does.
    """
    seconds: dict[K, list[float]] = {name: [] for name in methods}
    answers: dict[K, Any] = {}
    for i in range(repeats + 1):
        for name, method in methods.items():
            say(f"time, round {i} of {repeats}, {called(name)}")
            gc.collect()
            synchronize()
            begun = time.perf_counter()
            answers[name] = method()
            synchronize()
            seconds[name].append(time.perf_counter() - begun)
    give_back()
    return {name: times[1:] for name, times in seconds.items()}, answers


def run_isolated(measure: Callable[..., Grown], *inputs: Any, limit: float | None = None) -> Grown:
    """What measure(*inputs) says in a process that did nothing else, and that is ended when it took
    longer than a limit in seconds.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        try:
            number = process.submit(os.getpid).result()
            return process.submit(measure, *inputs).result(limit)
        except BrokenProcessPool:
            return Grown(None, left_out="its process ended early; the system may have killed it")
        except TimeoutError:
            # A kernel that takes minutes does not hear of Python's own ways to stop.
            os.kill(number, signal.SIGTERM)
            return Grown(None, left_out=f"its process was ended after {limit:g} s")


def reason(error: Exception) -> str:
    """An error of whatever kind another library raises, in one line."""
    first, _, _ = str(error).strip().partition("\n")
    return f"{type(error).__name__}: {first}"


def check_repeats(repeats: int) -> None:
    if repeats < 1:
        raise ValueError(f"repeats={repeats} measures nothing; give at least 1, better 5")


__all__ = ["Grown", "Say", "check_repeats", "interleaved", "reason", "run_isolated"]
