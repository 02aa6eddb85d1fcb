"""Estimators side by side on one problem, against an exact gradient: which of them to use."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..inner.core.hyper import Tensors
from ..inner.core.messages import unknown
from .problems.seeding import fold_in
from .reverse.replay import Replay
from .training.coordinates import Coordinates
from .training.estimate import Estimate, Estimator
from .training.finite_differences import directional_difference
from .training.state import State
from .training.training import Training

if TYPE_CHECKING:
    from rich.table import Table

Reference = Literal["replay", "differences"]

# Directions of finite differences where the reference is them, and gradients timed per method.
_DIRECTIONS, _TIMED = 8, 5
_EXACT, _COLOR = 1e-9, "#0b63b0"


@dataclass(frozen=True)
class MethodRow:
    """One method. estimate: what it returned, None if it raised. refused: what it raised. cosine,
    error: with the reference, in unconstrained coordinates; error relative to its norm; NaN where
    there is no gradient. seconds: of the call; what had to be traced or compiled is in that of the
    first that needed it, the reference before all.
    """

    method: str
    estimate: Estimate | None
    refused: str
    cosine: float
    error: float
    seconds: float

    @property
    def said(self) -> str:
        """In words, how it went or why not."""
        if self.estimate is None:
            return self.refused
        note = self.estimate.note
        return note.how if self.estimate.ok else note.reason or note.outcome.sentence


@dataclass(frozen=True)
class Comparison:
    """str() is the table, plot() the picture. rows: in the order asked for. against: what the
    reference is. gradient_seconds: of one gradient of the training loss, the unit of cost.
    """

    title: str
    against: str
    gradient_seconds: float
    rows: list[MethodRow] = field(default_factory=list)

    def __getitem__(self, method: str) -> MethodRow:
        rows = {row.method: row for row in self.rows}
        if method not in rows:
            raise KeyError(unknown("there is no row", method, rows))
        return rows[method]

    def gradients(self, row: MethodRow) -> float:
        """What a row cost, in gradients of the training loss."""
        return row.seconds / self.gradient_seconds

    def table(self) -> Table:
        """For rich."""
        from rich.box import SIMPLE
        from rich.table import Table

        shown = Table(title=self.title, caption=f"against {self.against}", box=SIMPLE)
        shown.add_column("method")
        for name in ("cosine", "error", "gradients", "seconds"):
            shown.add_column(name, justify="right")
        shown.add_column("how")
        for row in self.rows:
            shown.add_row(
                row.method,
                "" if math.isnan(row.cosine) else f"{row.cosine:.4f}",
                "" if math.isnan(row.error) else f"{row.error:.1e}",
                f"{self.gradients(row):,.0f}",
                f"{row.seconds:.3g}",
                row.said,
            )
        return shown

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        text = StringIO()
        Console(file=text, width=100).print(self.table())
        return text.getvalue().rstrip()

    def plot(self, path: str | Path) -> None:
        """Error and cost, a line per method, the most exact at the top; the path's ending chooses
        the format.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        rows = sorted(self.rows, key=lambda row: (not math.isnan(row.error), -row.error))
        figure = Figure(figsize=(8.5, 1.6 + 0.28 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        error, cost = figure.subplots(1, 2, sharey=True)
        names = [
            f"{row.method} (no gradient)" if math.isnan(row.error) else row.method for row in rows
        ]
        for ax in (error, cost):
            ax.set_xscale("log")
            ax.grid(axis="x", alpha=0.3)
            ax.set_yticks(range(len(rows)), names)
        # What is nearer than this is exact for any purpose, and 0 has no place on the scale.
        error.plot([max(row.error, _EXACT) for row in rows], range(len(rows)), "o", color=_COLOR)
        error.set_xlim(_EXACT / 3, 30)
        error.axvline(1, color="#8a8a8a", lw=0.8, ls="--")
        error.set_xlabel(f"relative error against\n{self.against}")
        cost.plot([self.gradients(row) for row in rows], range(len(rows)), "o", color=_COLOR)
        cost.set_xlabel("cost in gradients of the training loss")
        figure.suptitle(self.title)
        figure.savefig(path, dpi=120)


def compare(
    training: Training,
    point: Tensors,
    methods: Mapping[str, Estimator],
    *,
    reference: Reference | Estimator = "replay",
    seed: int = 0,
    watch: Callable[[MethodRow], object] = lambda row: None,
) -> Comparison:
    """Every method once at the same point and seed, against a reference.

    reference: "replay" is exact for the training as it is, "differences" stands for central
    differences along eight random directions, all there is where nothing can be differentiated;
    what replay refuses is done by these. Or any estimator, such as Implicit(solve=dense()) for the
    limit of training. watch is given every row when it is there.

    A method that raises is a row that says so.
    """
    if not methods:
        raise ValueError("no method was given; name at least one, such as 'implicit'")
    space = Coordinates({name: training.hypers[name] for name in point})
    z = space.free(point)
    judge, against = _judge(training, point, space, z, reference, seed)
    units, rows = _timed_gradients(training, point, seed), []
    for name, method in methods.items():
        began, refused, estimate = time.perf_counter(), "", None
        try:
            estimate, _ = method(training, point, None, seed=seed)
        except Exception as error:  # Of whatever kind: its row says so, the others are kept.
            refused = str(error) or type(error).__name__
        seconds = time.perf_counter() - began
        units += _timed_gradients(training, point, seed)
        cosine = error_ = math.nan
        if estimate is not None and estimate.ok:
            cosine, error_ = judge(space.pull(z, estimate.grad))
        rows.append(MethodRow(name, estimate, refused, cosine, error_, seconds))
        watch(rows[-1])
    title = f"{training.label}, {training.steps} steps, d loss / d {', '.join(point)}"
    return Comparison(title, against, median(units), rows)


def _judge(
    training: Training,
    point: Tensors,
    space: Coordinates,
    z: Tensor,
    reference: Reference | Estimator,
    seed: int,
) -> tuple[Callable[[Tensor], tuple[float, float]], str]:
    """((cosine, relative error) of a gradient in the coordinates, what they are against)."""
    if isinstance(reference, str) and reference not in ("replay", "differences"):
        raise ValueError(unknown("there is no reference", reference, ["replay", "differences"]))
    because = ""
    if reference != "differences":
        method = Replay() if isinstance(reference, str) else reference
        exact, _ = method(training, point, None, seed=seed)
        if exact.ok:
            told = "replay, exact for this training" if reference == "replay" else repr(method)
            return _against(space.pull(z, exact.grad)), told
        because = f", as the reference failed: {exact.note.reason}"
    draw = torch.Generator().manual_seed(fold_in(seed, 0, 9))
    directions = torch.randn(_DIRECTIONS, len(z), dtype=torch.float64, generator=draw)
    directions /= directions.norm(dim=1, keepdim=True)
    through = space.pull(z, {name: torch.ones_like(v) for name, v in point.items()})
    slopes = [
        directional_difference(
            training, point, space.layout.unflatten(direction * through), seed=seed
        )
        for direction in directions
    ]
    judge = _against(torch.tensor(slopes, dtype=torch.float64))
    told = f"finite differences along {_DIRECTIONS} directions{because}"
    return lambda g: judge(directions @ g), told


def _against(exact: Tensor) -> Callable[[Tensor], tuple[float, float]]:
    size = float(exact.norm())

    def judge(found: Tensor) -> tuple[float, float]:
        if size == 0:
            return math.nan, math.nan
        cosine = float(found @ exact) / (size * max(float(found.norm()), 1e-300))
        return cosine, float((found - exact).norm()) / size

    return judge


def _timed_gradients(training: Training, point: Tensors, seed: int) -> list[float]:
    """Seconds of single gradients of the training loss at the start of training."""
    with torch.no_grad():
        values = training.resolve(point).at(0)
        state = training.begin(values, seed)
    found = []
    for i in range(_TIMED):
        began = time.perf_counter()
        _gradient(training, state, values, i, seed)
        found.append(time.perf_counter() - began)
    return found


def _gradient(training: Training, state: State, values: Tensors, i: int, seed: int) -> None:
    p = state.p.detach().requires_grad_()
    loss, _ = training.inner_loss(state._replace(p=p), values, i, seed)
    (g,) = torch.autograd.grad(loss, p)
    g[0].item()  # A GPU has done it only now.


__all__ = ["Comparison", "MethodRow", "compare"]
