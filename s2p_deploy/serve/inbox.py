"""What reaches the drawing thread from others: requests, answers of side tasks, and the word to stop."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from s2p_deploy.serve.request import ClosingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from s2p_deploy.serve.drawing import Drawing
    from s2p_deploy.serve.ticket import Ticket


@dataclass(frozen=True)
class Answer:
    """What a side task gave; ``given`` is done."""

    drawing: Drawing
    given: Future[object]


class Inbox:
    """Thread-safe. The drawing thread takes everything out; whoever else only puts in."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._answers: deque[Answer] = deque()
        self._active = 0
        self._closing = self._stopped = False

    @property
    def waiting(self) -> int:
        """Requests that have not begun and that nobody has given up."""
        with self._changed:
            return len(self._wanted())

    @property
    def active(self) -> int:
        """Requests that are drawn."""
        return self._active

    @property
    def stopped(self) -> bool:
        """Whether the drawing thread is to end."""
        return self._stopped

    def put(self, ticket: Ticket, refused: Callable[[tuple[Ticket, ...]], Exception | None]) -> None:
        """Takes a request, unless ``refused`` says why not to for what waits already, or nothing is taken any more."""
        with self._changed:
            if self._closing:
                raise ClosingError("the service is closing: ask another one")
            error = refused(self._wanted())
            if error is not None:
                raise error
            self._waiting.append(ticket)
            self._changed.notify_all()

    def put_answer(self, answer: Answer) -> None:
        """A side task is done."""
        with self._changed:
            self._answers.append(answer)
            self._changed.notify_all()

    def take_answers(self) -> list[Answer]:
        """All that came since."""
        with self._changed:
            found = list(self._answers)
            self._answers.clear()
        return found

    def tickets(self) -> tuple[Ticket, ...]:
        """What waits, oldest first."""
        with self._changed:
            return tuple(self._waiting)

    def remove(self, tickets: list[Ticket]) -> None:
        """Takes requests out."""
        gone = {id(ticket) for ticket in tickets}
        with self._changed:
            self._waiting = deque(ticket for ticket in self._waiting if id(ticket) not in gone)

    def tell_active(self, number: int) -> None:
        """Says how many are drawn, which others may wait for."""
        with self._changed:
            self._active = number
            self._changed.notify_all()

    def wait(self, seconds: float | None) -> None:
        """Until something came, or ``seconds`` have passed (None: for ever)."""
        with self._changed:
            idle = not (self._waiting or self._active)
            self._changed.wait_for(
                lambda: self._stopped or self._answers or (idle and self._waiting), None if idle else seconds
            )

    def refuse(self) -> None:
        """Nothing more is taken."""
        with self._changed:
            self._closing = True

    def wait_until_empty(self, seconds: float) -> bool:
        """Until nothing waits and nothing is drawn; whether that came about."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._waiting or self._active or self._answers), seconds)

    def stop(self) -> None:
        """The drawing thread is to end."""
        with self._changed:
            self._closing = self._stopped = True
            self._changed.notify_all()

    def _wanted(self) -> tuple[Ticket, ...]:
        """What is given up takes nobody's place, though the drawing thread, in the midst of a step, ends it later."""
        return tuple(ticket for ticket in self._waiting if not ticket.given_up.is_set())
