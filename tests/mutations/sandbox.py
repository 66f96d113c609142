"""One case in a forked process: what it came to, and whether it touched anything outside its artifact."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TIMEOUT_S = 300
_IN_ACCESS, _IN_MODIFY, _IN_OPEN, _IN_CREATE, _IN_ISDIR = 0x1, 0x2, 0x20, 0x100, 0x40000000
_EVENT = struct.Struct("iIII")
_OWN_FILES = tuple(
    str(Path(place).resolve())
    for place in {sys.prefix, sys.base_prefix, *(path for path in sys.path if path), Path(__file__).parents[2]}
)
_SYSTEM = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/dev/shm/", "/usr/", "/lib", "/etc/ld.so", "/etc/localtime")


def run_forked(work: Callable[[], dict[str, Any]], answer: Path) -> dict[str, Any]:
    """The JSON that ``work`` gives in a child process, or ``{"crash": signal}``."""
    child = os.fork()
    if child == 0:
        _become_quiet()
        signal.alarm(TIMEOUT_S)
        try:
            answer.write_text(json.dumps(work()), encoding="utf-8")
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"crash": signal.Signals(os.WTERMSIG(status)).name}
    return json.loads(answer.read_text(encoding="utf-8")) if answer.exists() else {"crash": "no answer"}


def _become_quiet() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def watch_opens(allowed: tuple[Path, ...], seen: list[str]) -> None:
    """Notes in ``seen`` every file that Python opens outside ``allowed``, Python's own and the system's places."""
    places = (*(str(path) for path in allowed), *_OWN_FILES, *_SYSTEM)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        name = os.fsdecode(arguments[0])
        # a relative name is one part below a folder that was opened by its own
        if name.startswith("/") and not os.path.realpath(name).startswith(places):
            seen.append(name)

    sys.addaudithook(hook)


@contextmanager
def watched_by_kernel(folder: Path) -> Iterator[list[str]]:
    """Names in ``folder`` that anything, native code too, opens, reads, writes or makes meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    mask = _IN_ACCESS | _IN_MODIFY | _IN_OPEN | _IN_CREATE
    if descriptor < 0 or libc.inotify_add_watch(descriptor, os.fsencode(folder), mask) < 0:
        raise OSError(ctypes.get_errno(), "inotify")
    names: list[str] = []
    try:
        yield names
        names += _events(descriptor)
    finally:
        os.close(descriptor)


def _events(descriptor: int) -> Iterator[str]:
    try:
        data = os.read(descriptor, 2**16)
    except BlockingIOError:
        return
    place = 0
    while place < len(data):
        _, mask, _, length = _EVENT.unpack_from(data, place)
        name = data[place + _EVENT.size : place + _EVENT.size + length].rstrip(b"\0").decode()
        if not mask & _IN_ISDIR:
            yield name
        place += _EVENT.size + length


def use_temporary(folder: Path) -> None:
    """Temporary files of this process go here."""
    folder.mkdir(exist_ok=True)
    tempfile.tempdir = str(folder)
    os.environ["TMPDIR"] = str(folder)


def where_raised(error: BaseException) -> list[str]:
    """Files of the traceback, outermost first."""
    return [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
