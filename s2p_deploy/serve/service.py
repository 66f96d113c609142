"""The service: requests go in from any thread, one thread of its own draws them."""

from __future__ import annotations

import math
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from s2p_deploy.errors import InputError
from s2p_deploy.serve.batching import Batching, Room, samples_of, sharing_of
from s2p_deploy.serve.drawing_loop import DrawingLoop
from s2p_deploy.serve.inbox import Inbox
from s2p_deploy.serve.request import OverloadedError
from s2p_deploy.serve.ticket import Ticket

if TYPE_CHECKING:
    from types import TracebackType

    from s2p_deploy.pipeline import Schedule
    from s2p_deploy.records.pipeline_parts import PipelineParts
    from s2p_deploy.serve.facts import ServiceFacts
    from s2p_deploy.serve.observer import Observer
    from s2p_deploy.serve.request import ImageRequest
    from s2p_deploy.serve.served_engine import ServedEngine

_LONGEST_PAUSE = 600  # seconds that a client is ever told to wait


@dataclass(frozen=True)
class ServiceSettings:
    """How to serve.

    ``max_waiting`` requests are kept beside those that are drawn, of which there are ``max_active`` at the most (None:
    as many as the largest batch has samples, and two). ``batches`` are the sizes to profile (None: powers of two to 16,
    from what one picture needs on). ``schedules`` are those to bind where an engine takes fractional timesteps: without
    them only its own. ``parts`` are text encoders and autoencoder on a backend (None: PyTorch's).
    """

    batching: Batching = "step"
    max_waiting: int = 64
    max_active: int | None = None
    batches: tuple[int, ...] | None = None
    schedules: tuple[Schedule, ...] = ()
    parts: PipelineParts | None = None

    def __post_init__(self) -> None:
        if self.max_waiting < 0 or (self.max_active or 1) < 1:
            raise InputError("a service needs room: max_waiting from 0, max_active from 1")


class ImageService:
    """Draws requests with one engine. A context manager; closed, it holds no memory."""

    def __init__(self, served: ServedEngine, settings: ServiceSettings, observer: Observer) -> None:
        self.facts: ServiceFacts = served.facts
        self._served, self._max_waiting = served, settings.max_waiting
        self._inbox = Inbox()
        # a new thread would not start with as many of PyTorch's own as this one has, and bits depend on their number
        threads = torch.get_num_threads()
        self._aside = ThreadPoolExecutor(1, f"{self.name} aside", torch.set_num_threads, (threads,))
        room = Room(served.profile.cap, settings.max_active or served.profile.cap + 2)
        loop = DrawingLoop(served, sharing_of(settings.batching), room, self._inbox, self._aside, observer)
        self._thread = threading.Thread(target=loop.run, name=f"{self.name} drawing", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.facts.name

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return self._inbox.waiting

    @property
    def active(self) -> int:
        """Requests that are drawn."""
        return self._inbox.active

    @property
    def alive(self) -> bool:
        """Whether the drawing thread runs."""
        return self._thread.is_alive()

    def submit(self, request: ImageRequest, *, timeout: float, id: str | None = None) -> Ticket:  # noqa: A002
        """Takes a request, which must be done within ``timeout`` seconds.

        Raises:
            InputError: no such scheduler, a step count or a size that the engine does not take.
            OverloadedError: too many requests wait. ClosingError: the service takes none any more.
        """
        self._served.check(request)
        now = time.monotonic()
        ticket = Ticket(id or uuid.uuid4().hex, request, now, now + timeout)
        ticket.picture.set_running_or_notify_cancel()  # it ends in this service's hands alone
        self._inbox.put(ticket, self._refusal)
        return ticket

    def drain(self, seconds: float) -> bool:
        """Takes nothing more and finishes what is there, within ``seconds``; whether all of it was done."""
        self._inbox.refuse()
        return self._inbox.wait_until_empty(seconds)

    def close(self) -> None:
        """Stops; what is not done ends with ClosingError. May be called twice."""
        self._inbox.stop()
        self._thread.join()
        self._aside.shutdown()
        self._served.opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refusal(self, waiting: tuple[Ticket, ...]) -> OverloadedError | None:
        if len(waiting) < self._max_waiting:
            return None
        samples = sum(ticket.request.steps * samples_of(ticket.request) for ticket in waiting)
        seconds = math.ceil(samples * self._served.profile.seconds_per_sample)
        return OverloadedError(len(waiting), min(max(1, seconds), _LONGEST_PAUSE))
