"""Data as random access by index, whatever it was given as."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from .seeding import fold_in, fork_all_rngs

Split = Literal["train", "valid", "test"]
Inputs = Tensor | tuple[Tensor, ...]
Batch = tuple[Inputs, Tensor]


class HeldOut(Protocol):
    """Data that can be read at once, as (inputs, target) with the example in the first dimension.

    May give the same tensors again and again.
    """

    def to(self, device: torch.device) -> HeldOut: ...

    def whole(self) -> Batch: ...


class Data(HeldOut, Protocol):
    """Data that can be read by the index of an example, too."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> Data: ...

    def batch(self, index: Tensor, seed: int) -> Batch:
        """The examples at index; random draws on the way are a function of seed."""
        ...


class TensorData:
    """Inputs and targets held as tensors on the model's device."""

    def __init__(self, inputs: Inputs, target: Tensor) -> None:
        self._inputs, self._target = inputs, target

    def __len__(self) -> int:
        return len(self._target)

    def to(self, device: torch.device) -> TensorData:
        return TensorData(*to_device((self._inputs, self._target), device))

    def batch(self, index: Tensor, seed: int) -> Batch:
        index = _sent(index, self._target.device)
        if isinstance(self._inputs, Tensor):
            return self._inputs[index], self._target[index]
        return tuple(x[index] for x in self._inputs), self._target[index]

    def whole(self) -> Batch:
        return self._inputs, self._target


class DatasetData:
    """A map-style dataset, collated as a DataLoader would."""

    def __init__(self, dataset: Any, device: torch.device | None = None) -> None:
        self._dataset, self._device = dataset, device
        self._whole: Batch | None = None

    def __len__(self) -> int:
        return len(self._dataset)

    def to(self, device: torch.device) -> DatasetData:
        return self if device == self._device else DatasetData(self._dataset, device)

    def batch(self, index: Tensor, seed: int) -> Batch:
        return to_device_async(self._collated(index, seed), self._device)

    def whole(self) -> Batch:
        # Held-out data are read after every training: collated once, then kept on the device.
        if self._whole is None:
            self._whole = to_device(self._collated(torch.arange(len(self)), 0), self._device)
        return self._whole

    def _collated(self, index: Tensor, seed: int) -> Batch:
        with fork_all_rngs(seed):
            collated = default_collate([self._dataset[i] for i in index.tolist()])
        name = type(self._dataset).__name__
        if not is_pair(collated):
            raise TypeError(
                f"{name} must yield (inputs, target) tuples; a batch of it collates to "
                f"{type(collated).__name__}"
            )
        return as_pair(collated, f"{name} yields what collates to")


def as_data(given: object) -> Data:
    """Data from a pair of tensors (or arrays) or from a map-style dataset."""
    if isinstance(given, tuple | list) and len(given) == 2:
        inputs, target = given
        tensors = (
            tuple(map(torch.as_tensor, inputs))
            if isinstance(inputs, tuple | list)
            else torch.as_tensor(inputs)
        )
        target = torch.as_tensor(target)
        lengths = [len(x) for x in (tensors if isinstance(tensors, tuple) else (tensors,))]
        if any(length != len(target) for length in lengths):
            raise ValueError(f"inputs hold {lengths} examples but there are {len(target)} targets")
        return TensorData(tensors, target)
    if hasattr(given, "__getitem__") and hasattr(given, "__len__"):
        return DatasetData(given)
    raise TypeError(
        "data must be (inputs, targets), a map-style Dataset or an iterable of batches, not "
        f"{type(given).__name__}"
    )


def is_pair(batch: object) -> bool:
    return isinstance(batch, tuple | list) and len(batch) >= 2


def as_pair(batch: Any, whose: str) -> Batch:
    """(inputs, target) of a batch, nested inputs in a row. whose: how an error begins."""
    *nested, target = batch
    inputs = tuple(_flat(nested, whose))
    (target,) = _flat([target], whose)
    return (inputs[0] if len(inputs) == 1 else inputs), target


def _flat(nested: Iterable[object], whose: str) -> Iterator[Tensor]:
    """The tensors of nested tuples, in order."""
    for x in nested:
        if isinstance(x, tuple | list):
            yield from _flat(x, whose)
        elif isinstance(x, Tensor | np.ndarray):
            yield torch.as_tensor(x)
        else:
            raise TypeError(
                f"{whose} {type(x).__name__}; inputs and target must be tensors or numbers"
            )


def to_device_async(batch: Batch, device: torch.device | None) -> Batch:
    """A batch on a device, on CUDA behind what is queued there and without waiting for it."""
    return each_tensor(batch, lambda x: _sent(x, device))


def _sent(x: Tensor, device: torch.device | None) -> Tensor:
    if device is not None and device.type == "cuda" and x.device.type == "cpu":
        # Only a copy from pinned memory is queued, so that the next batch is made and sent while
        # the GPU is still at this step. The allocator keeps the memory until it is done.
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def to_device(batch: Batch, device: torch.device | None) -> Batch:
    # Not pinned: it may be all there is, and pinned memory is never given back.
    return each_tensor(batch, lambda x: x.to(device))


def each_tensor(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """A batch with all its tensors changed."""
    inputs, target = batch
    if isinstance(inputs, Tensor):
        return change(inputs), change(target)
    return tuple(change(x) for x in inputs), change(target)


def example_indices(examples: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The example indices of a step: consecutive parts of the epoch's permutation."""
    epoch, part = divmod(step, examples // batch_size)
    return _permutation(examples, seed, epoch)[part * batch_size : (part + 1) * batch_size]


@lru_cache(maxsize=256)
def _permutation(examples: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(fold_in(seed, epoch, 3))
    return torch.randperm(examples, generator=generator)


__all__ = [
    "Batch",
    "Data",
    "DatasetData",
    "HeldOut",
    "Inputs",
    "Split",
    "TensorData",
    "as_data",
    "as_pair",
    "each_tensor",
    "example_indices",
    "is_pair",
    "to_device",
    "to_device_async",
]
