"""Where the states that are kept for the way back live: where they are, in host memory, on disk."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ...inner.core.messages import unknown
from ..training.state import State
from .memory_budget import SHARE, comfortable

S = TypeVar("S")


class Store(Protocol[S]):
    """What is got is what was put, bit for bit, until it is dropped."""

    def put(self, state: S) -> int:
        """The handle by which to get and to drop it."""
        ...

    def get(self, handle: int) -> S: ...

    def drop(self, handle: int) -> None: ...


def find_store(spec: str | Path) -> Store[State]:
    """ "device": the tensors as they are; "cpu": copies in host memory; "disk": files in the
    system's temporary directory; a Path: files in that directory.
    """
    if isinstance(spec, Path):
        if not spec.is_dir():
            raise ValueError(f"store={str(spec)!r} is not a directory; make it, or name another")
        return OnHost(OnDisk(spec))
    if spec == "device":
        return OnDevice()
    if spec == "cpu":
        return OnHost(OnDevice())
    if spec == "disk":
        return OnHost(OnDisk())
    message = unknown("there is no store", str(spec), ("device", "cpu", "disk"))
    raise ValueError(f"store={spec!r}: {message}; a directory is given as a pathlib.Path")


def room_in(spec: str | Path, device: torch.device) -> int:
    """Bytes that may be taken unasked where a store keeps states; device: of the training."""
    if isinstance(spec, str) and spec != "disk":
        return comfortable(device if spec == "device" else torch.device("cpu"))
    free = shutil.disk_usage(tempfile.gettempdir() if spec == "disk" else spec).free
    return free // SHARE


class OnDevice(Generic[S]):
    """The objects themselves. Nothing is copied, because nothing changes a state."""

    def __init__(self) -> None:
        self._kept: dict[int, S] = {}
        self._handles = count()

    def put(self, state: S) -> int:
        handle = next(self._handles)
        self._kept[handle] = state
        return handle

    def get(self, handle: int) -> S:
        return self._kept[handle]

    def drop(self, handle: int) -> None:
        del self._kept[handle]


class OnDisk:
    """Lists of tensors, each in a file. They share a new directory inside `parent`, which is there
    while something is kept and goes with the last of it, with the store or with the process.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self._parent = parent
        self._paths: dict[int, Path] = {}
        self._handles = count()

    def put(self, state: list[Tensor]) -> int:
        if not self._paths:
            self._directory = tempfile.mkdtemp(prefix="hyperdescent-", dir=self._parent)
            # Also after an exception, and without TemporaryDirectory's warning.
            self._remove = weakref.finalize(self, shutil.rmtree, self._directory, True)
        handle = next(self._handles)
        self._paths[handle] = Path(self._directory, f"{handle}.pt")
        torch.save(state, self._paths[handle])
        return handle

    def get(self, handle: int) -> list[Tensor]:
        tensors: list[Tensor] = torch.load(self._paths[handle], weights_only=True)
        return tensors

    def drop(self, handle: int) -> None:
        self._paths.pop(handle).unlink()
        if not self._paths:
            self._remove()


@dataclass(frozen=True)
class _Form:
    """A state without what was sent away: of every tensor itself or the device it was on."""

    slots: list[str]
    buffers: list[str]
    parts: list[Tensor | torch.device]


class OnHost:
    """Copies in host memory, kept by another store; they come back on the devices they were on.

    The tensors of the first state stay where they are, in that state and, the same objects, in
    all others that hold them: what training never replaces is neither copied nor written.
    """

    def __init__(self, shelf: Store[list[Tensor]]) -> None:
        self._shelf = shelf
        self._forms: dict[int, _Form] = {}
        self._first: list[Tensor] = []

    def put(self, state: State) -> int:
        tensors = [state.p, *state.slots.values(), *state.buffers.values()]
        if not self._forms:
            self._first = tensors
        still = {id(x) for x in self._first}
        handle = self._shelf.put([_on_host(x) for x in tensors if id(x) not in still])
        parts = [x if id(x) in still else x.device for x in tensors]
        self._forms[handle] = _Form([*state.slots], [*state.buffers], parts)
        return handle

    def get(self, handle: int) -> State:
        form, copies = self._forms[handle], iter(self._shelf.get(handle))
        parts = iter([x if isinstance(x, Tensor) else _back(next(copies), x) for x in form.parts])
        p = next(parts)
        slots = {name: next(parts) for name in form.slots}
        return State(p, slots, {name: next(parts) for name in form.buffers})

    def drop(self, handle: int) -> None:
        self._shelf.drop(handle)
        del self._forms[handle]
        if not self._forms:
            self._first = []


def _on_host(x: Tensor) -> Tensor:
    # Pinned memory is what a GPU copies from and to at full speed, and without waiting.
    copy = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda, requires_grad=False)
    return copy.copy_(x.detach())


def _back(copy: Tensor, device: torch.device) -> Tensor:
    return copy.to(device, non_blocking=device.type == "cuda")


__all__ = ["OnDevice", "OnDisk", "OnHost", "Store", "find_store"]
