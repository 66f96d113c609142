"""Which optional libraries are installed, without importing them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from pathlib import Path


def installed_version(module: str, *distributions: str) -> str | None:
    """Version of an installed library, ``unknown`` where only the module is there, None where nothing is.

    ``distributions`` are the names under which it may have been installed, the module's own first.
    """
    if importlib.util.find_spec(module) is None:
        return None
    for name in (module, *distributions):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def platform_name() -> str:
    """Operating system and processor kind, e.g. ``linux-x86_64``."""
    return f"{sys.platform}-{platform.machine()}"


def compute_capability() -> tuple[int, int] | None:
    """Of the current CUDA device; None where PyTorch finds none."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA GPU's driver is loaded (a quick look that imports nothing)."""
    return any(Path(place).exists() for place in ("/proc/driver/nvidia/version", "/dev/dxg"))
