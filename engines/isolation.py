"""Work that may crash runs in a child process with limits: a native crash becomes an error, and the parent lives."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2p_deploy import errors
from s2p_deploy.errors import EngineBuildError, S2PError

if TYPE_CHECKING:
    from collections.abc import Callable

TAIL_LINES = 40
_MEMORY_WORDS = (
    "MemoryError",
    "bad_alloc",
    "Cannot allocate memory",
    "Failed to allocate memory",
    "out of memory",
    "can't allocate memory",
)
_DISK_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")
_POLL_S = 0.2
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass(frozen=True)
class Limits:
    """Seconds of wall time, and bytes of private memory (None: no limit)."""

    timeout_s: float
    memory: int | None = None


@dataclass(frozen=True)
class Ended:
    """How a child process ended: its exit code (negative: a signal, None: stopped when time ran out), and its log."""

    code: int | None
    log: str


def run_child(module: str, request: dict[str, Any], scratch: Path, limits: Limits) -> dict[str, Any]:
    """Runs ``python -m module request.json result.json`` in its own process and returns the result.

    The module writes a JSON object: its answer, or ``{"error": class name, "message": text}`` for an expected error.
    ``scratch`` receives the two files and the log.

    Raises:
        EngineBuildError: it crashed, ran out of memory, took too long, or failed; the first line says which, and
            the end of its log follows.
        S2PError: the expected error that it reported, as its own class.
    """
    result_file = scratch / "result.json"
    ended = run_to_end(module, request, scratch, limits)
    if ended.code != 0 or not result_file.is_file():
        tail = "\n".join(ended.log.splitlines()[-TAIL_LINES:])
        raise EngineBuildError(_with_tail(summary(ended, limits), tail))
    return _answer(json.loads(result_file.read_text(encoding="utf-8")))


def run_to_end(
    module: str, request: dict[str, Any], scratch: Path, limits: Limits, watch: Callable[[], None] = lambda: None
) -> Ended:
    """Runs ``python -m module request.json result.json`` until it ends, or is stopped; never raises for how it ends.

    ``watch`` is called several times a second meanwhile. Whatever the child started ends with it.
    """
    request_file, result_file, log = scratch / "request.json", scratch / "result.json", scratch / "child.log"
    result_file.unlink(missing_ok=True)  # of an earlier child
    request_file.write_text(json.dumps(request), encoding="utf-8")
    # -P: a file in the working directory must not stand in for a library
    command = [sys.executable, "-P", "-m", module, str(request_file), str(result_file)]
    with log.open("wb") as output:
        code = _run(command, output.fileno(), limits, watch)
    return Ended(code, log.read_text(encoding="utf-8", errors="replace"))


def summary(ended: Ended, limits: Limits) -> str:
    """One line on how a child that gave no answer ended."""
    limit = f" (limit {limits.memory / 2**30:.2f} GiB)" if limits.memory is not None else ""
    last_lines = ended.log.splitlines()[-TAIL_LINES:]
    if ended.code is None:
        return f"the build did not finish in {limits.timeout_s:g} s and was stopped"
    if _mentions(last_lines, _MEMORY_WORDS):
        return f"the build ran out of memory{limit}"
    if _mentions(last_lines, _DISK_WORDS):
        return "the build ran out of disk, or of the size that a file may have"
    if ended.code == -signal.SIGKILL:
        return f"the build was killed, most likely because memory ran out{limit}"
    if ended.code < 0:
        return f"the build crashed with {signal.Signals(-ended.code).name}"
    lines = [line for line in last_lines if line.strip()] or [f"exit code {ended.code}, no output"]
    return f"the build failed: {(native_errors(lines) or lines)[-1].strip()}"


def native_errors(lines: list[str]) -> list[str]:
    """Those lines of a log in which a native library says what went wrong."""
    return [line for line in lines if "[E]" in line]


def answer_request(request_file: str, result_file: str, work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child's side of :func:`run_child`: ``work`` on the request gives the result; an expected error is one too."""
    end_with_parent()
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    try:
        result = work(request)
    except S2PError as error:
        result = {"error": type(error).__name__, "message": str(error)}
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


def end_with_parent() -> None:
    """Has the kernel kill this process when its parent ends, however that ends. Does nothing where not on Linux."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _run(command: list[str], output: int, limits: Limits, watch: Callable[[], None]) -> int | None:
    # a session of its own: the whole group can be stopped, and Ctrl-C comes here first
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        if limits.memory is not None:
            with suppress(ProcessLookupError):  # it may have ended already
                resource.prlimit(child.pid, resource.RLIMIT_DATA, (limits.memory, limits.memory))
        return _wait(child, time.monotonic() + limits.timeout_s, watch)
    finally:
        _stop_group(child)


def _wait(child: subprocess.Popen[bytes], deadline: float, watch: Callable[[], None]) -> int | None:
    while (left := deadline - time.monotonic()) > 0:
        with suppress(subprocess.TimeoutExpired):
            return child.wait(min(left, _POLL_S))
        watch()
    return None


def _stop_group(child: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # the usual case: everything has ended
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _mentions(lines: list[str], words: tuple[str, ...]) -> bool:
    return any(word in line for word in words for line in lines)


def _with_tail(summary: str, tail: str) -> str:
    return f"{summary}\n{tail}" if tail else summary


def _answer(data: dict[str, Any]) -> dict[str, Any]:
    if "error" not in data:
        return data
    kind = getattr(errors, data["error"], None)
    if isinstance(kind, type) and issubclass(kind, S2PError):
        raise kind(data["message"])
    raise EngineBuildError(data["message"])
