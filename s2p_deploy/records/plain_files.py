"""An artifact's files, opened with care: no link is followed, nothing but a regular file is read."""

from __future__ import annotations

import os
import stat
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from s2p_deploy.errors import IntegrityError

if TYPE_CHECKING:
    from io import BufferedReader
    from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe must not block before it is refused


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is a relative POSIX path with no way up, e.g. ``a.bin`` or ``pictures/1.png``."""
    parts = PurePosixPath(name).parts
    return bool(parts) and "/".join(parts) == name and ".." not in parts and "\\" not in name and "\0" not in name


def open_plain(folder: Path, name: str, *, one_link: bool = False) -> BufferedReader:
    """Opens a file of an artifact for reading.

    Args:
        folder: the artifact; it may itself be reached through a link.
        name: the file's path in it.
        one_link: refuse a file that has another name elsewhere too.

    Raises:
        IntegrityError: the name leads out of the folder, the file is missing or no regular one, or it or a folder on
            the way is a link.
    """
    if not is_plain_name(name):
        raise IntegrityError(f"{name!r} is no file name inside {folder}: make the artifact again")
    try:
        descriptor = _descriptor(folder, PurePosixPath(name).parts)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise IntegrityError(f"{folder / name} is missing or a link ({reason}): make the artifact again") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or (one_link and status.st_nlink != 1):
        os.close(descriptor)
        raise IntegrityError(f"{folder / name} must be a regular file{' with one link' if one_link else ''}")
    return os.fdopen(descriptor, "rb")


def read_plain(folder: Path, name: str, most: int) -> bytes:
    """A file of at most ``most`` bytes. Raises IntegrityError as :func:`open_plain`, or if it is larger."""
    with open_plain(folder, name) as opened:
        return read_at_most(opened, most, folder / name)


def read_at_most(opened: BufferedReader, most: int, path: Path) -> bytes:
    """The rest of an open file. Raises IntegrityError where it has more than ``most`` bytes; no more are read."""
    known = os.fstat(opened.fileno()).st_size
    data = b"" if known > most else opened.read(most + 1)  # it may have grown since
    if max(known, len(data)) > most:
        raise IntegrityError(f"{path} has more than {most} bytes, which is too much for what it is")
    return data


def _descriptor(folder: Path, parts: tuple[str, ...]) -> int:
    """Opens part by part, so that no folder on the way can be a link."""
    place = os.open(folder, _FOLDER)
    try:
        for part in parts[:-1]:
            inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=place)
            os.close(place)
            place = inner
        return os.open(parts[-1], _FILE, dir_fd=place)
    finally:
        os.close(place)
