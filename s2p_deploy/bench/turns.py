"""Child processes that take turns: each holds one engine, and only one of them works at a time."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from s2p_deploy.child_process import ChildEndedError, ChildProcess, serve
from s2p_deploy.errors import S2PError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Child:
    """One child. ``name`` is what errors call it."""

    def __init__(self, name: str, process: ChildProcess) -> None:
        self.name = name
        self._process = process

    def request(self, verb: str, **values: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        """Returns the reply to one request.

        Raises:
            S2PError: the child crashed, with the end of its log; or it met an expected error, as its own class.
        """
        try:
            return self._process.request({"verb": verb, **values})
        except S2PError as error:
            raise type(error)(f"{self.name}: {error}") from error
        except ChildEndedError as error:
            summary = f"the process that ran {self.name} {error.ended.summary(self._process.limits)}"
            raise S2PError(error.ended.with_tail(summary)) from error


@contextmanager
def children(commands: Sequence[tuple[str, Sequence[str]]]) -> Iterator[tuple[Child, ...]]:
    """Starts (name, arguments of this Python) each in a session of its own, and ends all of them on leaving."""
    with ExitStack() as stack:
        yield tuple(Child(name, stack.enter_context(ChildProcess(arguments))) for name, arguments in commands)


def in_turns(count: int, rounds: int, visit: Callable[[int, int], None]) -> None:
    """Calls ``visit(member, round)`` for every member of every round; each round starts with another member."""
    for number in range(rounds):
        for place in range(count):
            visit((number + place) % count, number)


def answer_requests(verbs: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Serves requests, each of which names one of ``verbs``, until stdin closes."""
    serve(lambda request: verbs[request["verb"]](request))
