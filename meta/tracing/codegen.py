"""Generated code for a traced graph, by torch's inductor."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...inner.fx_graph import Graph, first_line
from ...inner.torch_internals import Refused, Run, generate_code

# Inductor on CPU lays convolutions out anew and then returns wrong derivatives where weights are
# slices of one vector; and its own random numbers are not the ones that an eager step draws.
OPTIONS: dict[str, Any] = {"layout_optimization": False, "fallback_random": True}


@contextmanager
def _quietly() -> Iterator[None]:
    """What torch warns of inside itself is nothing a user could change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def generate(graph: Graph, spent: Callable[[float], None] = lambda seconds: None) -> Run:
    """Generated code for a graph, made at its first call; Refused if that fails.

    By inductor itself, which torch.compile would reach through dynamo: the graph is traced already,
    with fixed shapes, and dynamo would look at every Python frame that runs while it does. Inputs
    must be contiguous, as they were at the first call.
    """
    made: list[Run] = []

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        if not made:
            began = time.monotonic()
            try:
                with torch.no_grad(), _quietly():
                    made.append(generate_code(graph, inputs, OPTIONS))
                with torch.no_grad():
                    return made[0](*inputs)
            except Refused:
                raise
            except Exception as error:  # Any part of the compiler may refuse a model.
                made.clear()
                raise Refused(f"it cannot be compiled: {first_line(error)}") from error
            finally:
                spent(time.monotonic() - began)
        return made[0](*inputs)

    return run
