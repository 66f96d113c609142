"""Unfinished work belongs to one process at a time."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Holds ``path``, which need not exist, against all other processes: with a lock on ``.<name>.lock`` beside it.

    The lock goes with its process, however that ends; the file is removed where the context is left.

    Raises:
        InputError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_file(path))
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise InputError(f"another process is at work on {path}: let it finish, or choose another --out") from error
    try:
        yield
    finally:
        lock_file(path).unlink(missing_ok=True)  # while it is held: who waits for this file finds it gone, and refuses
        lock.release()


def is_claimed(path: Path) -> bool:
    """Whether some process holds ``path``."""
    if not lock_file(path).exists():
        return False
    try:
        with FileLock(lock_file(path), blocking=False):
            return False
    except Timeout:
        return True


def lock_file(path: Path) -> Path:
    """The file whose lock holds ``path``."""
    return path.with_name(f".{path.name}.lock")
