"""What a service tells about itself while it works, for metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from s2p_deploy.serve.ticket import Ticket

Ending = Literal["drawn", "cancelled", "late", "refused", "failed"]


class Observer(Protocol):
    """Hears of events in a service. Called in the service's own thread: it must be quick and must not raise."""

    def ran_batch(self, samples: int, padded: int, pictures: int, seconds: float) -> None:
        """The engine ran once on ``samples`` latents of ``pictures`` requests, ``padded`` up to a profiled batch."""

    def ended(self, ticket: Ticket, ending: Ending, seconds: float) -> None:
        """A request came to its end, ``seconds`` after it was taken."""


class Unobserved:
    """Nobody listens."""

    def ran_batch(self, samples: int, padded: int, pictures: int, seconds: float) -> None:
        """Nothing."""

    def ended(self, ticket: Ticket, ending: Ending, seconds: float) -> None:
        """Nothing."""
