"""A study as plain data: which problems are trained how, with which seeds.

In a file it reads

    name: rates
    problems: [digits-mlp, {name: wine-mlp, options: {width: 32}}]
    arms:
      - {name: plain, rule: adam, values: {lr: 0.003}}
      - {name: tuned, rule: adam, schedules: {lr: "piecewise:8"}, learn: [lr, beta1], budget: 20s}
    seeds: 3
    steps: 200
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ...inner.core.hyper import Granularity
from ...inner.core.messages import unknown
from ...inner.registry import find_rule
from ...inner.schedules.schedule import find_schedule
from ...search.budget import seconds
from ..problems import check_problem, label_of


def _value(given: object) -> float | list[float] | list[list[float]]:
    if not isinstance(given, list | tuple):
        return _number(given)
    if not any(isinstance(each, list | tuple) for each in given):
        return [_number(each) for each in given]
    rows = [[_number(x) for x in each] for each in given if isinstance(each, list | tuple)]
    if len(rows) < len(given) or len({len(row) for row in rows}) > 1:
        raise ValueError(f"{given!r} is not a table; its rows must be lists of one length")
    return rows


def _number(given: object) -> float:
    # YAML reads 1e-3 as a string: its floats need a point.
    try:
        number = math.nan if isinstance(given, bool) else float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{given!r} is not a finite number or a list of them")
    return number


def _counted(seeds: object) -> object:
    return list(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds


def _named(problem: object) -> object:
    return {"name": problem} if isinstance(problem, str) else problem


Value = Annotated[
    float | list[float] | list[list[float]],
    PlainValidator(_value),
    PlainSerializer(lambda value: value),
]
Options = dict[str, bool | int | float | str]
Seeds = Annotated[tuple[int, ...], BeforeValidator(_counted), Field(min_length=1)]


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ProblemSpec(_Plain):
    """A problem of the registry or "package.module:function", with its options."""

    name: str
    options: Options = {}

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        check_problem(name)
        return name

    @property
    def label(self) -> str:
        return label_of(self.name, self.options)


class Arm(_Plain):
    """One way to train. values: by hyperparameter or knob, a number, a list or a list of rows as
    a tuned record has it; the others keep their defaults. learn: what is tuned first, from there;
    route and budget are those of `tune`.
    """

    name: str
    rule: str
    options: Options = {}
    schedules: dict[str, str] = {}
    granularity: dict[str, Granularity] = {}
    values: dict[str, Value] = {}
    learn: tuple[str, ...] = ()
    route: str | None = None
    budget: float | str | None = None

    @model_validator(mode="before")
    @classmethod
    def _called_as_its_rule(cls, given: Any) -> Any:
        nameless = isinstance(given, dict) and "name" not in given and "rule" in given
        return {"name": given["rule"], **given} if nameless else given

    @field_validator("rule")
    @classmethod
    def _known(cls, rule: str) -> str:
        return find_rule(rule).name

    @field_validator("options")
    @classmethod
    def _taken(cls, options: Options, info: ValidationInfo) -> Options:
        if "rule" in info.data:
            try:
                find_rule(info.data["rule"]).choose(**options)
            except TypeError as error:  # Which pydantic would not collect.
                raise ValueError(str(error)) from error
        return options

    @field_validator("schedules")
    @classmethod
    def _found(cls, schedules: dict[str, str]) -> dict[str, str]:
        for schedule in schedules.values():
            find_schedule(schedule)
        return schedules

    @field_validator("budget")
    @classmethod
    def _positive(cls, budget: float | str | None) -> float | str | None:
        if budget is not None:
            seconds(budget)
        return budget

    @model_validator(mode="after")
    def _tunes_something(self) -> Arm:
        if not self.learn and (self.route is not None or self.budget is not None):
            raise ValueError("route and budget are for tuning; say what to learn, or drop them")
        return self


class Study(_Plain):
    """problems x arms x seeds, each cell a training of `steps`. seeds: a list, or how many."""

    name: str
    problems: Annotated[
        tuple[Annotated[ProblemSpec, BeforeValidator(_named)], ...], Field(min_length=1)
    ]
    arms: Annotated[tuple[Arm, ...], Field(min_length=1)]
    seeds: Seeds = (0,)
    steps: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _distinct(self) -> Study:
        _refuse_repeats("problem", (problem.label for problem in self.problems))
        _refuse_repeats("arm", (arm.name for arm in self.arms))
        _refuse_repeats("seed", map(str, self.seeds))
        return self

    def to_yaml(self) -> str:
        """What `study_from_yaml` reads back as an equal study."""
        plain = self.model_dump(mode="json", exclude_defaults=True)
        return str(yaml.safe_dump(plain, sort_keys=False))


def study_from_yaml(text: str, source: str = "study") -> Study:
    """Raises ValueError with one line for each thing that is wrong, and where."""
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{source} must be a mapping with name, problems, arms and steps")
    try:
        return Study.model_validate(given)
    except ValidationError as error:
        _explain(error, source)


def read_study(path: str | Path) -> Study:
    """The study in a YAML file."""
    return study_from_yaml(Path(path).read_text(encoding="utf-8"), str(path))


def _refuse_repeats(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what} {name} is there twice; its records could not be told apart")
        seen.add(name)


_FIELDS: dict[str, type[BaseModel]] = {"problems": ProblemSpec, "arms": Arm}


def _explain(error: ValidationError, source: str) -> NoReturn:
    lines = []
    problems = error.errors(include_url=False)
    wrong = {problem["loc"][:i] for problem in problems for i in range(len(problem["loc"]))}
    for problem in problems:
        where = problem["loc"]
        if problem["type"] == "too_short" and where in wrong:
            continue  # pydantic counts only the items that are right.
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            fields = _FIELDS.get(str(where[0]), Study) if len(where) > 1 else Study
            message = unknown("there is no field", str(where[-1]), fields.model_fields)
            where = where[:-1]
        elif problem["type"] == "missing":
            message = f"{where[-1]} is missing"
            where = where[:-1]
        lines.append(f"{source}: {_spelled(where)}{message}")
    raise ValueError("\n".join(dict.fromkeys(lines))) from error


def _spelled(where: tuple[int | str, ...]) -> str:
    """Where in the file, such as "arms[1].values.lr: "."""
    spelled = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in where)
    return f"{spelled.removeprefix('.')}: " if spelled else ""


__all__ = ["Arm", "ProblemSpec", "Study", "read_study", "study_from_yaml"]
