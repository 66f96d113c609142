"""The replicas as one service: requests go to whichever is free, and once more where one died over them."""

from __future__ import annotations

import math
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from s2p_deploy.errors import S2PError
from s2p_deploy.serve.request import ClosingError, GivenUpError, LateError, OverloadedError
from s2p_deploy.serve.ticket import Ticket

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image
    from ray.serve.handle import DeploymentHandle, DeploymentResponse

    from s2p_deploy.serve.facts import ServiceFacts
    from s2p_deploy.serve.observer import Ending, Observer
    from s2p_deploy.serve.request import ImageRequest

_SECONDS_BETWEEN_LOOKS = 0.1  # at whether a request was given up
_SECONDS_BEFORE_RETRY = 0.2
_ENDINGS: dict[type[Exception], Ending] = {
    GivenUpError: "cancelled",
    LateError: "late",
    OverloadedError: "refused",
    ClosingError: "refused",
}
# its replica died, or none is there: a picture depends on its request alone, so it may be asked for again
_GONE = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)


class RayService:
    """Draws requests with the replicas behind ``handle``.

    ``room`` requests are taken at once, drawn or waiting; ``stop`` ends the replicas.
    """

    def __init__(
        self,
        handle: DeploymentHandle,
        facts: ServiceFacts,
        room: int,
        observer: Observer,
        stop: Callable[[], None],
    ) -> None:
        self.facts = facts
        self._handle, self._room, self._observer, self._stop = handle, room, observer, stop
        self._followers = ThreadPoolExecutor(room, thread_name_prefix="ray")
        self._changed = threading.Condition()
        self._taken: dict[str, Ticket] = {}
        self._closing = self._stopping = self._closed = False

    @property
    def waiting(self) -> int:
        """Nothing waits here: the replicas' queues do."""
        return 0

    @property
    def active(self) -> int:
        """Requests that were given to replicas."""
        return len(self._taken)

    @property
    def alive(self) -> bool:
        """Whether requests are followed; a replica that dies is replaced."""
        return not self._closed

    def submit(self, request: ImageRequest, *, timeout: float, id: str | None = None) -> Ticket:  # noqa: A002
        """Takes a request, which must be done within ``timeout`` seconds.

        Raises:
            OverloadedError: too many are taken already. ClosingError: the service takes none any more.
        """
        now = time.monotonic()
        ticket = Ticket(id or uuid.uuid4().hex, request, now, now + timeout)
        with self._changed:
            if self._closing:
                raise ClosingError("the service is closing")
            if len(self._taken) >= self._room:
                raise OverloadedError(len(self._taken), retry_after=1)
            self._taken[ticket.id] = ticket
        ticket.picture.set_running_or_notify_cancel()
        self._followers.submit(self._follow, ticket)
        return ticket

    def drain(self, seconds: float) -> bool:
        """Takes nothing more and finishes what is there, within ``seconds``; whether all of it was done."""
        with self._changed:
            self._closing = True
            return self._changed.wait_for(lambda: not self._taken, seconds)

    def close(self) -> None:
        """Gives up what is left, then ends the replicas. May be called twice."""
        with self._changed:
            self._closing = self._stopping = True
            left = tuple(self._taken.values())
        for ticket in left:
            ticket.cancel()
        self._followers.shutdown()
        if not self._closed:
            self._closed = True
            self._stop()

    def _follow(self, ticket: Ticket) -> None:
        """In a thread of its own: a ticket until its end."""
        ending: Ending = "failed"
        try:
            ticket.picture.set_result(self._drawn(ticket))
            ending = "drawn"
        except Exception as error:
            stopped = self._stopping and isinstance(error, GivenUpError)
            told = ClosingError("the service was stopped before this picture was done: ask again") if stopped else error
            ending = _ENDINGS.get(type(told), "failed")
            ticket.picture.set_exception(told)
        finally:
            with self._changed:
                self._taken.pop(ticket.id, None)
                self._changed.notify_all()
            self._observer.ended(ticket, ending, time.monotonic() - ticket.taken)

    def _drawn(self, ticket: Ticket) -> Image:
        while True:
            try:
                return self._asked_once(ticket)
            except _GONE:
                _check_wanted(ticket)
                time.sleep(_SECONDS_BEFORE_RETRY)

    def _asked_once(self, ticket: Ticket) -> Image:
        from PIL import Image

        _check_wanted(ticket)
        seconds = ticket.deadline - time.monotonic()
        response = self._handle.draw.remote(ticket.request, seconds, ticket.id)
        try:
            return Image.fromarray(_result(response, ticket))
        except BackPressureError as error:
            raise OverloadedError(len(self._taken), retry_after=math.ceil(seconds / 10)) from error
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, S2PError) else error) from None
        except TaskCancelledError as error:
            raise GivenUpError("whoever asked has left") from error


def _result(response: DeploymentResponse, ticket: Ticket) -> Any:  # noqa: ANN401 - of Ray, which is not typed
    """What a replica answers, unless the ticket is given up before."""
    while True:
        try:
            return response.result(timeout_s=_SECONDS_BETWEEN_LOOKS)
        except TimeoutError:
            try:
                _check_wanted(ticket)
            except S2PError:
                response.cancel()
                raise


def _check_wanted(ticket: Ticket) -> None:
    """Raises GivenUpError where whoever asked has left, LateError where it is too late."""
    if ticket.given_up.is_set():
        raise GivenUpError("whoever asked has left")
    if time.monotonic() >= ticket.deadline:
        raise LateError("the picture would come too late")
