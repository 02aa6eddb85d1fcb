"""What is trained: the Problem protocol, and a Problem made from any nn.Module and data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.backends import cuda
from torch.func import functional_call

from ..inner.hyper import Discrete, Hyper, Tensors
from ..inner.rule import unknown
from .batchnorm import carry_statistics
from .data import Data, Inputs, Split, as_data, mix, seeded

LossFn = Callable[..., Tensor]
_FUSED: tuple[tuple[Callable[[], bool], Callable[[bool], None]], ...] = (
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
)


@runtime_checkable
class Problem(Protocol):
    """A model, its training loss and a held-out loss, as pure functions.

    hypers: the loss's own hyperparameters. choices: its discrete options; chosen: those in force
    where not the default. Every random draw is a function of the arguments alone, so that a replay
    repeats it bit for bit; those of inner_loss (dropout) are from torch's global generators, which
    whoever calls it has seeded with (seed, step).
    """

    name: str
    hypers: Mapping[str, Hyper]
    choices: Mapping[str, Discrete]
    chosen: Mapping[str, object]

    @property
    def splits(self) -> Iterable[Split]:
        """What `measure` can be asked for; "valid" always."""
        ...

    def choose(self, **chosen: object) -> Problem:
        """The same problem with other discrete options."""
        ...

    def start(self, seed: int) -> tuple[Tensors, Tensors]:
        """Fresh (parameters, buffers)."""
        ...

    def batch(self, step: int, seed: int) -> Any:
        """What the training loss reads at a step (from 0): nested tuples, lists, dicts of tensors.

        Where shapes are the same at every step, steps can be compiled.
        """
        ...

    def inner_loss(
        self, params: Tensors, buffers: Tensors, hypers: Tensors, batch: Any
    ) -> tuple[Tensor, Tensors]:
        """The scalar training loss on a batch, and the buffers after it."""
        ...

    def outer_loss(self, params: Tensors, buffers: Tensors, hypers: Tensors) -> Tensor:
        """The scalar held-out loss, deterministic."""
        ...

    def measure(self, params: Tensors, buffers: Tensors, split: Split) -> dict[str, float]:
        """What to report about trained parameters on one split: "loss" and more by name."""
        ...


def loss_at(
    problem: Problem, params: Tensors, buffers: Tensors, hypers: Tensors, step: int, seed: int
) -> tuple[Tensor, Tensors]:
    """The training loss at a step on that step's batch, under that step's random draws."""
    batch = problem.batch(step, seed)
    with draws_of(step, seed, next(iter(params.values())).device):
        return problem.inner_loss(params, buffers, hypers, batch)


def draws_of(step: int, seed: int, device: torch.device) -> AbstractContextManager[None]:
    """The random draws that the training loss makes at a step."""
    return seeded(mix(seed, step, 2), device)


@dataclass(eq=False)
class ModuleProblem:
    """The Problem of training an nn.Module by mini-batches; made by `problem_from_module`."""

    name: str
    make_model: Callable[..., nn.Module]
    loss_fn: LossFn
    outer_loss_fn: LossFn
    splits: Mapping[Split, Data]
    batch_size: int
    hypers: Mapping[str, Hyper]
    metrics: Mapping[str, LossFn]
    choices: Mapping[str, Discrete]
    chosen: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options = {option: c.default for option, c in self.choices.items()} | dict(self.chosen)
        self._batch_size = int(str(options.pop("batch_size", self.batch_size)))
        self._options = options
        with seeded(0):
            made = self.make_model(**options)
        self._device = _checked_device(made, self.name)
        self._model = _own_modules(made)
        self._recurrent = any(isinstance(m, nn.RNNBase) for m in made.modules())
        carry_statistics(self._model)
        # On the device for this problem and for those it makes by `choose`.
        self.splits = {split: data.to(self._device) for split, data in self.splits.items()}
        _check_sizes(self.splits, self._batch_size, self.name)
        self._mutable = {n for n, _ in self._model.named_buffers()}

    def choose(self, **chosen: object) -> ModuleProblem:
        for option, value in chosen.items():
            if option not in self.choices:
                raise TypeError(unknown(f"{self.name} has no option", option, self.choices))
            self.choices[option].check(option, value)
        return replace(self, chosen={**self.chosen, **chosen})

    def start(self, seed: int) -> tuple[Tensors, Tensors]:
        with seeded(mix(seed, 0, 1), self._device):
            model = self.make_model(**self._options)
        params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        frozen = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
        return params, frozen | {n: b.detach() for n, b in model.named_buffers()}

    def batch(self, step: int, seed: int) -> tuple[Inputs, Tensor]:
        data = self.splits["train"]
        return data.batch(_draw(len(data), self._batch_size, step, seed), mix(seed, step, 4))

    def inner_loss(
        self, params: Tensors, buffers: Tensors, hypers: Tensors, batch: tuple[Inputs, Tensor]
    ) -> tuple[Tensor, Tensors]:
        inputs, target = batch
        # Copies, because a module may update its buffers in place; frozen weights stay put.
        carried = {n: b.clone() if n in self._mutable else b for n, b in buffers.items()}
        output, carried = self._forward(params, carried, inputs, training=True)
        extra = {"hypers": hypers, "params": params} if self.hypers else {}
        return _scalar(self.loss_fn, output, target, **extra), carried

    def outer_loss(self, params: Tensors, buffers: Tensors, hypers: Tensors) -> Tensor:
        output, target = self._evaluate(params, buffers, "valid")
        return _scalar(self.outer_loss_fn, output, target)

    def measure(self, params: Tensors, buffers: Tensors, split: Split) -> dict[str, float]:
        if split not in self.splits:
            raise ValueError(unknown(f"{self.name} has no split", split, self.splits))
        with torch.no_grad():
            output, target = self._evaluate(params, buffers, split)
            loss = {"loss": float(_scalar(self.outer_loss_fn, output, target))}
            return loss | {n: float(f(output, target)) for n, f in self.metrics.items()}

    def _evaluate(self, params: Tensors, buffers: Tensors, split: Split) -> tuple[Tensor, Tensor]:
        with seeded(0, self._device):
            inputs, target = self.splits[split].whole()
            output, _ = self._forward(params, dict(buffers), inputs, training=False)
        return output, target

    def _forward(
        self, params: Tensors, buffers: Tensors, inputs: object, *, training: bool
    ) -> tuple[Tensor, Tensors]:
        self._model.train(training)
        state = {**params, **buffers}
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        with _twice_differentiable(self._recurrent):
            # functional_call writes buffers that a module replaced back into this dict.
            output = functional_call(self._model, state, args)
        return output, {n: state[n] for n in buffers}


def problem_from_module(
    make_model: Callable[..., nn.Module],
    loss_fn: LossFn,
    train: object,
    valid: object,
    *,
    batch_size: int,
    test: object = None,
    hypers: Mapping[str, Hyper] = MappingProxyType({}),
    outer_loss_fn: LossFn | None = None,
    metrics: Mapping[str, LossFn] = MappingProxyType({}),
    choices: Mapping[str, Discrete] = MappingProxyType({}),
    name: str | None = None,
) -> ModuleProblem:
    """The problem of training the model that make_model returns, by mini-batches of train.

    train, valid, test: (inputs, targets) tensors whose first dimension is the example, or a
    map-style Dataset of such pairs. Only valid is seen by the tuner. make_model is called once per
    seed, under that seed, and may take the discrete choices as keywords ("batch_size" among them is
    taken by the problem itself). loss_fn(output, target) returns a scalar; if hypers declares the
    loss's own hyperparameters it is called with hypers= and params= as well, and outer_loss_fn
    (output, target) must say what the held-out loss is. A last, smaller batch is dropped;
    every epoch has a permutation of its own. BatchNorm statistics are differentiated; buffers that
    other modules update outside autograd are carried, not differentiated.
    """
    if hypers and outer_loss_fn is None:
        raise ValueError(
            "a loss with hyperparameters needs outer_loss_fn(output, target), the held-out loss: "
            "tuning them on a loss that contains them would only switch them off"
        )
    splits: dict[Split, Data] = {"train": as_data(train), "valid": as_data(valid)}
    if test is not None:
        splits["test"] = as_data(test)
    return ModuleProblem(
        name=name or str(getattr(make_model, "__name__", "module")),
        make_model=make_model,
        loss_fn=loss_fn,
        outer_loss_fn=outer_loss_fn or loss_fn,
        splits=splits,
        batch_size=batch_size,
        hypers=hypers,
        metrics=metrics,
        choices=choices,
    )


def _own_modules(model: nn.Module) -> nn.Module:
    """Copies of all modules around the same tensors: make_model may return one that it keeps."""
    held = [x for m in model.modules() for x in vars(m).values() if isinstance(x, Tensor)]
    return deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers(), *held)})


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


@contextmanager
def _twice_differentiable(recurrent: bool) -> Iterator[None]:
    """Only kernels whose backward has a derivative: the fused ones of attention have none.

    cuDNN's recurrent layers have none either, but its convolutions do.
    """
    # Not torch's sdpa_kernel, which takes as long as a small layer.
    before = [enabled() for enabled, _ in _FUSED]
    cudnn = torch.backends.cudnn.enabled
    for _, enable in _FUSED:
        enable(False)
    torch.backends.cudnn.enabled = cudnn and not recurrent
    try:
        yield
    finally:
        for (_, enable), state in zip(_FUSED, before, strict=True):
            enable(state)
        torch.backends.cudnn.enabled = cudnn


def _check_sizes(splits: Mapping[Split, Data], batch_size: int, name: str) -> None:
    for split, data in splits.items():
        if len(data) == 0:
            raise ValueError(f"{name}: the {split} data are empty; give at least one example")
    if not 1 <= batch_size <= len(splits["train"]):
        raise ValueError(
            f"{name}: batch_size={batch_size} is outside [1, {len(splits['train'])}], the number "
            "of training examples; choose a smaller batch"
        )


def _checked_device(model: nn.Module, name: str) -> torch.device:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: make_model returned {type(model).__name__}, not an nn.Module")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"{name}: the model has no parameters to train (requires_grad=True)")
    return trainable[0].device


def _draw(examples: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The example indices of a step: consecutive parts of the epoch's permutation."""
    epoch, part = divmod(step, examples // batch_size)
    return _permutation(examples, seed, epoch)[part * batch_size : (part + 1) * batch_size]


@lru_cache(maxsize=256)
def _permutation(examples: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(mix(seed, epoch, 3))
    return torch.randperm(examples, generator=generator)


__all__ = ["ModuleProblem", "Problem", "draws_of", "loss_at", "problem_from_module"]
