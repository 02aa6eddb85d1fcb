"""What memory a call takes in this process, on the host or on a GPU."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import sys
from pathlib import Path

import torch

# M_MMAP_THRESHOLD of malloc.h.
_MMAP_THRESHOLD = -3
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """The growth of this process's peak memory since the meter was made.

    Exact on Linux, where the recorded peak can be cleared. Elsewhere a growth that stays below an
    earlier peak reads as growth up to that peak.
    """

    def __init__(self) -> None:
        give_back()  # What the allocator kept of earlier calls would hide what this one takes.
        self.exact = _clear_peak()
        self._rest = _resident()

    @property
    def mib(self) -> float:
        """So far; the peak stays, whatever is freed."""
        return max(0.0, _peak() - self._rest)


class DeviceMeter:
    """The growth of the peak of what torch has allocated on a GPU since the meter was made.

    The GPU's own count would be larger by the context, and by what torch keeps for later.
    """

    exact = True

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self._device = device
        torch.cuda.reset_peak_memory_stats(device)
        self._rest = torch.cuda.memory_allocated(device)

    @property
    def mib(self) -> float:
        """So far; the peak stays, whatever is freed."""
        return (torch.cuda.max_memory_allocated(self._device) - self._rest) / 2**20


def meter_of(device: torch.device) -> Meter | DeviceMeter:
    """A meter of the memory that trainings on a device take."""
    return DeviceMeter(device) if device.type == "cuda" else Meter()


def give_back() -> None:
    """Return freed memory that allocators keep to the system; on the host only glibc's can."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def return_freed_blocks() -> None:
    """Let large blocks go back to the system as they are freed, which glibc stops doing when the
    first one is: its threshold for that then grows up to 32 MiB (mallopt(3)). Peaks are then of
    what was in use, at the price of fresh pages.
    """
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):
        set_option(_MMAP_THRESHOLD, 128 * 2**10)


def _clear_peak() -> bool:
    """Forget the peak so far (proc_pid_clear_refs(5), value 5); False where that cannot be."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return _in_status("VmHWM") is not None


def _peak() -> float:
    known = _in_status("VmHWM")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return known or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _resident() -> float:
    return _in_status("VmRSS") or _peak()


def _in_status(field: str) -> float | None:
    """A line of /proc/self/status, in MiB."""
    found = re.search(rf"{field}:\s*(\d+)", _STATUS.read_text()) if _STATUS.exists() else None
    return int(found[1]) / 2**10 if found else None


__all__ = ["DeviceMeter", "Meter", "give_back", "meter_of", "return_freed_blocks"]
