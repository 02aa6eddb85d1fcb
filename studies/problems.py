"""Problems that need no download, by name: small enough that a training takes a second.

The data come with scikit-learn; sources are in its documentation of `sklearn.datasets`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from importlib import import_module
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..inner.core.hyper import Choice, Integer, Tensors, positive
from ..inner.core.messages import unknown
from ..meta.problems.module_problem import ModuleProblem, problem_from_module
from ..meta.problems.problem import Problem

Part = tuple[Tensor, Tensor]
Scaled = Literal["pixels", "inputs", "inputs and target"]


class Examples(NamedTuple):
    """(inputs, targets) of each part of a data set."""

    train: Part
    valid: Part
    test: Part


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
}
_SMALL = {"width": Integer(16, 4, 64, log=True), "depth": Integer(1, 1, 3)}


def digits_mlp(split: int = 0) -> ModuleProblem:
    """Ten digits from 8 x 8 pixels by a perceptron; 897 / 450 / 450 examples."""
    return problem_from_module(
        partial(_perceptron, 64, 10),
        functional.cross_entropy,
        **_examples("digits", "pixels", split)._asdict(),
        batch_size=64,
        metrics={"accuracy": accuracy},
        choices={
            "width": Integer(64, 8, 256, log=True),
            "depth": Integer(2, 1, 4),
            "activation": Choice("gelu", tuple(_ACTIVATIONS)),
            "batch_size": Choice(64, (16, 32, 64, 128)),
        },
        name="digits-mlp",
    )


def digits_cnn(split: int = 0) -> ModuleProblem:
    """Ten digits from 8 x 8 pixels by two convolutions with batch normalization."""
    return problem_from_module(
        _convolutions,
        functional.cross_entropy,
        **_examples("digits", "pixels", split)._asdict(),
        batch_size=64,
        metrics={"accuracy": accuracy},
        choices={"width": Integer(8, 4, 32, log=True), "batch_size": Choice(64, (32, 64, 128))},
        name="digits-cnn",
    )


def breast_cancer_logistic(split: int = 0) -> ModuleProblem:
    """Two classes from 30 measurements, linear: convex, one full batch, `l2` the weight penalty."""
    examples = _examples("breast_cancer", "inputs", split)
    return problem_from_module(
        partial(nn.Linear, 30, 1),
        _penalized_logistic,
        *((x, y[:, None].float()) for x, y in (examples.train, examples.valid)),
        test=(examples.test[0], examples.test[1][:, None].float()),
        batch_size=283,
        hypers={"l2": positive(1e-3, search=(1e-6, 10.0))},
        outer_loss_fn=functional.binary_cross_entropy_with_logits,
        metrics={"accuracy": _sign_accuracy},
        name="breast-cancer-logistic",
    )


def wine_mlp(split: int = 0) -> ModuleProblem:
    """Three cultivars from 13 measurements; 88 / 45 / 45 examples, so average over splits."""
    return problem_from_module(
        partial(_perceptron, 13, 3),
        functional.cross_entropy,
        **_examples("wine", "inputs", split)._asdict(),
        batch_size=22,
        metrics={"accuracy": accuracy},
        choices={**_SMALL, "activation": Choice("gelu", tuple(_ACTIVATIONS))},
        name="wine-mlp",
    )


def diabetes_mlp(split: int = 0) -> ModuleProblem:
    """Progression of diabetes from 10 measurements; the loss is in units of the train variance."""
    return problem_from_module(
        partial(_perceptron, 10, 1),
        functional.mse_loss,
        **_examples("diabetes", "inputs and target", split)._asdict(),
        batch_size=44,
        metrics={"r2": explained},
        choices={**_SMALL, "activation": Choice("tanh", tuple(_ACTIVATIONS))},
        name="diabetes-mlp",
    )


PROBLEMS: dict[str, Callable[..., ModuleProblem]] = {
    make.__name__.replace("_", "-"): make
    for make in (digits_mlp, digits_cnn, breast_cancer_logistic, wine_mlp, diabetes_mlp)
}


def load_problem(name: str, **options: object) -> Problem:
    """The built-in problem called name, or what "package.module:function" makes.

    Args:
        name: as `hyperdescent problems` lists them; or a function's, whose module may lie in the
            current folder; workers of a cluster must be able to import it too.
        options: of a built-in problem its discrete choices, and split, the seed of the permutation
            that divides the data; of a function its keywords.
    """
    if ":" in name:
        problem = _imported(name)(**options)
        if not isinstance(problem, Problem):
            raise TypeError(f"{name} returned {type(problem).__name__}, not a Problem")
        return problem
    check_problem(name)
    built = {"split": options.pop("split")} if "split" in options else {}
    return PROBLEMS[name](**built).choose(**options)


def check_problem(name: str) -> None:
    """Raise ValueError unless a built-in problem is called name; "module:function" is not tried."""
    if ":" not in name and name not in PROBLEMS:
        raise ValueError(unknown("there is no problem", name, PROBLEMS))


def _imported(spec: str) -> Callable[..., object]:
    module, _, function = spec.partition(":")
    # As `python -m` does; a console script has only the folder it is installed in.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        make = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"problem {spec!r} cannot be imported: {error}") from error
    if not callable(make):
        raise TypeError(f"problem {spec!r} is {type(make).__name__}, not a function")
    return make  # type: ignore[no-any-return]  # callable by the line above


def label_of(name: str, options: Mapping[str, object]) -> str:
    """A problem and its options in a word, such as "wine-mlp(width=32)"."""
    listed = ", ".join(f"{option}={value}" for option, value in options.items())
    return f"{name}({listed})" if listed else name


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """The share of examples whose largest output is the target's."""
    return (output.argmax(1) == target).double().mean()


def explained(output: Tensor, target: Tensor) -> Tensor:
    """The share of the targets' variance that is explained, R squared."""
    return 1 - (output - target).square().sum() / (target - target.mean()).square().sum()


def _sign_accuracy(output: Tensor, target: Tensor) -> Tensor:
    return ((output > 0) == (target > 0.5)).double().mean()


def _penalized_logistic(
    output: Tensor, target: Tensor, *, hypers: Tensors, params: Tensors
) -> Tensor:
    # The bias is not penalized: it only says how common the classes are.
    penalty = hypers["l2"].to(output.dtype) / 2 * params["weight"].square().sum()
    return functional.binary_cross_entropy_with_logits(output, target) + penalty


def _perceptron(inputs: int, outputs: int, width: int, depth: int, activation: str) -> nn.Module:
    layers: list[nn.Module] = []
    for size in (inputs, *[width] * (depth - 1)):
        layers += [nn.Linear(size, width), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def _convolutions(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


@lru_cache(maxsize=32)
def _examples(dataset: str, scaled: Scaled, split: int) -> Examples:
    """Half of the data to train, a quarter each to validate and test; float32.

    Scaled by what is known of the train part alone. Each call returns the same tensors.
    """
    x, y = _loaded(dataset)
    quarter = -(-len(y) // 4)
    sizes = [len(y) - 2 * quarter, quarter, quarter]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(split))
    train, valid, test = order.split(sizes)
    x = x / 16 if scaled == "pixels" else _standardized(x, train)
    if scaled == "inputs and target":
        y = _standardized(y[:, None], train)
    y = y.float() if y.is_floating_point() else y
    parts = [(x[index].float(), y[index]) for index in (train, valid, test)]
    return Examples(*parts)


def _standardized(x: Tensor, train: Tensor) -> Tensor:
    spread = x[train].std(0)
    return (x - x[train].mean(0)) / torch.where(spread > 0, spread, 1.0)


@lru_cache(maxsize=8)
def _loaded(dataset: str) -> tuple[Tensor, Tensor]:
    from sklearn import datasets

    x, y = getattr(datasets, f"load_{dataset}")(return_X_y=True)
    return torch.as_tensor(x, dtype=torch.float64), torch.as_tensor(y)


__all__ = ["PROBLEMS", "accuracy", "check_problem", "explained", "label_of", "load_problem"]
