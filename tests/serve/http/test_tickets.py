from __future__ import annotations

import asyncio

from s2p_deploy.serve.http.tickets import progress
from s2p_deploy.serve.request import ImageRequest
from s2p_deploy.serve.ticket import Ticket


async def _heard(ticket: Ticket, silence: float, seconds: float) -> list[tuple[int, int]]:
    """What is told of a ticket that moves once and ends after ``seconds``."""
    loop = asyncio.get_running_loop()
    loop.call_later(seconds / 2, ticket.tell_progress, 1, 4)
    loop.call_later(seconds, ticket.picture.set_exception, ValueError("at its end"))
    return [told async for told in progress(ticket, silence)]


def _ticket() -> Ticket:
    return Ticket("a", ImageRequest("a red circle", steps=4, guidance_scale=1.0, seed=0), taken=0.0, deadline=60.0)


def test_progress_is_told_when_it_changes() -> None:
    assert asyncio.run(_heard(_ticket(), silence=60, seconds=0.8)) == [(1, 4)]


def test_a_request_that_waits_is_heard_of() -> None:
    told = asyncio.run(_heard(_ticket(), silence=0.1, seconds=1.2))
    assert told[0] == (0, 0)
    assert told[-1] == (1, 4)
    assert len(told) >= 3
