"""Work that may crash runs in a child process with limits: a native crash becomes an error, and the parent lives."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s2p_deploy import errors
from s2p_deploy.errors import EngineBuildError, S2PError

if TYPE_CHECKING:
    from pathlib import Path

TAIL_LINES = 40
_MEMORY_WORDS = ("MemoryError", "bad_alloc", "Cannot allocate memory", "out of memory", "can't allocate memory")


@dataclass(frozen=True)
class Limits:
    """Seconds of wall time, and bytes of private memory (None: no limit)."""

    timeout_s: float
    memory: int | None = None


def run_child(module: str, request: dict[str, Any], scratch: Path, limits: Limits) -> dict[str, Any]:
    """Runs ``python -m module request.json result.json`` in its own process and returns the result.

    The module writes a JSON object: its answer, or ``{"error": class name, "message": text}`` for an expected error.
    ``scratch`` receives the two files and the log.

    Raises:
        EngineBuildError: it crashed, ran out of memory, took too long, or failed; the first line says which, and
            the end of its log follows.
        S2PError: the expected error that it reported, as its own class.
    """
    request_file, result_file, log = scratch / "request.json", scratch / "result.json", scratch / "child.log"
    request_file.write_text(json.dumps(request), encoding="utf-8")
    # -P: a file in the working directory must not stand in for a library
    command = [sys.executable, "-P", "-m", module, str(request_file), str(result_file)]
    with log.open("wb") as output:
        code = _run(command, output.fileno(), limits)
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])
    if code is None:
        raise EngineBuildError(_with_tail(f"the build did not finish in {limits.timeout_s:g} s and was stopped", tail))
    if code != 0 or not result_file.is_file():
        raise EngineBuildError(_with_tail(_summary(code, tail, limits), tail))
    return _answer(json.loads(result_file.read_text(encoding="utf-8")))


def _run(command: list[str], output: int, limits: Limits) -> int | None:
    """The exit code (negative: a signal), or None where time ran out. Whatever the child started ends with it."""
    # a session of its own: the whole group can be stopped, and Ctrl-C comes here first
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        if limits.memory is not None:
            with suppress(ProcessLookupError):  # it may have ended already
                resource.prlimit(child.pid, resource.RLIMIT_DATA, (limits.memory, limits.memory))
        return child.wait(limits.timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _stop_group(child)


def _stop_group(child: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # the usual case: everything has ended
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _summary(code: int, tail: str, limits: Limits) -> str:
    limit = f" (limit {limits.memory / 2**30:.2f} GiB)" if limits.memory is not None else ""
    if any(word in tail for word in _MEMORY_WORDS):
        return f"the build ran out of memory{limit}"
    if code == -signal.SIGKILL:
        return f"the build was killed, most likely because memory ran out{limit}"
    if code < 0:
        return f"the build crashed with {signal.Signals(-code).name}"
    lines = [line for line in tail.splitlines() if line.strip()] or [f"exit code {code}, no output"]
    logged = [line for line in lines if "[E]" in line]  # a native library's own words, where there are any
    return f"the build failed: {(logged or lines)[-1].strip()}"


def _with_tail(summary: str, tail: str) -> str:
    return f"{summary}\n{tail}" if tail else summary


def _answer(data: dict[str, Any]) -> dict[str, Any]:
    if "error" not in data:
        return data
    kind = getattr(errors, data["error"], None)
    if isinstance(kind, type) and issubclass(kind, S2PError):
        raise kind(data["message"])
    raise EngineBuildError(data["message"])
