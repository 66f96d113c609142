"""Files on disk: read without following links, written whole or not at all, with room looked for before and locks held.

An artifact's folder may come from anyone, so its files are opened part by part; what this process writes itself appears
under its name only once it is complete and synced.
"""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from s2p_deploy.errors import InputError, IntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from io import BufferedReader

    from torch import Tensor

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe must not block before it is refused


def is_plain_name(name: str) -> bool:
    """Returns whether ``name`` is a relative POSIX path with no way up, e.g. ``a.bin`` or ``pictures/1.png``."""
    parts = PurePosixPath(name).parts
    return bool(parts) and "/".join(parts) == name and ".." not in parts and "\\" not in name and "\0" not in name


def open_plain(folder: Path, name: str, *, one_link: bool = False) -> BufferedReader:
    """Opens a regular file of an artifact for reading.

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
    """Reads a file of at most ``most`` bytes. Raises IntegrityError as :func:`open_plain`, or if it is larger."""
    with open_plain(folder, name) as opened:
        return read_at_most(opened, most, folder / name)


def read_at_most(opened: BufferedReader, most: int, path: Path) -> bytes:
    """Reads the rest of an open file. Raises IntegrityError for more than ``most`` bytes; no more are read."""
    known = os.fstat(opened.fileno()).st_size
    # no more than it had when it was opened, plus one: read() takes memory for all that it is asked for
    data = b"" if known > most else opened.read(known + 1)
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


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file in one piece."""
    _write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file in one piece; the same tensors give the same bytes."""
    from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write_whole(path, lambda temporary: save_file(whole, temporary))


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("rb") as opened:
            os.fsync(opened.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Gives ``source``'s content a second name: a hard link where the file system has them, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def link_or_copy_files(source: Path, target: Path) -> None:
    """Makes a folder ``target`` with the files of the flat folder ``source``."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        link_or_copy(path, target / path.name)


def free_bytes(folder: Path) -> int:
    """Returns the bytes left on the disk of ``folder``, which need not exist yet."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def check_room(folder: Path, size: int, remedy: str = "make room, or choose another --out") -> None:
    """Raises InputError where the disk of ``folder``, which need not exist yet, has less than ``size`` bytes left."""
    free = free_bytes(folder)
    if free < size:
        raise InputError(f"{folder} needs {size / 1e9:.3g} GB and its disk has {free / 1e9:.3g} GB left: {remedy}")


def available_memory() -> int | None:
    """Returns the bytes that could be allocated without swapping, as Linux estimates it (None elsewhere)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    lines = meminfo.read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def check_place(path: Path) -> None:
    """Checks, before any work, that something new can be written at ``path``, with the folders that lead there.

    Raises:
        InputError: a file or a folder that cannot be written in is on the way, or there can be no such name.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be used ({reason}): choose another path") from error
    existing = next(place for place in path.absolute().parents if os.path.lexists(place))
    if not existing.is_dir():
        raise InputError(f"{path} cannot be used ({existing} is no folder): choose another path")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be used (no right to write in {existing}): choose another path")


def check_file(path: Path) -> None:
    """Checks, before any work, that a file can be written, or one at ``path`` be overwritten.

    Raises:
        InputError: as :func:`check_place`, or ``path`` is a folder.
    """
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        raise InputError(f"{path} is a folder: give the name of a file")
    check_place(path)


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turns an OSError while ``file`` is written into an InputError that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        # numpy's errors on a full disk say how much was written, and have no error number
        raise InputError(
            f"{file} cannot be written ({error.strerror or error}): make room, or choose another --out"
        ) from error


@contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds ``path``, which need not exist, against all other processes: with a lock on ``.<name>.lock`` beside it.

    The lock goes with its process, however that ends; the file is removed where the context is left.

    Args:
        path: what is to be held.
        wait: until another process that holds it is done, in place of refusing.

    Raises:
        InputError: another process holds it, or no lock can be had there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_file(path))
    try:
        try:
            if wait:
                lock_file(path).touch()  # or it would wait for a file that cannot be made
            lock.acquire(blocking=wait)
        except Timeout:
            # also where a file system makes no files (/proc): only trying again says so
            lock_file(path).touch()
            raise
    except Timeout as error:
        raise InputError(f"another process is at work on {path}: let it finish, or choose another --out") from error
    except OSError as error:
        raise InputError(f"{path} cannot be used ({error.strerror or error}): choose another --out") from error
    try:
        yield
    finally:
        # removed while it is held: a process that waits for this very file then finds it gone, and refuses
        lock_file(path).unlink(missing_ok=True)
        lock.release()


def is_claimed(path: Path) -> bool:
    """Returns whether some process holds ``path``."""
    if not lock_file(path).exists():
        return False
    try:
        with FileLock(lock_file(path), blocking=False):
            return False
    except Timeout:
        return True


def lock_file(path: Path) -> Path:
    """Returns the file whose lock holds ``path``."""
    return path.with_name(f".{path.name}.lock")
