"""The Problem of training an nn.Module on data by mini-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from inspect import signature
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...inner.core.hyper import Discrete, Hyper, Tensors
from ...inner.core.messages import unknown
from .batchnorm import carry_statistics
from .data import Batch, Data, HeldOut, Split
from .gradient_accumulation import mean_loss
from .loader import Stream, as_held_out, as_train, check_filled, checked_batch_size
from .modules import (
    autocast_region,
    check_autocast,
    checked_weights,
    copy_modules,
    twice_differentiable,
)
from .seeding import fold_in, fork_rng

LossFn = Callable[..., Tensor]


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
        self._options = options
        with fork_rng(0):
            made = self.make_model(**options)
        weights = checked_weights(made, self.name)
        self._device = weights[0].device
        self._model = copy_modules(made)
        self._recurrent = any(isinstance(m, nn.RNNBase) for m in made.modules())
        carry_statistics(self._model)
        # On the device for this problem and for those it makes by `choose`.
        self.train = self.train.to(self._device)
        self.held_out = {split: data.to(self._device) for split, data in self.held_out.items()}
        check_autocast(self.autocast, weights, self.name)
        check_filled(self.splits, self.name)
        self._batch_size = checked_batch_size(size, self.accumulate, self.train, self.name)
        if self.data_weights:
            if isinstance(self.train, Stream):
                raise TypeError(
                    f"data_weights=True needs examples that can be told apart, and {self.name} "
                    "trains on an iterable; give tensors or a map-style Dataset"
                )
            self.hypers = {**self.hypers, _WEIGHTS: _weight_per_example(len(self.train))}
        self._mutable = {n for n, _ in self._model.named_buffers()}
        self._loss_takes_hypers = self.augment is None or _takes(self.loss_fn, "hypers")
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
        with fork_rng(fold_in(seed, 0, 1), self._device):
            model = self.make_model(**self._options)
        params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        frozen = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
        return params, frozen | {n: b.detach() for n, b in model.named_buffers()}

    def batch(self, step: int, seed: int) -> Batch:
        if isinstance(self.train, Stream):
            return self.train.at(step)
        index = _draw(len(self.train), self._batch_size, step, seed)
        inputs, target = self.train.batch(index, fold_in(seed, step, 4))
        if self.data_weights:
            several = inputs if isinstance(inputs, tuple) else (inputs,)
            inputs = (*several, index.to(self._device))
        return inputs, target

    def inner_loss(
        self, params: Tensors, buffers: Tensors, hypers: Tensors, batch: Batch
    ) -> tuple[Tensor, Tensors]:
        return mean_loss(self._loss, params, buffers, hypers, batch, self.accumulate)

    def output(self, params: Tensors, buffers: Tensors, hypers: Tensors, batch: Batch) -> Tensor:
        """What the model makes of a training batch."""
        return self._output(params, buffers, hypers, batch)[0]

    def _output(
        self, params: Tensors, buffers: Tensors, hypers: Tensors, batch: Batch
    ) -> tuple[Tensor, Tensors]:
        inputs = batch[0]
        if self.data_weights:
            inputs = tuple(inputs[:-1])
        if self.augment:
            inputs = self.augment(inputs, _own(hypers))
        # Copies, because a module may update its buffers in place; frozen weights stay put.
        carried = {n: b.clone() if n in self._mutable else b for n, b in buffers.items()}
        return self._forward(params, carried, inputs, training=True)

    def loss_of(self, output: Tensor, params: Tensors, hypers: Tensors, batch: Batch) -> Tensor:
        """The training loss of what the model made of a batch."""
        inputs, target = batch
        own = _own(hypers) if self._loss_takes_hypers else {}
        extra = {"hypers": own, "params": params} if own else {}
        if not self.data_weights:
            return self._scalar(self.loss_fn, output, target, **extra)
        index = inputs[-1]
        weights = hypers[_WEIGHTS].to(index.device)[index]
        with autocast_region(self._device, self.autocast):
            losses = self.loss_fn(output, target, **extra)
        return _weighted(self.loss_fn, losses, weights)

    def _loss(
        self, params: Tensors, buffers: Tensors, hypers: Tensors, batch: Batch
    ) -> tuple[Tensor, Tensors]:
        output, carried = self._output(params, buffers, hypers, batch)
        return self.loss_of(output, params, hypers, batch), carried

    def outer_loss(self, params: Tensors, buffers: Tensors, hypers: Tensors) -> Tensor:
        output, target = self._evaluate(params, buffers, "valid")
        return self._scalar(self.outer_loss_fn, output, target)

    def measure(self, params: Tensors, buffers: Tensors, split: Split) -> dict[str, float]:
        if split not in self.splits:
            raise ValueError(unknown(f"{self.name} has no split", split, self.splits))
        with torch.no_grad():
            output, target = self._evaluate(params, buffers, split)
            loss = {"loss": float(self._scalar(self.outer_loss_fn, output, target))}
            return loss | {n: float(f(output, target)) for n, f in self.metrics.items()}

    def _evaluate(self, params: Tensors, buffers: Tensors, split: Split) -> tuple[Tensor, Tensor]:
        with fork_rng(0, self._device):
            inputs, target = self.splits[split].whole()
            output, _ = self._forward(params, dict(buffers), inputs, training=False)
        return output, target

    def _forward(
        self, params: Tensors, buffers: Tensors, inputs: object, *, training: bool
    ) -> tuple[Tensor, Tensors]:
        self._model.train(training)
        state = {**params, **buffers}
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        with twice_differentiable(self._recurrent), autocast_region(self._device, self.autocast):
            # functional_call writes buffers that a module replaced back into this dict.
            output = functional_call(self._model, state, args)
        if self.autocast and isinstance(output, Tensor) and output.dtype == self.autocast:
            output = output.float()  # What is made of it, sums over examples above all, is not low.
        return output, {n: state[n] for n in buffers}

    def _scalar(self, loss_fn: LossFn, output: object, target: Tensor, **extra: Tensors) -> Tensor:
        with autocast_region(self._device, self.autocast):
            return _scalar(loss_fn, output, target, **extra)


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

    train, valid, test: (inputs, targets) tensors whose first dimension is the example, a map-style
    Dataset of such pairs, or an iterable of (inputs, target) batches such as a DataLoader. Only
    valid is seen by the tuner. A step reads batch_size examples; a last, smaller batch is dropped;
    every epoch has a permutation of its own. The batches of an iterable are recorded in the host's
    memory as they first come, and it is iterated again where it ends: with one, a DataLoader over a
    map-style Dataset included, every seed sees the same batches in the same order, and it alone
    decides on their size. As valid or test it is read at once, so it must have an end.

    make_model is called once per seed, under that seed, and may take the discrete choices as
    keywords ("batch_size" among them is taken by the problem itself). loss_fn(output, target)
    returns a scalar; if hypers declares the loss's own hyperparameters it is called with hypers=
    and params= as well, and outer_loss_fn(output, target) must say what the held-out loss is.
    BatchNorm statistics are differentiated; buffers that other modules update outside autograd are
    carried, not differentiated. Attention is done by products and a softmax and recurrent layers
    without cuDNN, in plain training too: the fused kernels of both have no second derivative.

    accumulate: a step's batch is so many equal parts, done one after the other, and the training
    loss is the mean of theirs; where steps are not compiled, the graph of one part is held at a
    time. autocast: torch.bfloat16 for mixed precision; weights and slots stay float32.

    augment(inputs, hypers) changes the inputs of a training batch, and of no other, before the
    model sees them: by a strength, or by a network whose weights are hypers. What it draws from
    torch's global generators is seeded by the step. loss_fn may then leave hypers= and params= out.

    data_weights: a hyperparameter "data_weights" of one number per example of train, 1 by default:
    loss_fn returns a loss per example, as with reduction="none", and the training loss is the mean
    of weight times loss; the held-out loss is the plain mean. Going back, a step's share of all its
    examples is one derivative of their losses along the adjoint (Engstrom et al. 2025,
    arXiv:2503.13751): no gradient per example is made.
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
        outer_loss_fn=outer_loss_fn or (partial(_mean, loss_fn) if data_weights else loss_fn),
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


def _takes(function: Callable[..., object], name: str) -> bool:
    """Whether a function has a parameter of that name."""
    if isinstance(function, nn.Module):
        function = function.forward
    try:
        parameters = signature(function).parameters
    except ValueError:  # A builtin that does not tell.
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _scalar(loss_fn: LossFn, output: object, target: Tensor, **extra: Tensors) -> Tensor:
    """The loss; NaN if loss_fn refuses an output because that is NaN."""
    try:
        loss = loss_fn(output, target, **extra)
    except Exception:
        if not isinstance(output, Tensor) or not bool(output.isnan().any()):
            raise
        return output.sum()
    if isinstance(loss, Tensor) and loss.numel() != 1:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise ValueError(
            f"the loss function {name} returned shape {tuple(loss.shape)}; return a scalar, for "
            "example the mean"
        )
    return loss


def _weighted(loss_fn: LossFn, losses: Tensor, weights: Tensor) -> Tensor:
    """The mean of weight times loss of a batch."""
    if losses.shape != weights.shape:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise ValueError(
            f"with data_weights=True the loss function {name} must return one loss per example, "
            f'shape {tuple(weights.shape)}, as with reduction="none"; it returned '
            f"{tuple(losses.shape)}"
        )
    return (weights.to(losses) * losses).mean()


def _mean(loss_fn: LossFn, output: object, target: Tensor) -> Tensor:
    return loss_fn(output, target).mean()


def _weight_per_example(examples: int) -> Hyper:
    """How much each example of the training data counts."""
    return Hyper(1.0, 0.0, math.inf, "linear", (0.0, 2.0), shape=(examples,))


def _draw(examples: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The example indices of a step: consecutive parts of the epoch's permutation."""
    epoch, part = divmod(step, examples // batch_size)
    return _permutation(examples, seed, epoch)[part * batch_size : (part + 1) * batch_size]


@lru_cache(maxsize=256)
def _permutation(examples: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(fold_in(seed, epoch, 3))
    return torch.randperm(examples, generator=generator)


__all__ = ["ModuleProblem", "problem_from_module"]
