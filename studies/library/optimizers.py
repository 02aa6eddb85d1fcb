"""Every rule, tuned, then used for what it is to others: an optimizer in a plain PyTorch loop.

A rule's learning rates, along half a cosine, and the few hypers beside them that matter most are
tuned by `hyperdescent.tune` on a small net for digits. The optimizer and scheduler that it returns
then train that net from other starts, in a loop that knows nothing else of this package; so does
the optimizer at its defaults. What counts is the validation loss at the end of training, and
whether it is below a target that is the same for all. Where it is not, one training at each of a
grid of rates, the other numbers as tuned, tells a rule that cannot from a tuner that did not get
there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ...inner.core.rule import Rule
from ...inner.registry import RULES, find_rule
from ...inner.torch_form import optimizer as optim
from ...meta.meta_optimizer import MetaOptimizer
from ...meta.reverse.replay import Replay
from ...meta.training.outcome import Outcome
from ...meta.training.spec import split_names
from ...search.budget import seconds as in_seconds
from ...search.provenance import provenance
from ...search.result import Result
from ...search.tune import tune
from ..engine.record import Json, Measures, Record, Tuned, plain
from ..problems import PROBLEMS, Part, load_problem

NAME = "optimizers"
ARMS = ("defaults", "tuned")
# Of the tuned rate: the grid of a rule that missed the target.
FACTORS = tuple(4.0**k for k in range(-2, 6))
# What takes the place of a learning rate in rules that find their own.
_GUESSES = ("reps_rel", "d_coef")
# Of every rate, but where weights are averaged, which takes the place of a falling rate.
_SCHEDULE = "cosine"
_AVERAGING = ("dog", "ldog", "schedulefreesgd", "schedulefreeadamw")
# What is tuned beside rates, where a rule has it.
_MATTERS = ("momentum", "beta1", "beta2", "beta", "alpha", "scale", "gamma", "weight_decay")
Data = dict[str, Part]
Maker = Callable[[nn.Module], tuple[Optimizer, LRScheduler | None]]


@dataclass(frozen=True)
class OptimizerSetting:
    """steps, batch_size: of every training. seeds: trainings by each optimizer, all of them from
    starts that tuning has not seen. target: the validation loss to end below.
    """

    problem: str = "digits-mlp"
    steps: int = 200
    batch_size: int = 64
    seeds: int = 3
    target: float = 0.25


SETTING = OptimizerSetting()


@dataclass(frozen=True)
class DropInCell:
    """One rule: tuned within budget seconds, then trained with, tuned and at its defaults."""

    rule: str
    budget: float
    seed: int = 0
    study: str = NAME

    @property
    def inputs(self) -> dict[str, Json]:
        rule = find_rule(self.rule)
        declared = {name: [h.default, h.start, *h.search] for name, h in rule.hypers.items()}
        return {
            "study": self.study,
            "problem": {"name": SETTING.problem, "setting": plain(asdict(SETTING))},
            "arm": {
                "name": self.rule,
                "options": plain(rule.options()),
                "learn": plain(learned_of(rule)),
                "schedules": plain(scheduled_of(rule)),
                "declared": plain(declared),
                "budget": self.budget,
            },
            "seed": self.seed,
        }


def drop_in_cells(rules: str = "", budget: str = "30s") -> tuple[list[DropInCell], list[str]]:
    """(a cell for each rule, nothing that is left out). rules: names, all without. budget: to tune
    each.
    """
    names = [find_rule(name).name for name in split_names(rules)] if rules else list(RULES)
    return [DropInCell(name, in_seconds(budget)) for name in names], []


def learned_of(rule: Rule) -> list[str]:
    """What is tuned of a rule: its learning rates, or what takes their place, and the usual
    others. Where the derivative of one of them is no guide, tune searches.
    """
    options, rates = rule.options(), rates_of(rule)
    return rates + [
        name
        for name, hyper in rule.hypers.items()
        if name in _MATTERS
        and name not in rates
        and (hyper.when is None or options[hyper.when[0]] == hyper.when[1])
    ]


def rates_of(rule: Rule) -> list[str]:
    """What decides how far its steps go."""
    return [name for name in _GUESSES if name in rule.hypers] or _learning_rates(rule)


def scheduled_of(rule: Rule) -> dict[str, str]:
    """The schedules of its rates."""
    if rule.name in _AVERAGING:
        return {}
    return dict.fromkeys(_learning_rates(rule), _SCHEDULE)


def _learning_rates(rule: Rule) -> list[str]:
    return [name for name in rule.hypers if name == "lr" or name.endswith("_lr")]


def scanned_of(rule: Rule) -> str:
    """The rate that a grid is laid over."""
    return rates_of(rule)[0]


def tune_and_train(cell: DropInCell) -> Record:
    """Tune the cell's rule, train with it, and measure what each training ends with."""
    torch.set_num_threads(1)
    rule = find_rule(cell.rule)
    result, tuned = _tuned(rule, cell)
    at_defaults: Callable[..., Optimizer] = getattr(optim, rule.title)
    makers: dict[str, Maker] = {
        "defaults": lambda model: (at_defaults(model.parameters()), None),
        "tuned": partial(_as_tuned, result),
    }
    data, measures = _data(), _of_tuning(result)
    began = time.perf_counter()
    for arm in ARMS:
        for seed in range(SETTING.seeds):
            model = _trained(makers[arm], data, seed)
            for split in ("valid", "test"):
                measures |= {f"{arm} {split} {seed}": measure(model, *data[split])}
    seconds = time.perf_counter() - began
    if reached(measures) < SETTING.seeds:
        measures["rates"] = _scan(result, scanned_of(rule), data)
    means = {split: _mean(measures, split) for split in ("valid", "test")}
    finite = all(value is not None for split in means.values() for value in split.values())
    return Record(
        study=cell.study,
        inputs=cell.inputs,
        outcome=Outcome.OK if finite else Outcome.DIVERGED,
        measures={**means, **measures},
        seconds=seconds / (len(ARMS) * SETTING.seeds),
        tuned=tuned,
        provenance=provenance(),
    )


def make_model(seed: int) -> nn.Module:
    """The net of digits-mlp as anyone would write it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)
        )


def draw_batches(x: Tensor, y: Tensor, seed: int) -> Iterator[Part]:
    """As many random batches as a training has steps."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(SETTING.steps):
        index = torch.randperm(len(y), generator=draw)[: SETTING.batch_size]
        yield x[index], y[index]


def train_plainly(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Part],
    scheduler: LRScheduler | None = None,
) -> None:
    """A step for each batch; the model is left with the weights to use."""
    for x, y in batches:

        def closure(x: Tensor = x, y: Tensor = y) -> Any:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        if scheduler:
            scheduler.step()
    optimizer.eval()  # type: ignore[attr-defined]  # torch's own have none


@torch.no_grad()
def measure(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float | None]:
    """Loss and accuracy; no numbers where the loss is none."""
    output = model(x)
    loss = float(functional.cross_entropy(output, y))
    if not math.isfinite(loss):
        return {"loss": None, "accuracy": None}
    return {"loss": loss, "accuracy": float((output.argmax(1) == y).double().mean())}


def of_arm(measures: Measures, arm: str, split: str, name: str) -> list[float | None]:
    """A measure of the trainings by an arm, by seed; null where one diverged."""
    trained = [told for key, told in measures.items() if key.startswith(f"{arm} {split} ")]
    return [told[name] for told in trained]


def reached(measures: Measures) -> int:
    """How many of the tuned trainings end below the target."""
    losses = of_arm(measures, "tuned", "valid", "loss")
    return sum(loss is not None and loss < SETTING.target for loss in losses)


def _as_tuned(result: Result, model: nn.Module) -> tuple[Optimizer, LRScheduler | None]:
    optimizer = result.optimizer(model)
    return optimizer, result.scheduler(optimizer) if result.scheduled else None


def _trained(make: Maker, data: Data, seed: int) -> nn.Module:
    model = make_model(seed)
    optimizer, scheduler = make(model)
    train_plainly(model, optimizer, draw_batches(*data["train"], seed), scheduler)
    return model


def _scan(result: Result, name: str, data: Data) -> dict[str, float | None]:
    """Validation loss under the first seed by factor of the tuned rate; the learned others stay."""

    def scaled(factor: float) -> Maker:
        changed = {**result.in_force, name: factor * result.in_force[name]}
        return partial(_as_tuned, replace(result, in_force=changed))

    return {
        f"{factor:g}": measure(_trained(scaled(factor), data, 0), *data["valid"])["loss"]
        for factor in FACTORS
    }


def _mean(measures: Measures, split: str) -> dict[str, float | None]:
    """Over the tuned trainings; null if one of them diverged."""
    means: dict[str, float | None] = {}
    for name in ("loss", "accuracy"):
        values = of_arm(measures, "tuned", split, name)
        finite = [value for value in values if value is not None]
        means[name] = fmean(finite) if len(finite) == len(values) else None
    return means


def _data() -> Data:
    splits = PROBLEMS[SETTING.problem]().splits
    return {split: splits[split].whole() for split in ("train", "valid", "test")}  # type: ignore[misc]  # one input each


def _tuned(rule: Rule, cell: DropInCell) -> tuple[Result, Tuned]:
    began, refused = time.perf_counter(), ""
    tuning: Callable[..., Result] = partial(
        tune,
        load_problem(SETTING.problem),
        rule,
        learn=learned_of(rule),
        steps=SETTING.steps,
        schedules=scheduled_of(rule),
        budget=cell.budget,
        seed=cell.seed,
        # Seconds do not pay for a trace: it would be a third of what there is, for some rules all.
        meta=MetaOptimizer(estimator=Replay(compile=False)),
        progress=False,
    )
    try:
        result = tuning()
    except ValueError as error:  # A metagradient that the budget is too small for; a training fits.
        result, refused = tuning(route="search"), str(error)
    if result.outcome is Outcome.INTERRUPTED:
        raise KeyboardInterrupt  # tune keeps its best point; a study must not record it as done.
    return result, Tuned(
        hypers={name: plain(value) for name, value in result.hypers.items()},
        options={},
        loss=result.loss if math.isfinite(result.loss) else None,
        outcome=result.outcome,
        route=result.route,
        reason=refused or result.reason,
        seconds=time.perf_counter() - began,
    )


def _of_tuning(result: Result) -> Measures:
    losses: Sequence[float] = [row["loss"] for row in result.history]
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return {
        "tuning": {
            "evaluations": len(losses),
            "first loss": finite[0] if finite else None,
            "lowest loss": min(finite, default=None),
        }
    }


__all__ = [
    "ARMS",
    "FACTORS",
    "NAME",
    "SETTING",
    "DropInCell",
    "draw_batches",
    "drop_in_cells",
    "learned_of",
    "make_model",
    "measure",
    "of_arm",
    "rates_of",
    "reached",
    "scanned_of",
    "scheduled_of",
    "train_plainly",
    "tune_and_train",
]
