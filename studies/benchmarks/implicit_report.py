"""Results of the benchmark of implicit hypergradients, as tables for a terminal and a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..measure.markdown import (
    doubtful_peak,
    for_terminal,
    in_mib,
    markdown,
    origin_of,
    spread,
    write_section,
)
from .implicit import OURS, PLAIN, ImplicitResult, SolveRow
from .implicit_peers import IMPLICIT_PEERS, SOLVERS

if TYPE_CHECKING:
    from rich.table import Table

NAME = "implicit"


def table(result: ImplicitResult) -> Table:
    """One case for a terminal: a row per solver and method, a column per quantity."""
    return for_terminal(f"{result.case}: {_described(result)}", _cells(result), words=3)


def remarks(result: ImplicitResult) -> list[str]:
    """A sentence for who is ahead with each solver, and for everything that a row lacks."""
    told = []
    for solver in SOLVERS:
        if found := result.ahead(solver):
            peer, ratios = found
            told.append(
                f"{result.case}, {solver}: the fastest peer, {peer}, takes {spread(ratios)} times "
                "as long as the fastest of ours"
            )
    for row in result.rows:
        told += [f"{result.case}, {row.method}, {row.solver}: {row.left_out}"] * bool(row.left_out)
    return list(dict.fromkeys(told))


def write(file: Path, result: ImplicitResult, command: str) -> None:
    """Put a case's measurements, and how to read them, into a Markdown file."""
    write_section(file, _introduction(), NAME)
    write_section(file, section(result, command), f"{NAME} {result.case}")


def section(result: ImplicitResult, command: str) -> str:
    """The Markdown of one case."""
    packages = [peer.package for peer in IMPLICIT_PEERS.values() if not peer.missing]
    header, *rows = _cells(result)
    bold = [[row[0], f"**{row[1]}**", *row[2:]] if row[1] in OURS else row for row in rows]
    return "\n\n".join(
        [
            f"### {result.case}",
            f"{_described(result)}. {origin_of(command, packages)}",
            f"Medians (lowest-highest) of {len(result.seconds)} rounds."
            f"{doubtful_peak(result.exact_memory)}",
            markdown(header, bold),
            "\n".join(f"- {told}." for told in remarks(result)),
        ]
    )


def _introduction() -> str:
    notes = [f"- {peer.name}: {peer.note}." for peer in IMPLICIT_PEERS.values()]
    return "\n\n".join(
        [
            "## One implicit hypergradient",
            "The gradient of the held-out loss in one L2 penalty per weight, at the optimum that "
            "full-batch training leads to, by conjugate gradients and by Neumann's series, by this "
            "project (bold) and by others: same weights, batch, number of products with the "
            "Hessian and step size, one thread, float32, compiled code at hand. Time is in units "
            "of as many full-batch steps of `torch.optim.SGD`, in the same round. Memory is the "
            "growth over resting memory of a second call in a fresh process. Error (relative) and "
            "cosine are in float64 against the whole Hessian, solved directly: so much is what so "
            "few products leave, whoever makes them.",
            "\n".join(
                [
                    '- compiled, no compiler: `Implicit(compile=True)`, `compile="trace"`; both '
                    "compute once what all products share. Solvers have check=False: like those "
                    "of others they make no product to see what the solve left.",
                    *notes,
                ]
            ),
        ]
    )


def _described(result: ImplicitResult) -> str:
    return f"{result.what}; {result.products} products, step size {result.step_size:.3g}"


def _cells(result: ImplicitResult) -> list[list[str]]:
    """The header and a row per method and solver, after one for plain training."""
    plain = f"{spread(result.seconds)} s"
    return [
        ["solver", "method", "time / plain", "MiB", "error", "cosine"],
        ["", PLAIN, plain, in_mib(result.mib), "", ""],
        *(
            [row.solver, row.method, _ratio(row), in_mib(row.mib), *_judged(row)]
            for row in result.rows
        ),
    ]


def _ratio(row: SolveRow) -> str:
    return spread(row.ratios) if row.ratios else "left out" if row.left_out else "-"


def _judged(row: SolveRow) -> list[str]:
    if row.error is None or row.cosine is None:
        return ["-", "-"]
    return [f"{row.error:.2g}", f"{row.cosine:.4f}"]


__all__ = ["remarks", "section", "table", "write"]
