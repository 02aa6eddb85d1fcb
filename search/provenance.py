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


__all__ = ["PACKAGES", "Provenance", "provenance"]
