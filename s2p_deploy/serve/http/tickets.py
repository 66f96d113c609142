"""Tickets of a service, awaited: their pictures, their progress, and giving them up when whoever asked has left."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from s2p_deploy.serve.request import GivenUpError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from PIL.Image import Image
    from starlette.requests import Request

    from s2p_deploy.serve.http.picture_service import PictureService
    from s2p_deploy.serve.request import ImageRequest
    from s2p_deploy.serve.ticket import Ticket

_SECONDS_BETWEEN_LOOKS = 0.1  # at the progress
_LONGEST_SILENCE = 15.0  # seconds; proxies close what says nothing for 30 to 60


@contextmanager
def taken(
    service: PictureService, requests: Sequence[ImageRequest], timeout: float, request_id: str
) -> Iterator[list[Ticket]]:
    """Tickets of all ``requests``, or of none; they are given up when the context is left before they are done.

    Raises:
        OverloadedError: as ``submit``. ClosingError: likewise. InputError: likewise.
    """
    tickets: list[Ticket] = []
    try:
        for number, request in enumerate(requests):
            own = request_id if len(requests) == 1 else f"{request_id}-{number}"
            tickets.append(service.submit(request, timeout=timeout, id=own))
        yield tickets
    finally:
        for ticket in tickets:
            if not ticket.picture.done():
                ticket.cancel()


async def pictures(tickets: Sequence[Ticket], request: Request) -> list[Image]:
    """The pictures of all tickets.

    Raises:
        GivenUpError: the client has left. Otherwise what the first ticket that failed ended with.
    """
    left = asyncio.ensure_future(_left(request))
    drawn = asyncio.ensure_future(_all_drawn(tickets))
    try:
        await asyncio.wait({left, drawn}, return_when=asyncio.FIRST_COMPLETED)
        if not drawn.done():
            raise GivenUpError("the client has left")
        return drawn.result()
    finally:
        left.cancel()
        drawn.cancel()


async def progress(ticket: Ticket, silence: float = _LONGEST_SILENCE) -> AsyncIterator[tuple[int, int]]:
    """Calls of the denoiser done and all there will be, until the ticket is at its end.

    Whenever they change, and every ``silence`` seconds while they do not, so that no proxy takes a queue for an end.
    """
    ended, last, told = _ended(ticket), (0, 0), time.monotonic()
    while not ended.is_set():
        if ticket.progress != last or time.monotonic() - told >= silence:
            last, told = ticket.progress, time.monotonic()
            yield last
        try:
            await asyncio.wait_for(ended.wait(), _SECONDS_BETWEEN_LOOKS)
        except TimeoutError:
            continue


async def _all_drawn(tickets: Sequence[Ticket]) -> list[Image]:
    found = []
    for ticket in tickets:
        await _ended(ticket).wait()
        found.append(ticket.picture.result())
    return found


def _ended(ticket: Ticket) -> asyncio.Event:
    """Set when the ticket is at its end. The future is not awaited: cancelling that wait would cancel the future."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    ticket.picture.add_done_callback(lambda _: loop.call_soon_threadsafe(ended.set))
    return ended


async def _left(request: Request) -> None:
    """Returns when the client has left; the request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
