"""The Problem of training an nn.Module on data by mini-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ...inner.core.hyper import Discrete, Hyper, Tensors
from ...inner.core.messages import unknown
from .data import Batch, Data, HeldOut, Split, example_indices
from .functional_model import FunctionalModel
from .gradient_accumulation import mean_loss
from .loader import Stream, as_held_out, as_train, check_filled, checked_batch_size
from .losses import LossFn, mean_of, takes, weighted_mean
from .seeding import fold_in, fork_rng

# (inputs, hypers) -> inputs of the same kind.
Augment = Callable[[Any, Tensors], Any]


# The hyperparameter that data_weights=True adds.
_WEIGHTS = "data_weights"


@dataclass(eq=False)
class ModuleProblem:
    """The Problem of training an nn.Module by mini-batches; made by `problem_from_module`."""

    name: str
    make_model: Callable[..., nn.Module]
    loss_fn: LossFn
    outer_loss_fn: LossFn
    train: Data | Stream
    held_out: Mapping[Split, HeldOut]
    batch_size: int | None
    accumulate: int
    autocast: torch.dtype | None
    hypers: Mapping[str, Hyper]
    metrics: Mapping[str, LossFn]
    choices: Mapping[str, Discrete]
    chosen: Mapping[str, object] = field(default_factory=dict)
    data_weights: bool = False
    augment: Augment | None = None

    def __post_init__(self) -> None:
        options = {option: c.default for option, c in self.choices.items()} | dict(self.chosen)
        size = options.pop("batch_size", self.batch_size)
        self._model = FunctionalModel(self.make_model, options, self.autocast, self.name)
        # On the device for this problem and for those it makes by `choose`.
        device = self._model.device
        self.train = self.train.to(device)
        self.held_out = {split: data.to(device) for split, data in self.held_out.items()}
        check_filled(self.splits, self.name)
        self._batch_size = checked_batch_size(size, self.accumulate, self.train, self.name)
        if self.data_weights:
            if isinstance(self.train, Stream):
                raise TypeError(
                    f"data_weights=True needs examples that can be told apart, and {self.name} "
                    "trains on an iterable; give tensors or a map-style Dataset"
                )
            self.hypers = {**self.hypers, _WEIGHTS: _weight_per_example(len(self.train))}
        self._loss_takes_hypers = self.augment is None or takes(self.loss_fn, "hypers")
        self._fixed = True

    def __setattr__(self, name: str, value: object) -> None:
        # Steps that were compiled for a problem are used for as long as it lives.
        if hasattr(self, "_fixed"):
            raise AttributeError(
                f"{name} of {self.name} cannot be changed: its steps may be compiled already; make "
                f"another problem, for example dataclasses.replace(problem, {name}=...)"
            )
        super().__setattr__(name, value)

    @property
    def splits(self) -> Mapping[Split, HeldOut]:
        """What can be read as a whole: not a stream to train on, which may have no end."""
        train: dict[Split, HeldOut] = {}
        if not isinstance(self.train, Stream):
            train["train"] = self.train
        return train | dict(self.held_out)

    def choose(self, **chosen: object) -> ModuleProblem:
        for option, value in chosen.items():
            if option not in self.choices:
                raise TypeError(unknown(f"{self.name} has no option", option, self.choices))
            self.choices[option].check(option, value)
        return replace(self, chosen={**self.chosen, **chosen})

    def start(self, seed: int) -> tuple[Tensors, Tensors]:
        return self._model.start(seed)

    def batch(self, step: int, seed: int) -> Batch:
        if isinstance(self.train, Stream):
            return self.train.at(step)
        index = example_indices(len(self.train), self._batch_size, step, seed)
        inputs, target = self.train.batch(index, fold_in(seed, step, 4))
        if self.data_weights:
            several = inputs if isinstance(inputs, tuple) else (inputs,)
            inputs = (*several, index.to(self._model.device))
        return inputs, target

    def inner_loss(
        self, params: Tensors, buffers: Tensors, hypers: Tensors, batch: Batch
    ) -> tuple[Tensor, Tensors]:
        def loss(
            params: Tensors, buffers: Tensors, hypers: Tensors, batch: Batch
        ) -> tuple[Tensor, Tensors]:
            output, carried = self.output(params, buffers, hypers, batch)
            return self.loss_of(output, params, hypers, batch), carried

        return mean_loss(loss, params, buffers, hypers, batch, self.accumulate)

    def output(
        self, params: Tensors, buffers: Tensors, hypers: Tensors, batch: Batch
    ) -> tuple[Tensor, Tensors]:
        """What the model makes of a training batch, and the buffers after it."""
        inputs = batch[0]
        if self.data_weights:
            inputs = tuple(inputs[:-1])
        if self.augment:
            inputs = self.augment(inputs, _own(hypers))
        return self._model(params, buffers, inputs, training=True)

    def loss_of(self, output: Tensor, params: Tensors, hypers: Tensors, batch: Batch) -> Tensor:
        """The training loss of what the model made of a batch."""
        inputs, target = batch
        own = _own(hypers) if self._loss_takes_hypers else {}
        extra = {"hypers": own, "params": params} if own else {}
        if not self.data_weights:
            return self._model.scalar_loss(self.loss_fn, output, target, **extra)
        index = inputs[-1]
        weights = hypers[_WEIGHTS].to(index.device)[index]
        losses = self._model.loss(self.loss_fn, output, target, **extra)
        return weighted_mean(self.loss_fn, losses, weights)

    def outer_loss(self, params: Tensors, buffers: Tensors, hypers: Tensors) -> Tensor:
        output, target = self._evaluate(params, buffers, "valid")
        return self._model.scalar_loss(self.outer_loss_fn, output, target)

    def measure(self, params: Tensors, buffers: Tensors, split: Split) -> dict[str, float]:
        if split not in self.splits:
            raise ValueError(unknown(f"{self.name} has no split", split, self.splits))
        with torch.no_grad():
            output, target = self._evaluate(params, buffers, split)
            loss = self._model.scalar_loss(self.outer_loss_fn, output, target)
            metrics = {n: float(f(output, target)) for n, f in self.metrics.items()}
            return {"loss": float(loss), **metrics}

    def _evaluate(self, params: Tensors, buffers: Tensors, split: Split) -> tuple[Tensor, Tensor]:
        with fork_rng(0, self._model.device):
            inputs, target = self.splits[split].whole()
            output, _ = self._model(params, buffers, inputs, training=False)
        return output, target


def problem_from_module(
    make_model: Callable[..., nn.Module],
    loss_fn: LossFn,
    train: object,
    valid: object,
    *,
    batch_size: int | None = None,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    test: object = None,
    hypers: Mapping[str, Hyper] = MappingProxyType({}),
    outer_loss_fn: LossFn | None = None,
    metrics: Mapping[str, LossFn] = MappingProxyType({}),
    choices: Mapping[str, Discrete] = MappingProxyType({}),
    data_weights: bool = False,
    augment: Augment | None = None,
    name: str | None = None,
) -> ModuleProblem:
    """The problem of training the model that make_model returns, by mini-batches of train.

    BatchNorm statistics are differentiated; buffers that other modules update outside autograd are
    carried, not differentiated. Attention is done by products and a softmax and recurrent layers
    without cuDNN, in plain training too: the fused kernels of both have no second derivative.

    Args:
        make_model: called once per seed, under that seed, with the discrete choices as keywords
            ("batch_size" among them is taken by the problem itself).
        loss_fn: loss_fn(output, target) returns a scalar; with hypers it is called with hypers= and
            params= as well.
        train: (inputs, targets) tensors whose first dimension is the example, a map-style Dataset
            of such pairs, or an iterable of (inputs, target) batches such as a DataLoader. Of the
            first two a step reads batch_size examples, every epoch in an order of its own; a last,
            smaller batch is dropped. The batches of an iterable are recorded in the host's memory
            as they first come, and it is iterated again where it ends: with one, a DataLoader over
            a map-style Dataset included, every seed sees the same batches in the same order, and it
            alone decides on their size.
        valid: of the same kinds; all that the tuner sees. An iterable is read at once, so it must
            have an end.
        batch_size: examples of a step.
        accumulate: a step's batch is so many equal parts, done one after the other, and the
            training loss is the mean of theirs; where steps are not compiled, the graph of one part
            is held at a time.
        autocast: torch.bfloat16 for mixed precision; weights and slots stay float32.
        test: of the same kinds, for `measure` alone.
        hypers: of the loss itself.
        outer_loss_fn: outer_loss_fn(output, target), the held-out loss; loss_fn where that has no
            hypers.
        metrics: by name, functions of (output, target) to report.
        choices: discrete options of the model.
        data_weights: adds a hyperparameter "data_weights" of one number per example of train, 1 by
            default: loss_fn returns a loss per example, as with reduction="none", and the training
            loss is the mean of weight times loss; the held-out loss is the plain mean. Going back,
            a step's share of all its examples is one derivative of their losses along the adjoint
            (Engstrom et al. 2025, arXiv:2503.13751): no gradient per example is made.
        augment: augment(inputs, hypers) changes the inputs of a training batch, and of no other,
            before the model sees them: by a strength, or by a network whose weights are hypers.
            What it draws from torch's global generators is seeded by the step. loss_fn may then
            leave hypers= and params= out.
        name: of the problem; make_model's if not given.
    """
    if hypers and outer_loss_fn is None:
        raise ValueError(
            "a loss with hyperparameters needs outer_loss_fn(output, target), the held-out loss: "
            "tuning them on a loss that contains them would only switch them off"
        )
    held_out: dict[Split, HeldOut] = {"valid": as_held_out(valid)}
    if test is not None:
        held_out["test"] = as_held_out(test)
    return ModuleProblem(
        name=name or str(getattr(make_model, "__name__", "module")),
        make_model=make_model,
        loss_fn=loss_fn,
        outer_loss_fn=outer_loss_fn or (partial(mean_of, loss_fn) if data_weights else loss_fn),
        train=as_train(train),
        held_out=held_out,
        batch_size=batch_size,
        accumulate=accumulate,
        autocast=autocast,
        hypers=dict(hypers),
        metrics=dict(metrics),
        choices=dict(choices),
        data_weights=data_weights,
        augment=augment,
    )


def _own(hypers: Tensors) -> Tensors:
    """The hypers that the user declared."""
    return {name: value for name, value in hypers.items() if name != _WEIGHTS}


def _weight_per_example(examples: int) -> Hyper:
    """How much each example of the training data counts."""
    return Hyper(1.0, 0.0, math.inf, "linear", (0.0, 2.0), shape=(examples,))


__all__ = ["ModuleProblem", "problem_from_module"]
