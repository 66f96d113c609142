"""Before a build starts: what it will take, and whether this machine has the least of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from s2p_deploy.errors import InputError, MissingEnvironmentError
from s2p_deploy.records.disk_room import free_bytes

if TYPE_CHECKING:
    from s2p_deploy.records import ExportedGraph

BASE_MEMORY = 120 * 10**6  # interpreter and libraries, before any weight
MEMORY_PER_WEIGHT_BYTE = 1.5  # least seen: the backend's copy, and the file pages that go into it
DISK_PER_WEIGHT_BYTE = 2.0  # the prepared graph and the engine, side by side until the end


@dataclass(frozen=True)
class Cost:
    """What a backend's builds took: memory and seconds to begin with, and per byte and GB of the graph's weights."""

    memory: int
    memory_per_byte: float
    seconds: float
    seconds_per_gb: float


_MB = 10**6
# Measured on the bundled model (4 to 17 MB of weights), quantized and not: OpenVINO 316 and 259 MB, ONNX Runtime 216
# and 167, TensorRT-RTX 779 and 686; 0.5 to 7 s. Per byte, on chains of convolutions of 89 and 354 MB: OpenVINO 2.2 to
# 2.8, ONNX Runtime 2.1; for TensorRT-RTX on SD v1-4 in fp16 (1.74 GB of weights: 5.8 GB, 17 s) and in W8A8 (0.86 GB:
# 3.6 GB, 54 s). TensorRT builds on a GPU and times kernels there; it is taken to be like TensorRT-RTX, not measured.
_RTX_FLOATING = Cost(660 * _MB, 2.8, 5.0, 4.0)
_RTX_QUANTIZED = Cost(770 * _MB, 3.1, 7.0, 46.0)
_FLOATING = {
    "onnxruntime": Cost(130 * _MB, 2.1, 1.0, 5.0),
    "openvino": Cost(220 * _MB, 2.2, 2.0, 5.0),
    "tensorrt_rtx": _RTX_FLOATING,
    "tensorrt": _RTX_FLOATING,
}
_QUANTIZED = {
    "onnxruntime": Cost(200 * _MB, 2.1, 1.0, 5.0),
    "openvino": Cost(300 * _MB, 2.8, 2.0, 5.0),
    "tensorrt_rtx": _RTX_QUANTIZED,
    "tensorrt": _RTX_QUANTIZED,
}


@dataclass(frozen=True)
class Estimate:
    """What a build takes: the least memory and disk without which it cannot work, and the likely peak and time.

    Bytes, and seconds. Other processors and other graphs take up to a few times as long.
    """

    memory: int
    disk: int
    likely_memory: int
    likely_seconds: float

    def __str__(self) -> str:
        return (
            f"about {self.likely_memory / 1e9:.2g} GB of memory (at least {self.memory / 1e9:.2g}),"
            f" {self.disk / 1e9:.2g} GB of disk, {_duration(self.likely_seconds)}"
        )


def estimate(graph: ExportedGraph, backend: str) -> Estimate:
    """What building ``graph`` takes, from the size of its weights and from what other builds took."""
    weights = sum(path.stat().st_size for path in graph.folder.glob("denoiser.onnx*"))
    cost = (_FLOATING if all(site.weight is None for site in graph.sites) else _QUANTIZED)[backend]
    least = BASE_MEMORY + int(MEMORY_PER_WEIGHT_BYTE * weights)
    return Estimate(
        memory=least,
        disk=int(DISK_PER_WEIGHT_BYTE * weights),
        likely_memory=max(least, cost.memory + int(cost.memory_per_byte * weights)),
        likely_seconds=round(cost.seconds + cost.seconds_per_gb * weights / 1e9, 1),
    )


def check_resources(needed: Estimate, folder: Path, memory_limit: int | None) -> None:
    """Refuses a build that cannot work here.

    Raises:
        InputError: ``memory_limit`` is below the least that is needed.
        MissingEnvironmentError: the machine has too little memory or disk available.
    """
    if memory_limit is not None and memory_limit < needed.memory:
        raise InputError(
            f"a memory limit of {_size(memory_limit)} is too small: this build needs at least {_size(needed.memory)}"
        )
    memory = available_memory()
    if memory is not None and memory < needed.memory:
        raise MissingEnvironmentError(
            f"the build needs at least {_size(needed.memory)} of memory, {_size(memory)} are available"
        )
    disk = free_bytes(folder)
    if disk < needed.disk:
        raise MissingEnvironmentError(
            f"the build needs {_size(needed.disk)} of disk at {folder}, {_size(disk)} are free"
        )


def available_memory() -> int | None:
    """Bytes that could be allocated without swapping, as Linux estimates it (None elsewhere)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    lines = meminfo.read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
