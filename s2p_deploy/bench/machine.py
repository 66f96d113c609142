"""The machine that a measurement was made on, without its name or any path."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from s2p_deploy.bench.result import Machine

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_LIBRARIES = ("torch", "diffusers", "onnxruntime", "openvino", "tensorrt-rtx", "tensorrt", "numpy")


def this_machine() -> Machine:
    """Processor, cores that this process may use, flags that matter for speed, and versions."""
    info = _processor_info()
    flags = info.get("flags", "").split()
    libraries = {name: found for name in _LIBRARIES if (found := _version(name)) is not None}
    return Machine(
        processor=info.get("model name") or platform.machine(),
        cores=_usable_cores(),
        flags=tuple(flag for flag in _FLAGS if flag in flags),
        system=f"{platform.system()} {platform.machine()}",
        gpu=_gpu(),
        versions={"python": platform.python_version()} | libraries,
    )


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor_info() -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
