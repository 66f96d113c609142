"""This machine: installed libraries, GPU, memory, and the user's own folders for compiled code."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from pathlib import Path

from s2p_deploy.errors import MissingEnvironmentError

_PRIVATE = 0o700
_OTHERS_WRITE = 0o022


def installed_version(module: str, *distributions: str) -> str | None:
    """Returns the version of a library without importing it; ``unknown`` without metadata, None where it is missing.

    ``distributions`` are the names under which it may have been installed, besides the module's own.
    """
    if importlib.util.find_spec(module) is None:
        return None
    versions = (distribution_version(name) for name in (module, *distributions))
    return next((version for version in versions if version is not None), "unknown")


def distribution_version(name: str) -> str | None:
    """Returns the version of an installed distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def platform_name() -> str:
    """Returns operating system and processor kind, e.g. ``linux-x86_64``."""
    return f"{sys.platform}-{platform.machine()}"


def processor_info() -> dict[str, str]:
    """Reads what Linux says of the first processor (``model name``, ``flags``, …); nothing elsewhere."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_flags() -> frozenset[str]:
    """Returns the CPU's instruction sets as Linux names them (``avx2``, ``avx512_vnni``); empty elsewhere."""
    return frozenset(processor_info().get("flags", "").split())


def int8_products_overflow() -> bool:
    """Tells whether the CPU libraries' INT8 kernels give wrong sums on this CPU.

    x86 CPUs without VNNI or AMX add pairs of 8-bit products in 16 bits, which overflow where weights use all of INT8:
    a small W8A8 network then agreed with its reference to 17 dB instead of 62. Quantized layers are computed in
    floating point there, on the same grids.
    """
    flags = cpu_flags()
    return bool(flags) and not flags & {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"}


def gpu_index(device: str = "auto") -> int:
    """Returns the index of the GPU that a context's device stands for: ``cuda:1`` is 1, all others PyTorch's current.

    Without a GPU that PyTorch sees it is 0. An engine for a GPU runs on one, even where the networks around it are on
    the CPU.

    Raises:
        MissingEnvironmentError: PyTorch sees GPUs, but not that one.
    """
    import torch

    _, _, index = device.partition("cuda:")
    if not torch.cuda.is_available():
        return int(index or 0)
    count = torch.cuda.device_count()
    if index and int(index) >= count:
        raise MissingEnvironmentError(f"device {device}: PyTorch sees {count} CUDA devices here, from cuda:0 on")
    return int(index) if index else int(torch.cuda.current_device())


def compute_capability(device: str = "auto") -> tuple[int, int] | None:
    """Returns that of the GPU that a context's device stands for; None where PyTorch finds none."""
    import torch

    return torch.cuda.get_device_capability(gpu_index(device)) if torch.cuda.is_available() else None


def free_gpu_memory(device: str = "auto") -> int | None:
    """Returns the bytes that are free on the GPU that a context's device stands for; None where PyTorch finds none."""
    import torch

    return int(torch.cuda.mem_get_info(gpu_index(device))[0]) if torch.cuda.is_available() else None


def use_gpu(device: str) -> None:
    """Makes the GPU of a context's device PyTorch's current one in this process: for a child process of its own.

    Native builders and ONNX Runtime take the current one. Nothing changes for a device without an index, and where
    PyTorch sees no GPU: what needs one says so itself.
    """
    if device.startswith("cuda:"):
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(gpu_index(device))


def has_nvidia_driver() -> bool:
    """Tells whether an NVIDIA GPU's driver is loaded (a quick look that imports nothing)."""
    return any(Path(place).exists() for place in ("/proc/driver/nvidia/version", "/dev/dxg"))


def peak_rss() -> int:
    """Returns the largest resident size of this process in bytes (0 where not on Linux).

    getrusage would count the parent's too, from before exec.
    """
    return _kilobytes(Path("/proc/self/status"), "VmHWM:") or 0


def private_folder(name: str) -> Path:
    """Makes ``$XDG_CACHE_HOME/s2p_deploy/<name>`` (``~/.cache`` where that is not set) with mode 0700.

    What libraries compile is kept there, loaded and run again, so nobody else may write to it.

    Raises:
        MissingEnvironmentError: it belongs to another user, others may write to it, or it cannot be made.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    # a relative path is to be ignored, says the XDG specification
    base = Path(given) if Path(given).is_absolute() else Path.home() / ".cache"
    folder = base / "s2p_deploy" / name
    try:
        folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise MissingEnvironmentError(f"the cache folder {folder} cannot be made ({error.strerror})") from error
    if status.st_uid != os.geteuid() or status.st_mode & _OTHERS_WRITE:
        raise MissingEnvironmentError(
            f"{folder} is not this user's alone, and compiled code would be loaded from it: chmod 700 it, or set "
            "XDG_CACHE_HOME to another place"
        )
    return folder


def plain_name(*words: str) -> str:
    """Joins words to a file name: every character but letters, digits, ``.``, ``_`` and ``-`` becomes ``_``."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", "-".join(words))


def _kilobytes(file: Path, field: str) -> int | None:
    if not file.is_file():
        return None
    lines = file.read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)
