from __future__ import annotations

import asyncio

import pytest
from PIL import Image

from s2p_deploy.serve.http.tickets import progress
from s2p_deploy.serve.request import ImageRequest
from s2p_deploy.serve.ticket import Ticket


@pytest.fixture
def ticket() -> Ticket:
    return Ticket("a", ImageRequest("a red circle", steps=4, guidance_scale=1.0, seed=0), taken=0.0, deadline=60.0)


def test_progress_is_told_when_it_changes_until_the_end(ticket: Ticket) -> None:
    async def told() -> list[tuple[int, int]]:
        heard = progress(ticket, silence=3600)
        ticket.tell_progress(1, 4)
        first = await anext(heard)
        ticket.tell_progress(2, 4)
        second = await anext(heard)
        ticket.picture.set_result(Image.new("RGB", (1, 1)))
        return [first, second, *[late async for late in heard]]

    assert asyncio.run(told()) == [(1, 4), (2, 4)]


def test_a_request_that_waits_is_heard_of(ticket: Ticket) -> None:
    async def told() -> list[tuple[int, int]]:
        heard = progress(ticket, silence=0)
        return [await anext(heard) for _ in range(3)]

    assert asyncio.run(told()) == [(0, 0)] * 3
