"""The demonstration: metagradients and TPE over the same space in the same seconds, then a fair
comparison of what they found on seeds and examples that neither has seen.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from ..search.folder import write_text
from ..search.plot import compare
from ..search.provenance import provenance
from ..search.result import Result
from ..search.tune import tune
from ..studies.problems import find_problem
from ..studies.report import summary, table
from ..studies.run import run
from ..studies.study import Arm, ProblemSpec, Study
from .show import console, one_line

PROBLEM, RULE, STEPS, SCHEDULES = "digits-mlp", "adamw", 200, {"lr": "piecewise:16"}
LEARN = ("lr", "beta1", "beta2", "weight_decay")
# Tuners train under seeds derived from theirs; these are fresh.
FRESH_SEEDS = (1001, 1002, 1003, 1004, 1005)


def run_demo(out: Path, budget: str, seed: int, address: str | None) -> None:
    """Tune twice, train three arms on fresh seeds, and write and print what came out."""
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
        screen.print(
            f"{name}: held-out loss {result.loss:.4f} after {len(result.history)} evaluations; "
            f"route {result.route}: {result.reason}"
        )
    study = _study(found)
    told = f"Training {len(study.arms)} arms with {len(study.seeds)} fresh seeds each, on Ray"
    screen.print(told)
    with screen.status(told) as status:
        records = run(
            study,
            address=address or "local",
            out=out / "records.jsonl",
            progress=lambda record: status.update(f"{told}: {one_line(record)}"),
        )
    whole: dict[str, Any] = {
        "study": study.model_dump(mode="json"),
        "summary": summary(records),
        "tuners": {name: result.plain() for name, result in found.items()},
        "seconds": time.monotonic() - began,
        "provenance": provenance(),
    }
    write_text(out / "result.json", json.dumps(whole, indent=1))
    pictured = {"default": found["hyperdescent"], **found}
    title = f"{RULE} on {PROBLEM}, {budget} each"
    compare(pictured, title).save(out / "schedule.png")
    screen.print(table(records, title=f"{PROBLEM}: mean ± standard deviation over fresh seeds"))
    screen.print(f"{whole['seconds']:.0f} s in all; kept in {out}: result.json, schedule.png")


def _tune(route: str, out: Path, budget: str, seed: int) -> Result:
    result = tune(
        find_problem(PROBLEM),
        RULE,
        learn=LEARN,
        steps=STEPS,
        schedules=SCHEDULES,
        budget=budget,
        seed=seed,
        route=route,
        out=out,
    )
    if result.interrupted:
        raise KeyboardInterrupt
    return result


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
