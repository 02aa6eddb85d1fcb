"""tune(): scan, descend the metagradient, search where that fails, confirm what was found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..inner.core.hyper import Granularity
from ..inner.core.rule import Rule
from ..inner.schedules.schedule import Schedule
from ..meta.estimators import find_estimator
from ..meta.meta_optimizer import MetaOptimizer
from ..meta.problems.problem import Problem
from ..meta.problems.seeding import fold_in
from ..meta.training.coordinates import Coordinates
from ..meta.training.estimate import Estimator
from ..meta.training.finite_differences import held_out_loss
from ..meta.training.loop import held_out_curve
from ..meta.training.outcome import Outcome
from ..meta.training.spec import make_training, split_names
from ..meta.training.training import Training
from .budget import Clock, seconds
from .coarse_scan import scan
from .preflight import check_budget, first_losses
from .progress import watching
from .provenance import provenance
from .result import Result
from .route import Decision, choose_route, reconsider
from .run_folder import RunFolder
from .run_log import Event, Log
from .searcher import OptunaSearcher
from .selection import CANDIDATES, confirm
from .space import Point, Space

# The share of the budget kept for training the best candidates again under other seeds.
_CONFIRMING = 0.12
# And the most of it that goes into finding where to begin: in all, and into a point of which there
# is time for several trainings, up to so many.
_SCANNING, _POINT, _SEEDS = 0.35, 0.04, 4


def tune(
    problem: Problem,
    rule: str | Rule = "adamw",
    *,
    learn: str | Iterable[str] = ("lr",),
    steps: int = 200,
    schedules: Mapping[str, str | Schedule] | None = None,
    granularity: Mapping[str, Granularity] | None = None,
    values: Mapping[str, float | Tensor] | None = None,
    budget: str | float = "60s",
    seed: int = 0,
    route: str = "auto",
    method: str | Estimator | None = None,
    meta: MetaOptimizer | None = None,
    out: str | Path | None = None,
    progress: bool | Callable[[Event], None] = True,
) -> Result:
    """Tune hyperparameters of training problem for `steps` steps by rule, within budget seconds.

    Args:
        problem: what is trained, such as `problem_from_module` makes.
        rule: the optimizer, by name ("adamw", "clip_norm(adamw)") or as a Rule.
        learn: names of hypers of the rule or the loss ("lr,beta1" or a list), and of discrete
            options.
        steps: training steps of every evaluation.
        schedules: by hyper, such as {"lr": "piecewise:16"}; its knobs are learned in its place.
        granularity: {"alpha": "tensor"} for one value per parameter tensor, "element" per weight.
        values: to start from, and to keep where not learned.
        budget: seconds, or text such as "60s", "5m", "1.5h".
        seed: of every random draw.
        route: "auto" descends the metagradient and falls back to Optuna where there is none;
            "gradient" and "search" insist. A descent begins with a scan (search/coarse_scan.py):
            plain trainings at rates factors of 4 apart.
        method: how metagradients are made, by name or as an estimator, as in `hypergradient`;
            "replay" if not given.
        meta: the meta-optimizer, for other options of it than the method.
        out: a folder that keeps the run; the same call on it goes on where it stopped.
        progress: a line on the terminal, or a function that is given every event.

    Returns:
        A Result. Numerical failure is its outcome. Ctrl-C ends the run with the best point so far.

    Raises:
        ValueError, TypeError: for input that cannot work, before time is spent on it.
    """
    if method is not None:
        if meta is not None:
            raise ValueError(
                f"method={method!r} is the estimator of a MetaOptimizer, and meta= has one too; "
                "give method= alone, or meta=MetaOptimizer(estimator=...)"
            )
        meta = MetaOptimizer(find_estimator(method))
    training = make_training(problem, rule, steps, schedules, granularity, values)
    space = Space(training, split_names(learn))
    decision = choose_route(space, route)
    meta = meta or MetaOptimizer()
    settings = _settings(space, meta, route, seed)
    log = Log(Clock(seconds(budget)))
    with ExitStack() as stack:
        if out is not None:
            log.folder = RunFolder(Path(out))
            stack.enter_context(log.folder.claimed(settings))
            log.resume()
            kept = log.folder.result
            done = Result.load(kept, training.rule) if kept.exists() else None
            if done and done.settings["budget"] >= log.clock.budget and not done.interrupted:
                return done
        log.watch = stack.enter_context(watching(progress))
        return _run(space, decision, settings, log, meta)


def _run(
    space: Space, decision: Decision, settings: dict[str, Any], log: Log, meta: MetaOptimizer
) -> Result:
    seed, start = settings["seed"], space.start()
    try:
        if not log.rows:
            estimator = meta.estimator if decision.route == "gradient" else None
            training = space.at(start.discrete)
            check_budget(training, space.smooth, estimator, log.clock.budget, seed)
            if decision.route == "search":
                import_module("optuna")
            # What is loaded and allocated once is not charged.
            log.clock = Clock(log.clock.budget)
        if decision.route == "gradient":
            decision = _descend(space, start, meta, log, settings) or decision
        if decision.route == "search":
            _search(space, start, log, seed)
        losses, point = _confirm(space, start, log, seed)
        outcome = _outcome(log, decision, losses)
    except KeyboardInterrupt:
        if log.rows:
            log.save()
        if not log.found:
            raise
        losses, point, outcome = [], log.best()[0], Outcome.INTERRUPTED
    log.save()
    return _finish(space, decision, settings, log, losses, point, outcome)


def _descend(
    space: Space, start: Point, meta: MetaOptimizer, log: Log, settings: dict[str, Any]
) -> Decision | None:
    """The gradient route; the decision to leave it, or None when the budget is spent."""
    coordinates = Coordinates(space.smooth)
    log.scanned = best = _scan(space, start, log, settings["seed"])
    moved = best is not start and log.rows[0]["loss"] is not None
    refuge = start.smooth if moved else None
    log.descent = descent = log.descent or meta.begin(coordinates, best.smooth, refuge)
    # Whether compiling pays depends on how long the descent will last.
    spent = log.rows[-1]["seconds"] if log.rows else 0.0
    expect = max(0.0, log.clock.budget * (1 - _CONFIRMING) - spent)
    meta = replace(meta, estimator=meta.estimator.expecting(expect))
    while _searching(log) and descent.outcome is Outcome.OK:
        here, k = coordinates.point(descent.z), len(log.rows)
        estimate = meta.step(
            space.training,
            coordinates,
            descent,
            seed=fold_in(settings["seed"], k),
            progress=log.clock.progress / (1 - _CONFIRMING),
        )
        log.note("gradient", estimate.loss, Point(here), outcome=str(estimate.note.outcome), seed=k)
    return reconsider(descent, space, settings["route"])


def _scan(space: Space, start: Point, log: Log, seed: int) -> Point:
    """Where the descent begins."""
    losses = _ScanLosses(space, log, seed)

    def more() -> bool:
        return bool(losses.known) or (log.descent is None and log.clock.progress < _SCANNING)

    return scan(space, start, losses, more)


class _ScanLosses:
    """The mean loss at a point under as many seeds as there is time for. known: what an earlier
    call on the same folder has found, the next one last.
    """

    def __init__(self, space: Space, log: Log, seed: int) -> None:
        self._space, self._log, self._seed = space, log, seed
        known = [row for row in log.rows if row["route"] == "scan"]
        # Under one seed alone, luck may lead to where others diverge.
        self._seeds = next((k for k, row in enumerate(known) if k and row["seed"] == 0), len(known))
        self.known = known[::-1]

    def __call__(self, point: Point) -> float:
        clock = self._log.clock
        began = clock.spent
        losses = [self._trained(point, 0)]
        if not self._seeds:
            cost = max(clock.spent - began, 1e-9)
            self._seeds = min(_SEEDS, max(1, int(_POINT * clock.budget / cost)))
        losses += [self._trained(point, k) for k in range(1, self._seeds)]
        return sum(losses) / len(losses)

    def _trained(self, point: Point, k: int) -> float:
        if self.known:
            loss = self.known.pop()["loss"]
            return math.inf if loss is None else float(loss)
        loss, outcome = _plain(self._space, point, fold_in(self._seed, k))
        self._log.note("scan", loss, point, outcome=str(outcome), seed=k)
        return loss


def _search(space: Space, start: Point, log: Log, seed: int) -> None:
    """Optuna from the best point so far, for what is left of the budget."""
    searcher = OptunaSearcher(
        space,
        (log.best() or [start])[0],
        seed=seed,
        known=[(point, loss) for loss, point in log.found],
        journal=log.folder.journal if log.folder else None,
    )
    while _searching(log):
        point, k = searcher.ask(), len(log.rows)
        loss, outcome = _plain(space, point, fold_in(seed, k))
        # Told before it is noted: who watches may interrupt, and no trial is to be done again.
        searcher.tell(loss)
        log.note("search", loss, point, outcome=str(outcome), seed=k)


def _plain(space: Space, point: Point, seed: int) -> tuple[float, Outcome]:
    """(the held-out loss of a plain training, inf where it diverged; how it ended)"""
    loss = float(held_out_loss(space.at(point.discrete), point.smooth, seed))
    ended = math.isfinite(loss)
    return (loss, Outcome.OK) if ended else (math.inf, Outcome.DIVERGED)


def _confirm(space: Space, start: Point, log: Log, seed: int) -> tuple[list[float], Point]:
    """The best of the points found and of where it all started, under fresh seeds."""
    candidates = log.best(CANDIDATES)
    if (d := log.descent) and d.anchor is not None:
        # The descent's own answers: where its losses were lowest for a while, and where it ended,
        # which is no average of where it was while it has not been anywhere for long.
        own = [d.z] if d.best is None else [d.best, d.anchor]
        candidates = [Point(Coordinates(space.smooth).point(z)) for z in own] + candidates
    # And what was there before it, should its gradient have been no guide.
    candidates[1:1] = [*([log.scanned] if log.scanned else []), start]

    def train(point: Point, k: int) -> float:
        training = space.at(point.discrete)
        loss = float(held_out_loss(training, point.smooth, fold_in(seed, k, 1)))
        log.watch(Event("confirm", loss, log.best_loss, log.clock.progress))
        return loss

    whole = max(log.clock.left, 1e-9)
    return confirm(candidates, train, lambda: log.clock.left / whole)


def _searching(log: Log) -> bool:
    return log.clock.progress < 1 - _CONFIRMING


def _outcome(log: Log, decision: Decision, losses: list[float]) -> Outcome:
    if not log.rows:
        return Outcome.OUT_OF_BUDGET
    if decision.route == "gradient" and log.descent and log.descent.outcome is not Outcome.OK:
        return log.descent.outcome
    return Outcome.OK if math.isfinite(sum(losses)) else Outcome.DIVERGED


def _settings(space: Space, meta: MetaOptimizer, route: str, seed: int) -> dict[str, Any]:
    """What makes a run the run it is; its budget may grow."""
    training = space.training
    of_meta = {f.name: getattr(meta, f.name) for f in fields(meta)}
    return {
        "problem": training.problem.name,
        "problem_options": dict(training.problem.chosen),
        "rule": training.rule.name,
        "rule_options": training.rule.options(),
        "steps": training.steps,
        "schedules": {name: s.name for name, s in training.schedules.items()},
        "granularity": dict(training.granularity),
        "values": {
            name: torch.as_tensor(v, dtype=torch.float64).tolist()
            for name, v in training.values.items()
        },
        "learn": list(space.learn),
        "route": route,
        "seed": seed,
        "meta": of_meta | {"rule": meta.rule.name, "estimator": type(meta.estimator).__name__},
        # Problems go by name, and two of one name need not be the same.
        "first_losses": first_losses(space.at(space.start().discrete), seed),
    }


def _finish(
    space: Space,
    decision: Decision,
    settings: dict[str, Any],
    log: Log,
    losses: list[float],
    point: Point,
    outcome: Outcome,
) -> Result:
    training = space.at(point.discrete)
    learned, default = training.resolve(point.smooth), training.resolve({})
    result = Result(
        rule=training.rule,
        hypers={name: value.detach() for name, value in point.smooth.items()},
        options={**training.rule.options(), **point.discrete},
        loss=sum(losses) / len(losses) if losses else log.best_loss,
        losses=losses,
        outcome=outcome,
        route=decision.route,
        reason=decision.reason,
        in_force=learned.varying | learned.constant,
        defaults=default.varying | default.constant,
        scheduled=list(training.schedules),
        history=log.rows,
        settings={**settings, "budget": log.clock.budget, "spent": log.clock.spent},
        provenance=dict(provenance()),
    )
    if log.folder:
        result.save(log.folder.result)
        if not result.interrupted:
            result = replace(result, curves=_curves(training, point, settings["seed"]))
            result.save(log.folder.result)
        result.plot(log.folder.path / "schedule.png")
    return result


def _curves(training: Training, point: Point, seed: int) -> dict[str, list[tuple[int, float]]]:
    """Held-out loss along training before and after; empty if the user cannot wait for it."""
    try:
        learned = held_out_curve(training, point.smooth, seed)
        return {"default": held_out_curve(training, {}, seed), "learned": learned}
    except KeyboardInterrupt:
        return {}
