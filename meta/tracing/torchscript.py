"""A traced graph as a TorchScript function: the same operations, without Python between them.

Python takes one to three microseconds to reach an operation, which on small models is more than
the operation itself. Nothing is fused or reordered, so the bits are those of the graph.

TorchScript is deprecated, and stays for as long as it is there: the same graph as the Python that
torch.fx writes takes 1.35 to 1.4 times as long on the benchmark's w1-adam (182 beside 130 ms, by
autograd 199) and 1.09 to 1.15 times on w3; with torch's functions called in the place of its
operators, still 1.17 times. Without TorchScript that Python is what runs, and `how` says so.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from ...inner.fx_graph import Graph, first_line, graph_io
from ...inner.torch_internals import Refused, Run, unfused


def scripted(graph: Graph, say: Callable[[str], None] = lambda why: None) -> Run:
    """The graph as a TorchScript function; the graph itself where TorchScript cannot say it, and
    say is told why.
    """
    constants = [n for n in graph.graph.nodes if n.op == "get_attr"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It is deprecated, and by what is not there without.
            run = torch.jit.CompilationUnit(_source(graph, constants)).step
            unfused()  # Which it is to run in, on a GPU.
    except Exception as error:  # Whatever its compiler says of an operation that it does not know.
        say(str(error) if isinstance(error, Refused) else first_line(error))
        return graph
    held = [getattr(graph, str(n.target)) for n in constants]

    def run_unfused(*inputs: Tensor) -> Sequence[Tensor]:
        # On a GPU TorchScript would fuse: it compiles for a minute, and what it makes rounds
        # otherwise.
        with unfused() if inputs[0].is_cuda else nullcontext():
            return run(*inputs, *held)  # type: ignore[no-any-return]  # as its source says

    return run_unfused


def _source(graph: Graph, constants: Sequence[fx.Node]) -> str:
    inputs, outputs = graph_io(graph)
    takes = ", ".join(f"{n.name}: Tensor" for n in [*inputs, *constants])
    lines = [f"def step({takes}) -> List[Tensor]:"]
    for n in graph.graph.nodes:
        if n.op != "call_function":
            continue
        if n.target is operator.getitem:
            said = f"{_said(n.args[0])}[{n.args[1]}]"
        else:
            space, name = n.target.name().partition(".")[0].split("::")
            given = [*map(_said, n.args), *(f"{k}={_said(v)}" for k, v in n.kwargs.items())]
            said = f"torch.ops.{space}.{name}({', '.join(given)})"
        lines.append(f"    {n.name} = {said}")
    lines.append(f"    return [{', '.join(n.name for n in outputs)}]\n")
    return "\n".join(lines)


def _said(value: Any) -> str:
    """An argument as TorchScript writes it."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_said, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    return repr(value)
