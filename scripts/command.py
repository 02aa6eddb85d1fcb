"""The `hyperdescent` command line."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..inner.core.rule import Rule
    from ..meta.problems.problem import Problem

TRACEBACK = "HYPERDESCENT_TRACEBACK"

app = typer.Typer(
    help="Tune the hyperparameters of a training run by their own gradient.",
    epilog=f"An error is one line; {TRACEBACK}=1 in the environment shows where it came from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

benchmarks = typer.Typer(
    help="Measure this project against others; minutes to an hour.", no_args_is_help=True
)
app.add_typer(benchmarks, name="bench")


# What several commands take.
OfProblem = Annotated[
    str,
    typer.Option(
        help="A built-in problem (see `hyperdescent problems`), or package.module:function of your "
        "own."
    ),
]
OfRule = Annotated[str, typer.Option(help="An update rule; see `hyperdescent rules`.")]
Steps = Annotated[int, typer.Option(help="Training steps.")]
Schedules = Annotated[
    list[str] | None, typer.Option(metavar="HYPER=SCHEDULE", help="Such as lr=piecewise:16.")
]
GranularityOption = Annotated[
    list[str] | None, typer.Option(metavar="HYPER=tensor", help="Such as alpha=tensor.")
]
Values = Annotated[
    list[str] | None, typer.Option(metavar="HYPER=VALUE", help="Start at or keep a value.")
]
Options = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="Such as nesterov=true.")
]
Seed = Annotated[int, typer.Option(help="Of every random draw.")]
Threads = Annotated[int, typer.Option(help="Of torch; small models are fastest with one.")]


@app.command()
def tune(
    problem: OfProblem,
    rule: OfRule = "adamw",
    learn: Annotated[str, typer.Option(help="Hypers to learn, such as lr,beta1.")] = "lr",
    steps: Steps = 200,
    budget: Annotated[str, typer.Option(help="Time to spend, such as 60s, 5m, 1.5h.")] = "60s",
    schedule: Schedules = None,
    granularity: GranularityOption = None,
    values: Values = None,
    option: Options = None,
    route: Annotated[str, typer.Option(help="auto, gradient or search.")] = "auto",
    method: Annotated[
        str | None, typer.Option(help="How metagradients are made, such as replay or forward.")
    ] = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the run; the same call resumes it.")
    ] = None,
    threads: Threads = 1,
) -> None:
    """Tune a rule's hyperparameters on a problem."""
    import torch

    from ..search.tune import tune as run
    from .show import show_result

    torch.set_num_threads(threads)
    found, found_rule = _problem_and_rule(problem, rule, option)
    result = run(
        found,
        found_rule,
        learn=learn,
        steps=steps,
        schedules=dict(_pairs("--schedule", schedule)),
        granularity=dict(_pairs("--granularity", granularity)),  # type: ignore[arg-type]  # checked by Training
        values=_values("--values", values),
        budget=budget,
        seed=seed,
        route=route,
        method=method,
        out=out,
    )
    show_result(result, out)
    if result.interrupted:
        raise typer.Exit(130)


@app.command()
def compare(
    problem: OfProblem,
    rule: OfRule = "sgd",
    learn: Annotated[str, typer.Option(help="Hypers to differentiate in.")] = "lr",
    method: Annotated[
        str, typer.Option(help="By name, such as replay,implicit,neumann; all without.")
    ] = "",
    steps: Steps = 200,
    reference: Annotated[str, typer.Option(help="replay or differences.")] = "replay",
    schedule: Schedules = None,
    granularity: GranularityOption = None,
    values: Values = None,
    option: Options = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="A picture, such as methods.png.")] = None,
    threads: Threads = 1,
) -> None:
    """Ways to a hypergradient side by side: error against an exact one, and cost."""
    import torch

    from .compare import run_compare

    torch.set_num_threads(threads)
    found, found_rule = _problem_and_rule(problem, rule, option)
    run_compare(
        found,
        found_rule,
        learn=learn,
        steps=steps,
        schedules=dict(_pairs("--schedule", schedule)),
        granularity=dict(_pairs("--granularity", granularity)),
        values=_values("--values", values),
        methods=method,
        reference=reference,
        seed=seed,
        out=out,
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/demo"),
    budget: Annotated[str, typer.Option(help="Time for each of the two tuners.")] = "50s",
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
    address: Annotated[str | None, typer.Option(help="A Ray cluster; local by default.")] = None,
) -> None:
    """Metagradients against TPE on real data, in the same seconds: about two and a half minutes."""
    from .demo import run_demo

    raise typer.Exit(run_demo(out, budget, seed, address))


@app.command()
def study(
    file: Annotated[
        Path,
        typer.Argument(
            help="A study in YAML, or by name: data-cleaning, million-hypers, one-pass, optimizers."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the records; a second call resumes.")],
    address: Annotated[str | None, typer.Option(help="A Ray cluster; local by default.")] = None,
    serial: Annotated[bool, typer.Option(help="In this process, without Ray.")] = False,
    rules: Annotated[
        str | None, typer.Option(help="Of optimizers: rules by name; all without.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Of optimizers: time to tune each rule; 30s without.")
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(help="Of optimizers: a Markdown file; its section of that name is replaced."),
    ] = None,
) -> None:
    """Run a study, problems by arms by seeds, in parallel on Ray; exit code 1 if a cell failed."""
    from .show import show_study

    given = {"rules": rules, "budget": budget}
    options = {name: value for name, value in given.items() if value is not None}
    raise typer.Exit(show_study(file, out, address, serial, options=options, into=into))


@app.command()
def rules(
    markdown: Annotated[bool, typer.Option(help="As the README has them.")] = False,
) -> None:
    """List the update rules, their hyperparameters and where these are tuned."""
    from ..inner.registry import RULES
    from .catalogue import table
    from .show import show_rules

    if markdown:
        print(table(RULES.values()))
    else:
        show_rules(RULES)


@app.command()
def problems() -> None:
    """List the built-in problems."""
    from .show import show_problems

    show_problems()


@benchmarks.command()
def metagradient(
    only: Annotated[
        str, typer.Option(help="Workloads by name, such as w1-sgd,w3; all without but gpt2's.")
    ] = "",
    repeats: Annotated[int, typer.Option(help="Rounds of timing; one more does not count.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="A Markdown file; its section of that name is replaced.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where models are trained, such as cuda.")] = "cpu",
    threads: Threads = 1,
) -> None:
    """Time, memory and error of one exact metagradient, here and by other libraries."""
    import torch

    from .bench import run_metagradient

    torch.set_num_threads(threads)
    run_metagradient(only, repeats, out, device)


@benchmarks.command()
def implicit(
    only: Annotated[str, typer.Option(help="Cases by name, such as softmax; all without.")] = "",
    repeats: Annotated[int, typer.Option(help="Rounds of timing; one more does not count.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="A Markdown file; its section of that name is replaced.")
    ] = None,
    threads: Threads = 1,
) -> None:
    """Time, memory and error of one implicit hypergradient, here and by other libraries."""
    import torch

    from .bench import run_implicit

    torch.set_num_threads(threads)
    run_implicit(only, repeats, out)


@benchmarks.command()
def optimizers(
    model: Annotated[str, typer.Option(help="12m, small, or both without.")] = "",
    only: Annotated[str, typer.Option(help="Rules by name; all with a rival without.")] = "",
    repeats: Annotated[int, typer.Option(help="Rounds of timing; one more does not count.")] = 9,
    out: Annotated[
        Path | None, typer.Option(help="A Markdown file; its section of that name is replaced.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the models are, such as cuda.")] = "cpu",
    threads: Threads = 1,
) -> None:
    """Time and memory of a step of the drop-in optimizers, beside other libraries' forms."""
    import torch

    from .bench import run_optimizers

    torch.set_num_threads(threads)
    run_optimizers(model, only, repeats, out, device)


@benchmarks.command()
def bfloat16(
    only: Annotated[str, typer.Option(help="Workloads by name.")] = "w1-adam,w3",
    seeds: Annotated[int, typer.Option(help="Trainings of each kind, at least 1.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="A Markdown file; its section of that name is replaced.")
    ] = None,
) -> None:
    """How far a metagradient through bfloat16 can be trusted, beside float32."""
    import torch

    from .bench import run_bfloat16

    torch.set_num_threads(1)
    run_bfloat16(only, seeds, out)


def _problem_and_rule(problem: str, rule: str, given: list[str] | None) -> tuple[Problem, Rule]:
    """Both by name, each with the options that are its own."""
    from ..inner.registry import find_rule
    from ..studies.problems import load_problem

    options = {name: _option(text) for name, text in _pairs("--option", given)}
    found = find_rule(rule)
    of_rule = {name: value for name, value in options.items() if name in found.choices}
    of_problem = {name: value for name, value in options.items() if name not in of_rule}
    return load_problem(problem, **of_problem), found.choose(**of_rule)


def _values(flag: str, given: list[str] | None) -> dict[str, float]:
    return {name: _number(flag, name, text) for name, text in _pairs(flag, given)}


def _pairs(flag: str, given: list[str] | None) -> list[tuple[str, str]]:
    pairs = []
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise ValueError(f"{flag} {text!r} is not NAME=VALUE")
        pairs.append((name.strip(), value.strip()))
    return pairs


def _number(flag: str, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{flag} {name}={text!r} is not a number") from error


def _option(text: str) -> Any:
    """A word as JSON would read it (true, 128), else the word itself."""
    try:
        return json.loads(text.lower())
    except json.JSONDecodeError:
        return text


def main() -> None:
    """Run the command; errors are one line and exit code 2, Ctrl-C is exit code 130."""
    try:
        app()
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exception(error)
        hint = "" if _meant(error) else f" ({TRACEBACK}=1 shows where it came from)"
        print(f"error: {error}{hint}", file=sys.stderr)
        sys.exit(2)


def _meant(error: Exception) -> bool:
    """Whether it was raised for the user: by this package, or by the system."""
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    package = innermost.f_globals.get("__package__") or ""
    return isinstance(error, OSError) or package.partition(".")[0] == "hyperdescent"


if __name__ == "__main__":
    main()
