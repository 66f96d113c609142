"""Room on a disk, looked at before anything is written there."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def free_bytes(folder: Path) -> int:
    """Bytes left on the disk of ``folder``, which need not exist yet."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def check_room(folder: Path, size: int, remedy: str = "make room, or choose another --out") -> None:
    """Raises InputError where the disk of ``folder``, which need not exist yet, has less than ``size`` bytes left."""
    free = free_bytes(folder)
    if free < size:
        raise InputError(f"{folder} needs {size / 1e9:.3g} GB and its disk has {free / 1e9:.3g} GB left: {remedy}")


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """While ``file`` is written.

    Raises:
        InputError: it cannot be, such as on a full disk (of which numpy says how much it wrote, and no error number).
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{file} cannot be written ({error.strerror or error}): make room, or choose another --out"
        ) from error
