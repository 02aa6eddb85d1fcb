"""Data hyper-cleaning: a weight for every training example, half of whose labels are wrong.

The labels of half of the training data are changed to another class. Each example gets a weight in
(0, 1), a hyperparameter of the training loss, learned by descent on the loss of clean validation
data (Franceschi et al. 2017, arXiv:1703.01785). Examples with a weight below 1/2 are called wrong.
What counts is how well that is told, F1, and what a model trained on the others and on the
validation data is worth beside one trained on the validation data alone: where that is as good,
nothing useful was learned.
"""

from __future__ import annotations

import gzip
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...inner.core.hyper import Hyper, Tensors
from ...inner.registry import find_rule
from ...meta.bilevel.bamm import BAMM
from ...meta.bilevel.bda import BDA
from ...meta.bilevel.meha import MEHA
from ...meta.bilevel.penalty import Penalty
from ...meta.implicit.implicit import Implicit
from ...meta.problems.module_problem import ModuleProblem, problem_from_module
from ...meta.reverse.replay import Replay
from ...meta.training.coordinates import Coordinates
from ...meta.training.estimate import Estimate, Estimator
from ...meta.training.outcome import Outcome
from ...meta.training.training import Training
from ...search.provenance import provenance
from ..data_files import find_file
from ..engine.record import Json, Measures, Record
from ..problems import Part

NAME, SEEDS = "data-cleaning", 3
_L2, _CLASSES = 1e-3, 10


@dataclass(frozen=True)
class DataCleaningSetting:
    """train, valid: numbers of examples, the others are test. steps, lr: of gradient descent on
    all of them. moves, rate: of Adam on the logits of the weights.
    """

    load: Callable[[], Part]
    train: int
    valid: int
    steps: int
    lr: float
    moves: int
    rate: float


@dataclass(frozen=True)
class Method:
    """One way to clean. share: of the training's steps that each move takes, for those that go on
    from the last.
    """

    make: Callable[[], Estimator]
    share: float = 1.0


@dataclass(frozen=True)
class CleaningCell:
    """One method, or one way to train without any, on one draw of the data."""

    data: str
    method: str
    seed: int
    study: str = NAME

    @property
    def inputs(self) -> dict[str, Json]:
        setting: dict[str, Json] = {
            name: value
            for name, value in asdict(SETTINGS[self.data]).items()
            if isinstance(value, int | float)
        }
        arm: dict[str, Json] = {"name": self.method}
        if self.method in METHODS:
            method = METHODS[self.method]
            # With its options, as it prints itself, but not where a function lies in memory.
            told = re.sub(r" at 0x[0-9a-f]+", "", repr(method.make()))
            arm |= {"estimator": told, "share": method.share}
        return {
            "study": self.study,
            "problem": {"name": self.data, "setting": setting},
            "arm": arm,
            "seed": self.seed,
        }


def _digits() -> Part:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.as_tensor(x / 16, dtype=torch.float32), torch.as_tensor(y)


def _mnist() -> Part:
    what = "the 10,000 test images of MNIST and their labels"
    read = []
    for name, skipped in (("images-idx3", 16), ("labels-idx1", 8)):
        with gzip.open(find_file(f"mnist-t10k-{name}-ubyte.gz", what)) as file:
            read.append(np.frombuffer(file.read(), np.uint8, offset=skipped).copy())
    images, labels = map(torch.from_numpy, read)
    return images.view(len(labels), -1).float() / 255, labels.long()


SETTINGS: Mapping[str, DataCleaningSetting] = {
    "digits": DataCleaningSetting(_digits, 500, 500, 100, 1.0, 200, 0.1),
    "mnist-t10k": DataCleaningSetting(_mnist, 1000, 1000, 60, 0.5, 50, 0.25),
}

# Steps that are traced but not compiled: a cell is seconds of small steps.
_TRACED = partial(Replay, compile="trace")
METHODS: Mapping[str, Method] = {
    "full": Method(_TRACED),
    "K=10": Method(partial(_TRACED, window=10)),
    "K=1": Method(partial(_TRACED, window=1)),
    "implicit": Method(partial(Implicit, warm_start=True, tolerance=math.inf)),
    "F2SA": Method(partial(Penalty, 3.0, warm_start=True), share=0.1),
    "BAMM": Method(partial(BAMM, rate=0.5), share=0.1),
    "MEHA": Method(partial(MEHA, gamma=1000.0, c0=1.0, power=0.0), share=0.1),
    "BDA": Method(lambda: BDA(0.1, replay=_TRACED()), share=0.3),
}
# What is trained on without a method: (whether all, the right ones or none of the training data,
# whether the validation data).
BASELINES: Mapping[str, tuple[str, bool]] = {
    "noisy only": ("all", False),
    "validation only": ("none", True),
    "noisy + validation": ("all", True),
    "oracle": ("right", False),
    "oracle + validation": ("right", True),
}
# Columns of its table: in percent, of a model trained on what is kept and on the validation data,
# and of one trained with the weights; how well wrong labels are told.
MEASURES = (
    "test accuracy",
    "test weighted",
    "labels precision",
    "labels recall",
    "labels F1",
    "seconds",
)


def cleaning_cells() -> tuple[list[CleaningCell], list[str]]:
    """(the cells of the study, what is left out and why)."""
    cells, left_out = [], []
    for data, setting in SETTINGS.items():
        try:
            setting.load()
        except FileNotFoundError as missing:
            left_out.append(f"{data} is left out: {missing}")
            continue
        cells += [
            CleaningCell(data, method, seed)
            for method in (*BASELINES, *METHODS)
            for seed in range(SEEDS)
        ]
    return cells, left_out


def clean(cell: CleaningCell) -> Record:
    """Learn the weights if the cell has a method, train, and measure on the test data."""
    torch.set_num_threads(1)
    setting = SETTINGS[cell.data]
    data = _draw(cell.data, cell.seed)
    measures: Measures = {}
    seconds, outcome = None, Outcome.OK
    if cell.method in BASELINES:
        which, validation = BASELINES[cell.method]
        all_ = torch.ones_like(data.wrong)
        kept = {"all": all_, "right": ~data.wrong, "none": ~all_}[which]
        measures["test"] = {"accuracy": _accuracy(setting, data, kept, validation)}
    else:
        began = time.perf_counter()
        found = _learn(METHODS[cell.method], setting, data)
        seconds = time.perf_counter() - began
        if isinstance(found, Estimate):
            outcome = found.note.outcome
        else:
            measures = _judged(setting, data, found)
    return Record(
        study=cell.study,
        inputs=cell.inputs,
        outcome=outcome,
        measures=measures,
        seconds=seconds,
        provenance=provenance(),
    )


@dataclass(frozen=True)
class _Drawn:
    train: Part
    valid: Part
    test: Part
    wrong: Tensor


def _draw(name: str, seed: int) -> _Drawn:
    """The parts of the data, and which labels of the first were changed."""
    setting, (x, y) = SETTINGS[name], _loaded(name)
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=draw)
    rest = len(y) - setting.train - setting.valid
    train, valid, test = order.split([setting.train, setting.valid, rest])
    wrong = torch.zeros(setting.train, dtype=torch.bool)
    wrong[torch.randperm(setting.train, generator=draw)[: setting.train // 2]] = True
    moved = torch.randint(1, _CLASSES, (setting.train,), generator=draw)
    labels = torch.where(wrong, (y[train] + moved) % _CLASSES, y[train])
    return _Drawn((x[train], labels), (x[valid], y[valid]), (x[test], y[test]), wrong)


@lru_cache(maxsize=2)
def _loaded(name: str) -> Part:
    return SETTINGS[name].load()


class _Softmax(nn.Module):
    """Linear, from 0; it passes the numbers of the examples on to the loss."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, _CLASSES)
        for p in self.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), index


def _weighted_loss(
    output: tuple[Tensor, Tensor], target: Tensor, *, hypers: Tensors, params: Tensors
) -> Tensor:
    scores, index = output
    weights = hypers["weight"].to(scores)[index]
    losses = functional.cross_entropy(scores, target, reduction="none")
    return (weights * losses).mean() + _penalty(params)


def _penalty(params: Tensors) -> Tensor:
    return torch.stack([p.square().sum() for p in params.values()]).sum() * (_L2 / 2)


def _held_out_loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return functional.cross_entropy(output[0], target)


def cleaning_problem(train: Part, valid: Part) -> ModuleProblem:
    """A softmax regression on all of train, each example with its "weight" in (0, 1)."""
    (x, y), (x_valid, y_valid) = train, valid
    edge = 1e-5
    weight = Hyper(0.5, 0.0, 1.0, "logit", (edge, 1 - edge), shape=(len(y),))
    return problem_from_module(
        partial(_Softmax, x.shape[1]),
        _weighted_loss,
        ((x, torch.arange(len(y))), y),
        ((x_valid, torch.zeros_like(y_valid)), y_valid),
        batch_size=len(y),
        hypers={"weight": weight},
        outer_loss_fn=_held_out_loss,
        name=NAME,
    )


def _learn(method: Method, setting: DataCleaningSetting, data: _Drawn) -> Tensor | Estimate:
    """The logits of the weights, or the estimate that could not be followed."""
    steps = max(1, round(setting.steps * method.share))
    problem = cleaning_problem(data.train, data.valid)
    training = Training(problem, find_rule("sgd"), steps, values={"lr": setting.lr})
    space = Coordinates({"weight": training.hypers["weight"]})
    z = space.free(training.start(["weight"])).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=setting.rate)
    estimator, carry = method.make(), None
    for _ in range(setting.moves):
        point = space.point(z.detach())
        estimate, carry = estimator(training, point, carry, seed=0)
        if not estimate.ok:
            return estimate
        z.grad = space.pull(z, estimate.grad)
        optimizer.step()
    return z.detach()


def _judged(setting: DataCleaningSetting, data: _Drawn, z: Tensor) -> Measures:
    called, wrong = z < 0, data.wrong
    both = float((called & wrong).sum())
    precision = both / max(float(called.sum()), 1.0)
    recall = both / float(wrong.sum())
    f1 = 2 * precision * recall / max(precision + recall, 1e-300)
    weights = torch.sigmoid(z).float()
    return {
        "test": {
            "accuracy": _accuracy(setting, data, ~called, validation=True),
            "weighted": _accuracy(setting, data, torch.ones_like(called), False, weights),
        },
        "labels": {"precision": precision, "recall": recall, "F1": f1},
    }


def _accuracy(
    setting: DataCleaningSetting,
    data: _Drawn,
    kept: Tensor,
    validation: bool,
    weights: Tensor | None = None,
) -> float:
    """In percent, on the test data, of a model trained on what is kept of the training data."""
    parts = [(data.train[0][kept], data.train[1][kept]), *([data.valid] if validation else [])]
    x, y = (torch.cat(each) for each in zip(*parts, strict=True))
    weights = torch.ones(len(y)) if weights is None else weights
    p = {"weight": torch.zeros(_CLASSES, x.shape[1]), "bias": torch.zeros(_CLASSES)}
    for _ in range(setting.steps):
        p = {name: value.requires_grad_() for name, value in p.items()}
        losses = functional.cross_entropy(functional.linear(x, **p), y, reduction="none")
        loss = (weights * losses).mean() + _penalty(p)
        grads = torch.autograd.grad(loss, list(p.values()))
        p = {
            name: value.detach() - setting.lr * g
            for (name, value), g in zip(p.items(), grads, strict=True)
        }
    x, y = data.test
    return 100 * float((functional.linear(x, **p).argmax(1) == y).float().mean())


__all__ = [
    "BASELINES",
    "MEASURES",
    "METHODS",
    "NAME",
    "SETTINGS",
    "CleaningCell",
    "clean",
    "cleaning_cells",
    "cleaning_problem",
]
