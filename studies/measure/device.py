"""Where a benchmark runs, by torch's own names of devices."""

from __future__ import annotations

import torch

CPU = torch.device("cpu")


def find_device(name: str) -> torch.device:
    """The device called "cpu", "cuda" or "cuda:1"; ValueError if it cannot be used here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # The latter where torch is built without CUDA.
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device={name!r} cannot be used here: {reason}") from error


def synchronize(device: torch.device) -> None:
    """Wait for what is queued on a device: until then a clock says nothing of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gpu_name(device: torch.device) -> str:
    """What its maker calls a GPU; empty for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


__all__ = ["CPU", "find_device", "gpu_name", "synchronize"]
