"""Pictures of what was learned: schedules, held-out curves, and how the search went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from ..inner.core.hyper import Tensors
from ..inner.core.rule import Rule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DEFAULT = "#8a8a8a"
_OTHERS = ("#0b63b0", "#c2571a", "#2f7d32", "#7b3f9e")


class Tuned(Protocol):
    """What of a Result is drawn."""

    @property
    def rule(self) -> Rule: ...
    @property
    def loss(self) -> float: ...
    @property
    def route(self) -> str: ...
    @property
    def in_force(self) -> Tensors: ...
    @property
    def scheduled(self) -> list[str]: ...
    @property
    def defaults(self) -> Tensors: ...
    @property
    def history(self) -> list[dict[str, Any]]: ...
    @property
    def curves(self) -> dict[str, list[tuple[int, float]]]: ...
    @property
    def settings(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Drawing:
    """schedules: for each hyper, (steps, values) by label. curves: (step, held-out loss) by label.
    evaluations: (seconds, loss) by label. log: hypers drawn on a log scale.
    """

    title: str
    schedules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    evaluations: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    log: frozenset[str] = frozenset()

    def save(self, path: str | Path) -> None:
        """Write the picture; the path's ending chooses the format."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        count = len(self.schedules) + 2
        figure = Figure(figsize=(4.6 * count, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, count)
        for (name, lines), ax in zip(self.schedules.items(), axes, strict=False):
            for label, line in lines.items():
                more = ["_"] * (line.shape[1] - 1)
                ax.plot(line.numpy(), color=_color(label, lines), alpha=0.85, label=[label, *more])
            _dress(ax, f"{name} in force", "training step", log=name in self.log)
        for label, curve in self.curves.items():
            ax = axes[-2]
            ax.plot(*zip(*curve, strict=True), color=_color(label, self.curves), label=label)
        _dress(axes[-2], "held-out loss in training", "training step", log=True)
        for label, marks in self.evaluations.items():
            if marks:
                color = _color(label, self.evaluations)
                axes[-1].plot(*zip(*marks, strict=True), ".", color=color, alpha=0.5, label=label)
        _dress(axes[-1], "held-out loss of every evaluation", "seconds", log=True)
        losses = [loss for marks in self.evaluations.values() for _, loss in marks]
        if losses and min(losses) > 0:
            # A search tries values that blow up; they must not flatten what is worth seeing.
            axes[-1].set_ylim(top=3 * float(np.quantile(losses, 0.9)))
        figure.suptitle(self.title)
        figure.savefig(path, dpi=120)


def drawing_of(result: Tuned) -> Drawing:
    """The picture of one result against where it started, its evaluations by route."""
    drawing = compare({"default": result, "learned": result}, title=_title(result))
    routes = {route: _marks(result, route) for route in ("scan", "gradient", "search")}
    return replace(drawing, evaluations={route: m for route, m in routes.items() if m})


def compare(results: Mapping[str, Tuned], title: str) -> Drawing:
    """Several results of the same problem side by side; the one called "default" untuned."""
    one = next(iter(results.values()))
    names = [name for name in one.scheduled if name in one.rule.hypers] or ["lr"]
    tuned = {label: result for label, result in results.items() if label != "default"}
    return Drawing(
        title=title,
        schedules={
            name: {
                label: _over_time(r, r.in_force if label in tuned else r.defaults, name)
                for label, r in results.items()
            }
            for name in names
            if name in one.in_force
        },
        curves={
            label: r.curves["learned" if label in tuned else "default"]
            for label, r in results.items()
            if r.curves
        },
        evaluations={label: _marks(r) for label, r in tuned.items()},
        log=frozenset(n for n, h in one.rule.hypers.items() if h.scale == "log"),
    )


def _title(result: Tuned) -> str:
    return (
        f"{result.rule.title} on {result.settings['problem']}: "
        f"held-out loss {result.loss:.4f} by {result.route}"
    )


def _over_time(result: Tuned, values: Mapping[str, Tensor], name: str) -> Tensor:
    """(steps, number of values), a constant as a level line."""
    steps, value = result.settings["steps"], values[name]
    if name in result.scheduled:
        return value.reshape(steps, -1)
    return value.reshape(1, -1).expand(steps, -1)


def _marks(result: Tuned, route: str | None = None) -> list[tuple[float, float]]:
    return [
        (row["seconds"], row["loss"])
        for row in result.history
        if row["loss"] is not None and route in (None, row["route"])
    ]


def _color(label: str, among: Mapping[str, Any]) -> str:
    others = [name for name in among if name != "default"]
    return _DEFAULT if label == "default" else _OTHERS[others.index(label) % len(_OTHERS)]


def _dress(ax: Axes, title: str, across: str, *, log: bool) -> None:
    ax.set(title=title, xlabel=across)
    heights = [y for line in ax.lines for y in np.asarray(line.get_ydata(), dtype=float)]
    # Not for values that rounding alone tells apart, which no log scale can hold.
    if log and heights and 0 < (1 + 1e-9) * min(heights) < max(heights):
        ax.set_yscale("log")
    if ax.lines:
        ax.legend()
