"""Pictures of what was learned: schedules, held-out curves, and how the search went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .result import Result

_COLORS = {"default": "#8a8a8a", "learned": "#0b63b0", "gradient": "#0b63b0"}
_OTHERS = ("#c2571a", "#2f7d32", "#7b3f9e")


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
                ax.plot(line, color=_color(label, lines), alpha=0.85, label=[label, *more])
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
        figure.suptitle(self.title)
        figure.savefig(path, dpi=120)


def drawing_of(result: Result) -> Drawing:
    """The picture of one result against where it started."""
    return compare({"default": result, "learned": result}, title=_title(result))


def compare(results: Mapping[str, Result], title: str) -> Drawing:
    """Several results of the same problem side by side; the one called "default" untuned."""
    any_result = next(iter(results.values()))
    names = [n for n in any_result.scheduled if n in any_result.in_force] or ["lr"]
    named = [(label, label == "default", r) for label, r in results.items()]
    return Drawing(
        title=title,
        schedules={
            name: {
                label: _over_time(r, r.defaults if untuned else r.in_force, name)
                for label, untuned, r in named
            }
            for name in names
            if name in any_result.in_force
        },
        curves={
            label: r.curves["default" if untuned else "learned"]
            for label, untuned, r in named
            if r.curves
        },
        evaluations={
            route: _marks(r.history, route)
            for _, untuned, r in named
            for route in ("gradient", "search")
            if not untuned and _marks(r.history, route)
        },
        log=frozenset(n for n, h in any_result.rule.hypers.items() if h.scale == "log"),
    )


def _title(result: Result) -> str:
    return (
        f"{result.rule.title} on {result.settings['problem']}: "
        f"held-out loss {result.loss:.4f} by {result.route}"
    )


def _over_time(result: Result, values: Mapping[str, Tensor], name: str) -> Tensor:
    """(steps, number of values), a constant as a level line."""
    steps, value = result.settings["steps"], values[name]
    if name in result.scheduled:
        return value.reshape(steps, -1)
    return value.reshape(1, -1).expand(steps, -1)


def _marks(rows: list[dict[str, Any]], route: str) -> list[tuple[float, float]]:
    return [(r["seconds"], r["loss"]) for r in rows if r["route"] == route and r["loss"]]


def _color(label: str, among: Mapping[str, Any]) -> str:
    others = [name for name in among if name not in _COLORS]
    return _COLORS.get(label) or _OTHERS[others.index(label) % len(_OTHERS)]


def _dress(ax: Axes, title: str, across: str, *, log: bool) -> None:
    ax.set(title=title, xlabel=across)
    heights = [y for line in ax.lines for y in np.asarray(line.get_ydata(), dtype=float)]
    if log and heights and 0 < min(heights) < max(heights):
        ax.set_yscale("log")
    if ax.lines:
        ax.legend()
