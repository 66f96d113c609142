"""A request that was taken: where it stands, its picture when that is done, and the way to give it up."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from s2p_deploy.serve.request import ImageRequest


@dataclass(frozen=True)
class Ticket:
    """A request in a service.

    ``picture`` gives the picture, or raises what the request ended with. ``deadline`` and ``taken`` are moments of
    ``time.monotonic``.
    """

    id: str
    request: ImageRequest
    taken: float
    deadline: float
    picture: Future[Image] = field(default_factory=Future)
    given_up: threading.Event = field(default_factory=threading.Event)
    _calls: list[int] = field(default_factory=lambda: [0, 0])

    @property
    def progress(self) -> tuple[int, int]:
        """Calls of the denoiser that are done, and all that there will be (0 until drawing begins)."""
        done, total = self._calls
        return done, total

    def tell_progress(self, done: int, total: int) -> None:
        """Says how far it is; the service's own thread calls this."""
        self._calls[:] = done, total

    def cancel(self) -> None:
        """Gives the request up: it leaves the batch before the next step, and ``picture`` raises GivenUpError."""
        self.given_up.set()
