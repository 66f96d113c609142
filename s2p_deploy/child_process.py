"""Child processes for work that may crash: requests and replies as JSON lines over pipes, with limits.

A native crash, a hang or a memory limit ends the child and becomes an error here; the parent lives on.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TextIO

from s2p_deploy import errors
from s2p_deploy.errors import S2PError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

TAIL_LINES = 40
_LAST_WORDS = 3  # lines of a log in which a native abort says what it died of
_MEMORY_WORDS = (
    "MemoryError",
    "bad_alloc",
    "bad allocation",
    "Cannot allocate memory",
    "Failed to allocate memory",
    "OutOfMemory",
    "out of memory",
    "can't allocate memory",
    "Memory allocation still failed",  # OpenBLAS
    "failed to map segment from shared object",  # the loader of libraries
)
_DISK_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")
_EXIT_S = 10.0
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass(frozen=True)
class Limits:
    """Seconds of wall time per request, and bytes of private memory (None: no limit).

    Example:
        >>> Limits(timeout_s=600, memory=8 * 10**9)
        Limits(timeout_s=600, memory=8000000000)
    """

    timeout_s: float | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Ended:
    """How a child process ended, or why it was ended.

    Args:
        code: its exit code; negative: a signal, None: it was stopped when time ran out.
        log: what it printed since the last request.
        error: type and message of the exception that ended it, where it lived to say so.
    """

    code: int | None
    log: str
    error: str = ""

    def summary(self, limits: Limits) -> str:
        """Describes in one clause what happened, e.g. ``crashed with SIGSEGV``."""
        limit = f" (limit {limits.memory / 2**30:.2f} GiB)" if limits.memory is not None else ""
        if self.code is None:
            return f"did not finish in {limits.timeout_s:g} s and was stopped"
        final = self.final_error()
        if self.out_of_memory:
            return f"ran out of memory{limit}"
        if _mentions(final, _DISK_WORDS):
            return "ran out of disk, or of the size that a file may have"
        if self.code == -signal.SIGKILL:
            return f"was killed, most likely because memory ran out{limit}"
        if self.code < 0:
            return f"crashed with {signal.Signals(-self.code).name}"
        return f"failed with exit code {self.code}, no output" if not final else f"failed: {final[-1].strip()}"

    @property
    def out_of_memory(self) -> bool:
        """Returns whether it says that memory ran out, the host's or a GPU's."""
        return self.code is not None and _mentions(self.final_error(), _MEMORY_WORDS)

    def final_error(self) -> list[str]:
        """Lines that say what it died of.

        Earlier lines do not count: a library that skips one algorithm for want of memory and then fails of something
        else did not run out of memory.
        """
        lines = [line for line in self.log.splitlines()[-TAIL_LINES:] if line.strip()]
        if self.code is not None and self.code < 0:
            return lines[-_LAST_WORDS:]
        native = native_errors(lines)[-1:]
        return [*(self.error.splitlines() or lines[-1:]), *native]  # native words say more than the exception's

    def with_tail(self, summary: str) -> str:
        """Makes a message that ends with the last lines of the log."""
        return "\n".join([summary, *self.log.splitlines()[-TAIL_LINES:]])


class ChildEndedError(Exception):
    """A child process that gave no reply."""

    def __init__(self, ended: Ended) -> None:
        super().__init__(ended.code)
        self.ended = ended


class ChildProcess:
    """A Python process that answers requests; a context manager, on leaving which the process is killed.

    Args:
        arguments: of the Python interpreter, e.g. those that :func:`running` gives.
        limits: seconds per request, and bytes of private memory.
    """

    def __init__(self, arguments: Sequence[str], limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._logged = 0
        # -P: a file in the working directory must not stand in for a library.
        # A session of its own: Ctrl-C reaches the parent alone, which then ends the whole group.
        self._process = subprocess.Popen(
            [sys.executable, "-P", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        if self.limits.memory is not None:
            with suppress(ProcessLookupError):  # it may have ended already
                most = self.limits.memory
                resource.prlimit(self._process.pid, resource.RLIMIT_DATA, (most, most))

    def request(self, message: dict[str, Any]) -> dict[str, Any]:
        """Sends a request and returns the reply.

        Raises:
            ChildEndedError: the child crashed, failed or took too long. It answers no more requests.
            S2PError: the expected error that it met, as its own class. It lives on.
        """
        assert self._process.stdin is not None
        self._logged = self._log.seek(0, os.SEEK_END)
        with suppress(BrokenPipeError):  # it has ended: no reply will come either
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        line, in_time = self._line()
        reply: dict[str, Any] = json.loads(line) if line else {"ended": ""}
        if "ended" in reply:
            raise ChildEndedError(self._ended(reply["ended"], in_time=in_time))
        if "error" in reply:
            kind = getattr(errors, reply["error"], S2PError)
            raise kind(reply["message"]) if issubclass(kind, S2PError) else S2PError(reply["message"])
        result: dict[str, Any] = reply["result"]
        return result

    @property
    def log(self) -> str:
        """Returns what the child printed since the last request."""
        self._log.seek(self._logged)
        return self._log.read().decode(errors="replace")

    def close(self) -> None:
        """Kills the process and everything that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line(self) -> tuple[bytes, bool]:
        """Reads the child's next whole line; returns it and whether it, or the child's end, came in time."""
        assert self._process.stdout is not None
        pipe, data = self._process.stdout.fileno(), b""
        deadline = None if self.limits.timeout_s is None else time.monotonic() + self.limits.timeout_s
        while not data.endswith(b"\n"):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([pipe], [], [], left)[0]:
                return b"", False
            chunk = os.read(pipe, 2**16)
            if not chunk:
                return b"", True
            data += chunk
        return data, True

    def _ended(self, error: str, *, in_time: bool) -> Ended:
        code = None
        if in_time:
            with suppress(subprocess.TimeoutExpired):  # native libraries may hang as they are unloaded
                code = self._process.wait(_EXIT_S)
            code = 1 if code is None else code
        return Ended(code, self.log, error)


def running(function: str) -> tuple[str, ...]:
    """Arguments of a Python whose requests go to a function, ``package.module:name``."""
    return ("-m", "s2p_deploy.child_process", function)


def call(function: str, message: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Calls a function, ``package.module:name``, once in a process of its own; raises as a request does."""
    with ChildProcess(running(function), limits) as child:
        return child.request(message)


def serve(function: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Spends a child's life: one reply per request until stdin closes, or until an unexpected error.

    Replies go to what stdout was; whatever libraries print goes to the log.
    """
    _end_with_parent()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        for line in sys.stdin:
            try:
                reply: dict[str, Any] = {"result": function(json.loads(line))}
            except S2PError as error:
                reply = {"error": type(error).__name__, "message": str(error)}
            except BaseException as error:
                traceback.print_exc()
                sys.stdout.flush()
                _send(replies, {"ended": f"{type(error).__name__}: {error}"})
                sys.exit(1)
            sys.stdout.flush()
            _send(replies, reply)


def native_errors(lines: Sequence[str]) -> list[str]:
    """Finds the lines of a log in which a native library says what went wrong."""
    return [line for line in lines if "[E]" in line]


def _end_with_parent() -> None:
    """Has Linux's kernel kill this process when its parent ends, however that ends."""
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _mentions(lines: Sequence[str], words: tuple[str, ...]) -> bool:
    return any(word in line for word in words for line in lines)


def _send(replies: TextIO, data: dict[str, Any]) -> None:
    replies.write(json.dumps(data) + "\n")
    replies.flush()


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    serve(getattr(importlib.import_module(module), name))
