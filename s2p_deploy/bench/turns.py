"""Child processes that are asked in turns: each holds one engine, and only one of them works at a time.

A child reads requests from stdin, one JSON object per line, and answers each with one line. It ends when its stdin
closes, so none outlives its parent.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from s2p_deploy import errors
from s2p_deploy.errors import S2PError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import IO

_TAIL_BYTES = 2000


class Child:
    """One child. ``name`` is what errors call it."""

    def __init__(self, name: str, process: subprocess.Popen[str], log: IO[bytes]) -> None:
        self.name = name
        self._process = process
        self._log = log

    def ask(self, verb: str, **values: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        """The answer to one request.

        Raises:
            S2PError: the child crashed, with the end of its log; or it met an expected error, as its own class.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended: no answer will come either
            self._process.stdin.write(json.dumps({"verb": verb, **values}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise S2PError(self._last_words())
        return _answer(self.name, json.loads(line))

    def _last_words(self) -> str:
        code = self._process.wait()
        ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (most likely memory ran out)" if code == -signal.SIGKILL else ""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _TAIL_BYTES))
        tail = self._log.read().decode(errors="replace").strip()
        return f"the process that ran {self.name} {ended}{hint}" + (f"\n{tail}" if tail else "")


@contextmanager
def children(commands: Sequence[tuple[str, Sequence[str]]]) -> Iterator[tuple[Child, ...]]:
    """Starts (name, arguments of this Python) each in a session of its own, and ends all of them on leaving."""
    with ExitStack() as stack:
        yield tuple(stack.enter_context(_child(name, arguments)) for name, arguments in commands)


def in_turns(count: int, rounds: int, visit: Callable[[int, int], None]) -> None:
    """Calls ``visit(member, round)`` for every member of every round; each round starts with another member."""
    for number in range(rounds):
        for place in range(count):
            visit((number + place) % count, number)


def answer_requests(verbs: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """A child's whole life: one answer per request until stdin closes.

    Answers go to what stdout was; whatever libraries print goes to stderr.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            request = json.loads(line)
            try:
                _send(answers, verbs[request["verb"]](request))
            except S2PError as error:
                _send(answers, {"error": type(error).__name__, "message": str(error)})


@contextmanager
def _child(name: str, arguments: Sequence[str]) -> Iterator[Child]:
    with tempfile.TemporaryFile() as log:
        # a session of its own: Ctrl-C reaches the parent alone, which then ends the children
        process = subprocess.Popen(
            [sys.executable, "-P", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        try:
            yield Child(name, process, log)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):
                    pipe.close()


def _answer(name: str, data: dict[str, Any]) -> dict[str, Any]:
    if "error" not in data:
        return data
    kind = getattr(errors, data["error"], S2PError)
    raise kind(f"{name}: {data['message']}")


def _send(answers: TextIO, data: dict[str, Any]) -> None:
    answers.write(json.dumps(data) + "\n")
    answers.flush()
