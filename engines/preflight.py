"""Before a build starts: what it will need at least, and whether this machine has it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from s2p_deploy.errors import InputError, MissingEnvironmentError

if TYPE_CHECKING:
    from s2p_deploy.records import ExportedGraph

BASE_MEMORY = 300 * 2**20  # interpreter and libraries, before any weight
MEMORY_PER_WEIGHT_BYTE = 1.5  # least seen: the backend's copy, and the file pages that go into it
DISK_PER_WEIGHT_BYTE = 2.0  # the prepared graph and the engine, side by side until the end


@dataclass(frozen=True)
class Estimate:
    """The least that a build needs, in bytes.

    A build may take several times as much memory (3.4 times its weights for an SD v1-4 in fp16 on TensorRT-RTX), so
    this refuses only what cannot work.
    """

    memory: int
    disk: int


def estimate(graph: ExportedGraph) -> Estimate:
    """The least memory and disk to build from ``graph``, from the size of its weights."""
    weights = sum(path.stat().st_size for path in graph.folder.glob("denoiser.onnx*"))
    return Estimate(BASE_MEMORY + int(MEMORY_PER_WEIGHT_BYTE * weights), int(DISK_PER_WEIGHT_BYTE * weights))


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
    disk = shutil.disk_usage(_existing(folder)).free
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


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.resolve().parents) if place.exists())


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
