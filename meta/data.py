"""Data as random access by index, whatever it was given as."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

Split = Literal["train", "valid", "test"]
Inputs = Tensor | tuple[Tensor, ...]


class Data(Protocol):
    """Examples by index, as (inputs, target) with the example in the first dimension."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> Data: ...

    def batch(self, index: Tensor, seed: int) -> tuple[Inputs, Tensor]:
        """The examples at index; random draws on the way are a function of seed."""
        ...

    def whole(self) -> tuple[Inputs, Tensor]: ...


class TensorData:
    """Inputs and targets held as tensors on the model's device."""

    def __init__(self, inputs: Inputs, target: Tensor) -> None:
        self._inputs, self._target = inputs, target

    def __len__(self) -> int:
        return len(self._target)

    def to(self, device: torch.device) -> TensorData:
        return TensorData(_to(self._inputs, device), self._target.to(device))

    def batch(self, index: Tensor, seed: int) -> tuple[Inputs, Tensor]:
        index = index.to(self._target.device)
        if isinstance(self._inputs, Tensor):
            return self._inputs[index], self._target[index]
        return tuple(x[index] for x in self._inputs), self._target[index]

    def whole(self) -> tuple[Inputs, Tensor]:
        return self._inputs, self._target


class DatasetData:
    """A map-style dataset, collated as a DataLoader would."""

    def __init__(self, dataset: Any, device: torch.device | None = None) -> None:
        self._dataset, self._device = dataset, device
        self._whole: tuple[Inputs, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._dataset)

    def to(self, device: torch.device) -> DatasetData:
        return self if device == self._device else DatasetData(self._dataset, device)

    def batch(self, index: Tensor, seed: int) -> tuple[Inputs, Tensor]:
        # A dataset may augment with any of the three usual generators.
        with seeded(seed), _numpy_and_random_seeded(seed % 2**32):
            collated = default_collate([self._dataset[i] for i in index.tolist()])
        if not isinstance(collated, tuple | list) or len(collated) < 2:
            raise TypeError(
                f"{type(self._dataset).__name__} must yield (inputs, target) tuples; a batch of it "
                f"collates to {type(collated).__name__}"
            )
        *nested, target = collated
        inputs = tuple(self._flat(nested))
        (target,) = self._flat([target])
        return (inputs[0] if len(inputs) == 1 else inputs), target

    def _flat(self, nested: Iterable[object]) -> Iterator[Tensor]:
        """The tensors of nested tuples, in order and on the device."""
        for x in nested:
            if isinstance(x, tuple | list):
                yield from self._flat(x)
            elif isinstance(x, Tensor):
                yield x.to(self._device)
            else:
                raise TypeError(
                    f"{type(self._dataset).__name__} yields what collates to "
                    f"{type(x).__name__}; inputs and target must be tensors or numbers"
                )

    def whole(self) -> tuple[Inputs, Tensor]:
        # Held-out data are read after every training: collated once, then kept on the device.
        if self._whole is None:
            self._whole = self.batch(torch.arange(len(self)), seed=0)
        return self._whole


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
        f"data must be (inputs, targets) or a map-style Dataset, not {type(given).__name__}"
    )


def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers, by rounds of SplitMix64 (Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def _to(inputs: Inputs, device: torch.device) -> Inputs:
    return inputs.to(device) if isinstance(inputs, Tensor) else tuple(x.to(device) for x in inputs)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """torch's global generators seeded inside and as before outside."""
    # Not torch.manual_seed: it formats a stack trace for every device that is not there.
    generators = [torch.default_generator]
    if device is not None and device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    before = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


@contextmanager
def _numpy_and_random_seeded(seed: int) -> Iterator[None]:
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


__all__ = ["Data", "DatasetData", "Split", "TensorData", "as_data", "mix", "seeded"]
