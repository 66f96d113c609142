"""What the HTTP side needs of a service that draws pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from s2p_deploy.serve.facts import ServiceFacts
    from s2p_deploy.serve.request import ImageRequest
    from s2p_deploy.serve.ticket import Ticket


class PictureService(Protocol):
    """A model that is loaded, warm and drawing."""

    @property
    def facts(self) -> ServiceFacts:
        """What it says about itself."""

    @property
    def waiting(self) -> int:
        """Requests that wait for their first step."""

    @property
    def active(self) -> int:
        """Requests that are being drawn."""

    @property
    def alive(self) -> bool:
        """Whether it can still draw."""

    def submit(self, request: ImageRequest, *, timeout: float, id: str | None = None) -> Ticket:  # noqa: A002
        """Takes a request that must be done within ``timeout`` seconds.

        Raises:
            OverloadedError: the queue is full. ClosingError: it takes nothing new. InputError: it cannot draw this.
        """

    def drain(self, seconds: float) -> bool:
        """Takes nothing new and finishes what is there; whether all of it was done within ``seconds``."""

    def close(self) -> None:
        """Stops; what is left raises ClosingError."""
