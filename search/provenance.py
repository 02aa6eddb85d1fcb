"""Where a number comes from: versions, machine and time."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("hyperdescent", "torch", "numpy", "optuna", "ray", "scikit-learn")

Provenance = dict[str, str | int | None]


def provenance() -> Provenance:
    """Of a number made now in this process; null where a package is not installed."""
    return {
        **_unchanging(),
        "threads": torch.get_num_threads(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@lru_cache(maxsize=1)
def _unchanging() -> Provenance:
    return {
        **{package: _version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpus": _gpus(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", listing.read_text()) if listing.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _memory_gib() -> int | None:
    """Of the machine, whatever part of it a container may use."""
    if not {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(getattr(os, "sysconf_names", ())):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)


def _gpus() -> str | None:
    """The names of those this process may use; asking for a name starts CUDA, so only if any."""
    if not torch.cuda.is_available():
        return None
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


__all__ = ["PACKAGES", "Provenance", "provenance"]
