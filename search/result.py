"""What tuning found, in a form that code which never heard of this project can use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..inner.core.hyper import Tensors
from ..inner.core.rule import Rule
from ..inner.registry import find_rule
from ..meta.training.outcome import Outcome
from .run_folder import write_text

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from ..inner.torch_form.scheduler import HyperScheduler


@dataclass(frozen=True)
class Result:
    """What a tuning ended with, and everything needed to repeat it.

    Args:
        rule: the tuned rule, its options chosen.
        hypers: the learned values by full name ("lr.knots", "beta1").
        options: discrete options in force.
        loss: mean held-out loss over `losses`.
        losses: one per confirming training seed.
        outcome: how it ended.
        route: by which way, "gradient" or "search".
        reason: why that way.
        in_force: every hyperparameter of rule and loss as training used it; those in scheduled have
            one row per step.
        scheduled: the hypers that follow a schedule.
        defaults: in_force before tuning.
        history: one row per evaluation.
        curves: held-out loss against steps for "default" and "learned".
        settings: what was asked.
        provenance: versions, machine and time.
    """

    rule: Rule
    hypers: Tensors
    options: dict[str, Any]
    loss: float
    losses: list[float]
    outcome: Outcome
    route: str
    reason: str
    in_force: Tensors
    scheduled: list[str]
    defaults: Tensors
    history: list[dict[str, Any]] = field(repr=False, default_factory=list)
    curves: dict[str, list[tuple[int, float]]] = field(repr=False, default_factory=dict)
    settings: dict[str, Any] = field(repr=False, default_factory=dict)
    provenance: dict[str, Any] = field(repr=False, default_factory=dict)

    def optimizer(
        self, params: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]]
    ) -> Optimizer:
        """The tuned rule as a torch.optim.Optimizer of a model or its parameters.

        Per-tensor values need the model's parameters in their own order; per-element values have
        no place in a torch optimizer.
        """
        from ..inner.torch_form import optimizer as optim

        named = isinstance(params, nn.Module)
        # Names, for rules that go by them.
        found = params.named_parameters() if isinstance(params, nn.Module) else params
        given: list[Any] = list(found)
        values = {
            name: self.in_force[name][0] if name in self.scheduled else self.in_force[name]
            for name in self.rule.hypers
        }
        form: Callable[..., Optimizer] = optim.torch_form(self.rule)
        shared = {name: float(value) for name, value in values.items() if value.ndim == 0}
        if len(shared) == len(values):
            return form(given, **shared, **self.rule.options())
        if self.rule.over == "model":
            several = ", ".join(name for name, value in values.items() if value.ndim)
            raise ValueError(
                f"{self.rule.name} takes a param group as one, and {several} has a value per "
                "tensor, for which each would need a group of its own; learn one value for all"
            )
        each = [x if named else ("", x) for x in given]
        trained = [(n, p) for n, p in each if isinstance(p, Tensor) and p.requires_grad]
        tensors = [p for _, p in trained]
        grained = {name: _per_tensor(name, v, tensors) for name, v in values.items() if v.ndim}
        groups = [
            {
                "params": [(n, p)] if named else [p],
                **{name: parts[i] for name, parts in grained.items()},
            }
            for i, (n, p) in enumerate(trained)
        ]
        return form(groups, **shared, **self.rule.options())

    def scheduler(self, optimizer: Optimizer) -> HyperScheduler:
        """The learned schedules for an optimizer made by `optimizer` (or any with these names)."""
        from ..inner.torch_form.scheduler import HyperScheduler

        names = [name for name in self.scheduled if name in self.rule.hypers]
        if not names:
            raise ValueError(
                "nothing is scheduled; the optimizer's constant values are all there is"
            )
        tables = {
            name: self.in_force[name].tolist()
            if self.in_force[name].ndim == 1
            else self.in_force[name].T.tolist()
            for name in names
        }
        return HyperScheduler(optimizer, tables)

    def plot(self, path: str | Path) -> None:
        """Draw schedules, held-out curves and the search itself as a picture."""
        from .plot import drawing_of

        drawing_of(self).save(path)

    def save(self, path: str | Path) -> None:
        """Write JSON that `load` reads back."""
        write_text(Path(path), json.dumps(self.plain(), indent=1))

    @property
    def interrupted(self) -> bool:
        """Whether there is budget left that the same call would go on to spend."""
        return self.outcome is Outcome.INTERRUPTED

    def plain(self) -> dict[str, Any]:
        """As JSON values: the rule by name, tensors as lists, what JSON cannot say as null."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: _plain(v) for name, v in (values | {"rule": self.rule.name}).items()}

    @staticmethod
    def load(path: str | Path, rule: Rule | None = None) -> Result:
        """What `save` wrote. rule: the one it was saved with, where no registered one."""
        data = json.loads(Path(path).read_text())
        for name in ("hypers", "in_force", "defaults"):
            data[name] = {k: torch.tensor(v, dtype=torch.float64) for k, v in data[name].items()}
        for name in ("loss", "losses"):
            data[name] = _number(data[name])
        data["curves"] = {
            k: [(int(i), _number(y)) for i, y in v] for k, v in data["curves"].items()
        }
        rule = rule or find_rule(data["rule"])
        options = rule.options()
        chosen = {n: v for n, v in data["options"].items() if n in options and v != options[n]}
        # A registered rule stays itself, and so its optimizer the class of hyperdescent.optim.
        rule = rule.choose(**chosen) if chosen else rule
        return Result(**data | {"rule": rule, "outcome": Outcome(data["outcome"])})


def _per_tensor(name: str, value: Tensor, params: list[Tensor]) -> list[Tensor]:
    """One value for each parameter, from a per-tensor granularity."""
    if value.numel() == len(params):
        return list(value.unbind())
    if value.numel() == sum(p.numel() for p in params):
        raise ValueError(
            f"{name} has a value for each of {value.numel()} weights, and a torch optimizer takes "
            "one for each tensor; use hyperdescent.train, or learn it with the granularity 'tensor'"
        )
    raise ValueError(
        f"{name} holds {value.numel()} values for {len(params)} parameter tensors; give the "
        "parameters of the model it was learned on"
    )


def _plain(value: Any) -> Any:
    """Tensors as lists; numbers that JSON lacks as null."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return None
    return value


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(v) for v in value]
    return float("inf") if value is None else value
