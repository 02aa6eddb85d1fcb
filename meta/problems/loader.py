"""Data that come as batches, in an order of their own: a DataLoader or any iterable of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from numbers import Integral
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from .data import (
    Batch,
    Data,
    HeldOut,
    Split,
    as_data,
    as_pair,
    each_tensor,
    is_pair,
    to_device,
    to_device_async,
)
from .seeding import fold_in, fork_all_rngs, preserve_rng

_END = object()


def as_train(given: object) -> Data | Stream:
    return Stream(BatchLog(given)) if _is_stream(given) else as_data(given)


def as_held_out(given: object) -> HeldOut:
    return Collated(given) if _is_stream(given) else as_data(given)


def _is_stream(given: object) -> TypeGuard[Iterable[object]]:
    """Whether given yields batches, rather than holding examples by index."""
    if isinstance(given, IterableDataset):  # It has a __getitem__, which raises.
        return True
    indexed = hasattr(given, "__getitem__") and hasattr(given, "__len__")
    return hasattr(given, "__iter__") and not indexed


class Stream:
    """Batches recorded as they first come, so that step i reads the same one on every replay.

    An iterable that ends is iterated again. What it draws from the global generators of torch,
    numpy and Python, or from a generator that its DataLoader was given, is a function of the place
    in the stream: whoever records it anew gets the same batches.
    """

    def __init__(self, record: BatchLog, device: torch.device | None = None) -> None:
        self._record, self._device = record, device

    def to(self, device: torch.device) -> Stream:
        """The same stream, and the same record of it, read on another device."""
        return Stream(self._record, device)

    def __str__(self) -> str:
        return self._record.name

    def at(self, step: int) -> Batch:
        if self._device is None or self._device.type == "cpu":
            # A model may write into its inputs: what is recorded must not be what it gets.
            return _copied(self._record.at(step))
        return to_device_async(self._record.at(step, pin=self._device.type == "cuda"), self._device)


class BatchLog:
    """The batches that an iterable has given so far, in the host's memory."""

    def __init__(self, iterable: Iterable[object]) -> None:
        self._iterable = iterable
        self._batches: list[Batch] = []
        self._running: Iterator[object] | None = None

    @property
    def name(self) -> str:
        return type(self._iterable).__name__

    def __getstate__(self) -> dict[str, Any]:
        # What is under way cannot be pickled; a copy records the same batches from the start.
        return self.__dict__ | {"_batches": [], "_running": None}

    def at(self, step: int, *, pin: bool = False) -> Batch:
        while len(self._batches) <= step:
            with _drawing(self._iterable, len(self._batches)):
                batch = self._next()
            self._batches.append(_copied(_as_batch(batch, self._iterable), pin=pin))
        return self._batches[step]

    def _next(self) -> object:
        for _ in range(2):
            if self._running is None:
                self._running = iter(self._iterable)
            batch = next(self._running, _END)
            if batch is not _END:
                return batch
            if self._running is self._iterable:
                break
            self._running = None
        done = len(self._batches)
        if not done:
            raise ValueError(f"the {self.name} of batches is empty; give at least one batch")
        raise ValueError(
            f"the {self.name} of batches ran out after {done} and cannot be iterated again; give "
            "what can, such as a DataLoader, or what has a batch for every step"
        )


class Collated:
    """All batches of an iterable in one; it is read when first asked for, and must have an end."""

    def __init__(self, iterable: Iterable[object], device: torch.device | None = None) -> None:
        self._iterable, self._device = iterable, device
        self._whole: Batch | None = None

    def to(self, device: torch.device) -> Collated:
        return self if device == self._device else Collated(self._iterable, device)

    def whole(self) -> Batch:
        if self._whole is None:
            with _drawing(self._iterable, 0):
                batches = [_as_batch(batch, self._iterable) for batch in self._iterable]
            if not batches:
                name = type(self._iterable).__name__
                raise ValueError(f"the {name} of held-out batches is empty; give at least one")
            self._whole = to_device(_joined(batches), self._device)
        return self._whole


def _as_batch(batch: object, iterable: Iterable[object]) -> Batch:
    name = type(iterable).__name__
    if not is_pair(batch):
        raise TypeError(
            f"{name} must yield (inputs, target) batches; it yielded {type(batch).__name__}"
        )
    return as_pair(batch, f"{name} yields batches that hold")


def _joined(batches: list[Batch]) -> Batch:
    target = torch.cat([target for _, target in batches])
    columns = [(x,) if isinstance(x, Tensor) else x for x, _ in batches]
    inputs = tuple(torch.cat(column) for column in zip(*columns, strict=True))
    return (inputs[0] if len(inputs) == 1 else inputs), target


def _copied(batch: Batch, *, pin: bool = False) -> Batch:
    """A batch of the host's own: an iterable may fill the same tensors again and again."""

    def copied(x: Tensor) -> Tensor:
        return torch.empty_like(x, device="cpu", pin_memory=pin).copy_(x.detach())

    return each_tensor(batch, copied)


@contextmanager
def _drawing(iterable: object, place: int) -> Iterator[None]:
    """What is drawn inside is a function of the place and of the seed that a loader was given."""
    owners = (iterable, getattr(iterable, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    own = dict.fromkeys(x for x in found if isinstance(x, torch.Generator))
    with fork_all_rngs(fold_in(0, place, 5)), preserve_rng(own):
        for generator in own:
            generator.manual_seed(fold_in(generator.initial_seed(), place, 5))
        yield


def check_filled(splits: Mapping[Split, HeldOut], name: str) -> None:
    for split, data in splits.items():
        if isinstance(data, Sized) and len(data) == 0:
            raise ValueError(f"{name}: the {split} data are empty; give at least one example")


def checked_batch_size(given: object, accumulate: int, train: Data | Stream, name: str) -> int:
    """How many examples a step reads, 0 where a stream decides; ValueError if it cannot."""
    if not isinstance(accumulate, Integral) or accumulate < 1:
        raise ValueError(f"{name}: accumulate={accumulate!r} parts of a batch; give 1 or more")
    if isinstance(train, Stream):
        if given is not None:
            raise ValueError(
                f"{name}: batch_size={given} is given, but batches are as the {train} makes them; "
                "leave it out, or train on a map-style Dataset or tensors"
            )
        return 0
    if given is None:
        raise ValueError(
            f"{name}: batch_size is missing; say how many of the {len(train)} training examples a "
            "step reads, or train on an iterable of batches, such as a DataLoader"
        )
    batch_size = int(str(given))
    if not 1 <= batch_size <= len(train):
        raise ValueError(
            f"{name}: batch_size={batch_size} is outside [1, {len(train)}], the number of "
            "training examples; choose a smaller batch"
        )
    if batch_size % accumulate:
        raise ValueError(
            f"{name}: batch_size={batch_size} cannot be divided into accumulate={accumulate} "
            "equal parts; make it a multiple"
        )
    return batch_size


__all__ = ["Stream", "as_held_out", "as_train", "check_filled", "checked_batch_size"]
