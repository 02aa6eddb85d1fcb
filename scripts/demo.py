"""The demonstration: metagradients and TPE over the same space in the same seconds, then a fair
comparison of what they found on seeds and examples that neither has seen.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from ..search.plot import compare
from ..search.provenance import provenance
from ..search.result import Result
from ..search.run_folder import write_text
from ..search.tune import tune
from ..studies.engine.record import Record, Records
from ..studies.engine.run import run_study
from ..studies.engine.study import Arm, ProblemSpec, Study
from ..studies.engine.summary import summary
from ..studies.problems import load_problem
from .show import INTERRUPTED, console, one_line, show_records

PROBLEM, RULE, STEPS, SCHEDULES = "digits-mlp", "adamw", 200, {"lr": "piecewise:16"}
LEARN = ("lr", "beta1", "beta2", "weight_decay")
# Tuners train under seeds derived from theirs; these are fresh.
FRESH_SEEDS = (1001, 1002, 1003, 1004, 1005)
SHOWN = ("valid loss", "valid accuracy", "test loss", "test accuracy")
# Without a terminal, a line of progress for so many cells.
_CELLS_PER_LINE = 5


def run_demo(out: Path, budget: str, seed: int, address: str | None) -> int:
    """Tune twice, train three arms on fresh seeds, and write and print what came out; the exit
    code. Interrupted, what it wrote so far is there for the same call to go on from.
    """
    screen, began = console(), time.monotonic()
    # As in the cells that Ray runs, and the fastest for a model this small.
    torch.set_num_threads(1)
    screen.print(
        f"Tuning {RULE} for {PROBLEM}: a learning-rate schedule of 16 knots, beta1, beta2 and "
        f"weight decay, {STEPS} training steps, {budget} for each tuner."
    )
    found: dict[str, Result] = {}
    for name, route in (("hyperdescent", "auto"), ("tpe", "search")):
        result = found[name] = _tune(route, out / name, budget, seed)
        if result.interrupted:
            screen.print(INTERRUPTED)
            return 130
        screen.print(
            f"{name}: held-out loss {result.loss:.4f} after {len(result.history)} evaluations; "
            f"route {result.route}: {result.reason}"
        )
    study = _study(found)
    records = _train(study, out, address)
    title = f"{PROBLEM}: mean ± standard deviation over fresh seeds"
    if code := show_records(records, title, SHOWN):
        return code
    whole: dict[str, Any] = {
        "study": study.model_dump(mode="json"),
        "summary": summary(records),
        "tuners": {name: result.plain() for name, result in found.items()},
        "seconds": time.monotonic() - began,
        "provenance": provenance(),
    }
    write_text(out / "result.json", json.dumps(whole, indent=1))
    pictured = {"default": found["hyperdescent"], **found}
    compare(pictured, f"{RULE} on {PROBLEM}, {budget} each").save(out / "schedule.png")
    screen.print(f"{whole['seconds']:.0f} s in all; kept in {out}: result.json, schedule.png")
    return 0


def _tune(route: str, out: Path, budget: str, seed: int) -> Result:
    return tune(
        load_problem(PROBLEM),
        RULE,
        learn=LEARN,
        steps=STEPS,
        schedules=SCHEDULES,
        budget=budget,
        seed=seed,
        route=route,
        out=out,
    )


def _train(study: Study, out: Path, address: str | None) -> Records:
    """Every cell on Ray, the last one shown where there is a terminal, some as lines elsewhere."""
    screen, counted = console(), itertools.count(1)
    cells = len(study.arms) * len(study.seeds)
    told = f"Training {len(study.arms)} arms with {len(study.seeds)} fresh seeds each, on Ray"
    screen.print(told)
    with screen.status(told) as status:

        def progress(record: Record) -> None:
            ended = next(counted)
            line = Text(f"{ended} of {cells}: {one_line(record)}")
            status.update(line)
            if not screen.is_terminal and ended % _CELLS_PER_LINE == 0:
                screen.print(line)

        return run_study(
            study, address=address or "local", out=out / "records.jsonl", progress=progress
        )


def _study(found: dict[str, Result]) -> Study:
    """The default and each tuner's best as arms that only train."""
    arms = [Arm(name="default", rule=RULE)]
    for name, result in found.items():
        values: dict[str, Any] = {n: value.tolist() for n, value in result.hypers.items()}
        arms.append(Arm(name=name, rule=RULE, schedules=SCHEDULES, values=values))
    return Study(
        name="demo",
        problems=(ProblemSpec(name=PROBLEM),),
        arms=tuple(arms),
        seeds=FRESH_SEEDS,
        steps=STEPS,
    )
