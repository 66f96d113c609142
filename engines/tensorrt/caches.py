"""What TensorRT may keep between processes: timings of a GPU's kernels, and TensorRT-RTX's compiled kernels.

TensorRT builds faster with the first; for TensorRT-RTX it is an empty file. The second spares the first run of an RTX
engine most of its compilation. Both lie in the user's private cache folder.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from filelock import FileLock

from s2p_deploy.engines.user_cache import plain_name, private_folder

if TYPE_CHECKING:
    from pathlib import Path

LARGEST_RUNTIME_CACHE = 100 * 2**20  # bytes; larger ones load slowly, says NVIDIA


def timing_cache(version: str, device: str, capability: tuple[int, int]) -> Path:
    """The file of timings of one TensorRT version on one kind of GPU. It need not exist."""
    return private_folder("tensorrt") / (plain_name("timings", version, device, _sm(capability)) + ".cache")


def runtime_cache(version: str, capability: tuple[int, int], plan_digest: str) -> Path:
    """The file of compiled kernels of one plan (SHA-256 of its bytes) for one TensorRT-RTX and GPU generation."""
    return private_folder("tensorrt_rtx") / (plain_name("kernels", version, _sm(capability), plan_digest) + ".bin")


def read_locked(path: Path) -> bytes | None:
    """The bytes of a cache file while nobody writes it; None where there is none or it is too large."""
    with FileLock(f"{path}.lock"):
        if not path.is_file() or path.stat().st_size > LARGEST_RUNTIME_CACHE:
            return None
        return path.read_bytes()


def write_locked(path: Path, data: bytes) -> bool:
    """Writes a cache file in one piece while nobody reads it; False, and nothing written, where it is too large."""
    if len(data) > LARGEST_RUNTIME_CACHE:
        return False
    with FileLock(f"{path}.lock"):
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(data)
        temporary.replace(path)
    return True


def _sm(capability: tuple[int, int]) -> str:
    return f"sm{capability[0]}{capability[1]}"
