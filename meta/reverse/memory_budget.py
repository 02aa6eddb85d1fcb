"""Sizes of memory: what a user may say, what is free, what a state takes."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from pathlib import Path

import torch

from ..training.state import State

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
# What is taken unasked: this share of what is free, and on a CPU no more than this.
SHARE, _MOST = 4, 2 * 2**30
_HOST = torch.device("cpu")
_MEMINFO, _GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def bytes_of(memory: str | float) -> int:
    """A number of bytes from "2GiB", "500 MB" or a number."""
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", memory)
        size = float(match[1]) * _UNITS.get(match[2].lower(), math.nan) if match else math.nan
    else:
        size = float(memory)
    if size < 0:
        raise ValueError(f"memory={memory:g} is below 0 bytes; give a size such as '2GiB'")
    if not math.isfinite(size):
        raise ValueError(
            f"memory={memory!r} is not a size; give bytes or a number with one of "
            "B, KiB, MiB, GiB, KB, MB, GB, such as '2GiB'"
        )
    return int(size)


def comfortable(device: torch.device) -> int:
    """Bytes that a metagradient may take unasked."""
    if device.type == "cuda":
        return available(device) // SHARE
    return min(available() // SHARE, _MOST)


def available(device: torch.device = _HOST) -> int:
    """Bytes that can be taken on a device; on the host without swapping, in the machine or in the
    container it is.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch keeps for the next tensors is free too: a second call has as much as the first.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + held)
    free = _least_to_spare()
    with suppress(OSError, ValueError):  # No container, or one without a limit: "max".
        limit, used = ((_GROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        free = max(0, min(free, int(limit) - int(used)))
    return free


def _least_to_spare() -> int:
    with suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", _MEMINFO.read_text())
        if found:
            return int(found[1]) * 1024
    # Elsewhere: what the least of today's machines has to spare.
    return 4 * 2**30


def state_bytes(state: State) -> int:
    """What keeping a state takes, buffers included."""
    tensors = (state.p, *state.slots.values(), *state.buffers.values())
    return sum(x.nbytes for x in tensors)
